"""InstructDiffusion as a diffusers pipeline: one image model that follows instructions."""

import diffusers

from .ask import Answer, ask, ask_batch
from .hub import export, push
from .pipeline_instruct_diffusion import (
    Guidance,
    InstructDiffusionPipeline,
    InstructDiffusionPipelineOutput,
    WorkingSize,
    upright_rgb,
    working_size,
)

__all__ = [
    "Answer",
    "Guidance",
    "InstructDiffusionPipeline",
    "InstructDiffusionPipelineOutput",
    "WorkingSize",
    "ask",
    "ask_batch",
    "export",
    "push",
    "upright_rgb",
    "working_size",
]

# `DiffusionPipeline.from_pretrained` looks here for the class that a saved folder names.
diffusers.InstructDiffusionPipeline = InstructDiffusionPipeline
