"""Fine-tuning on diffusers' training utilities; `train` is the one call most people need."""

from instructdiffusion_pipeline.training.cache import CachedSamples, cache_samples
from instructdiffusion_pipeline.training.config import RECIPES, TrainingConfig
from instructdiffusion_pipeline.training.data import PictureSamples
from instructdiffusion_pipeline.training.loop import train
from instructdiffusion_pipeline.training.model import load_start, save_lora, widen
from instructdiffusion_pipeline.training.validation import ValidationQuestion, one_of_each_family

__all__ = [
    "RECIPES",
    "CachedSamples",
    "PictureSamples",
    "TrainingConfig",
    "ValidationQuestion",
    "cache_samples",
    "load_start",
    "one_of_each_family",
    "save_lora",
    "train",
    "widen",
]
