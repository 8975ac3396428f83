"""Fine-tuning on diffusers' training utilities; `train` is the one call most people need."""

from instructdiffusion_pipeline.training.cache import CachedDataset, cache_samples
from instructdiffusion_pipeline.training.config import RECIPES, TrainingConfig
from instructdiffusion_pipeline.training.data import ImageDataset
from instructdiffusion_pipeline.training.loop import train
from instructdiffusion_pipeline.training.model import load_start, save_lora, widen
from instructdiffusion_pipeline.training.validation import ValidationQuestion, validation_questions

__all__ = [
    "RECIPES",
    "CachedDataset",
    "ImageDataset",
    "TrainingConfig",
    "ValidationQuestion",
    "cache_samples",
    "load_start",
    "validation_questions",
    "save_lora",
    "train",
    "widen",
]
