"""Fine-tuning with diffusers and accelerate. `train` runs the training loop."""

from instructdiffusion_pipeline.training.cache import CachedDataset, cache_samples
from instructdiffusion_pipeline.training.config import RECIPES, TrainingConfig
from instructdiffusion_pipeline.training.data import ImageDataset, MultiSizeDataset
from instructdiffusion_pipeline.training.loop import train
from instructdiffusion_pipeline.training.model import expand_conv_in, load_for_training, save_lora
from instructdiffusion_pipeline.training.validation import ValidationExample, validation_examples

__all__ = [
    "RECIPES",
    "CachedDataset",
    "ImageDataset",
    "MultiSizeDataset",
    "TrainingConfig",
    "ValidationExample",
    "cache_samples",
    "expand_conv_in",
    "load_for_training",
    "save_lora",
    "train",
    "validation_examples",
]
