"""InstructDiffusion as a diffusers pipeline: one model for many vision tasks."""

import diffusers

from .ask import Answer, ask, ask_batch, ask_boxes
from .datasets.mixture import Mixture, Source
from .hub import export, push
from .modular_instruct_diffusion import InstructDiffusionBlocks, InstructDiffusionGuidance
from .pipeline_instruct_diffusion import (
    Guidance,
    InstructDiffusionPipeline,
    InstructDiffusionPipelineOutput,
    WorkingSize,
    upright_rgb,
    working_size,
)
from .tasks.colors import KEYPOINT_COLORS, MASK_COLORS
from .tasks.editing import Editing
from .tasks.keypoints import COCO_JOINTS, Keypoints, joint_tasks
from .tasks.restoration import Restoration
from .tasks.segmentation import Mask, Segmentation
from .types import Edit, Joint, Sample

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "COCO_JOINTS",
    "Edit",
    "Editing",
    "Guidance",
    "InstructDiffusionBlocks",
    "InstructDiffusionGuidance",
    "InstructDiffusionPipeline",
    "InstructDiffusionPipelineOutput",
    "Joint",
    "KEYPOINT_COLORS",
    "Keypoints",
    "MASK_COLORS",
    "Mask",
    "Mixture",
    "Restoration",
    "Sample",
    "Segmentation",
    "Source",
    "WorkingSize",
    "ask",
    "ask_batch",
    "ask_boxes",
    "export",
    "joint_tasks",
    "push",
    "upright_rgb",
    "working_size",
]

# `DiffusionPipeline.from_pretrained` looks up the class that a saved folder names in diffusers.
diffusers.InstructDiffusionPipeline = InstructDiffusionPipeline
