"""InstructDiffusion as a diffusers pipeline: one image model that follows instructions."""

import diffusers

from .ask import FAMILIES, Answer, ask, ask_batch, load_presets, model_resolution
from .hub import export, push
from .pipeline_instruct_diffusion import (
    Guidance,
    InstructDiffusionPipeline,
    InstructDiffusionPipelineOutput,
    WorkingSize,
    upright_rgb,
    working_size,
)
from .readout import LearnedReading
from .tasks.editing import Editing
from .tasks.keypoints import Keypoints
from .tasks.restoration import Restoration
from .tasks.segmentation import Mask, Segmentation
from .types import Joint

__all__ = [
    "FAMILIES",
    "Answer",
    "Editing",
    "Guidance",
    "InstructDiffusionPipeline",
    "InstructDiffusionPipelineOutput",
    "Joint",
    "Keypoints",
    "LearnedReading",
    "Mask",
    "Restoration",
    "Segmentation",
    "WorkingSize",
    "ask",
    "ask_batch",
    "export",
    "load_presets",
    "push",
    "model_resolution",
    "upright_rgb",
    "working_size",
]

# `DiffusionPipeline.from_pretrained` looks here for the class that a saved folder names.
diffusers.InstructDiffusionPipeline = InstructDiffusionPipeline
