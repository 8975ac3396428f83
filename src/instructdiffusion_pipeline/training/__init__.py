"""Fine-tuning on diffusers' training utilities; `train` is the one call most people need."""

from instructdiffusion_pipeline.training.config import TrainingConfig
from instructdiffusion_pipeline.training.data import EncodedSamples, encode_samples
from instructdiffusion_pipeline.training.loop import train

__all__ = ["EncodedSamples", "TrainingConfig", "encode_samples", "train"]
