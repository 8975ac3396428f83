"""Pictures that show how far training is: the same questions, with the same noise, every time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.sample import Sample
from instructdiffusion_pipeline.sheets import stack, strip

SEED = 0


@dataclass(frozen=True)
class ValidationQuestion:
    """A sample to show under a title, and what the pipeline is called with (steps and scales)."""

    title: str
    sample: Sample
    settings: Mapping[str, Any]


@torch.no_grad()
def validation_sheet(pipeline: InstructDiffusionPipeline, questions: Sequence[ValidationQuestion]) -> Image.Image:
    """A row for each question: input, answer and target."""
    pipeline = type(pipeline)(**pipeline.components)  # with a progress bar of its own to switch off
    pipeline.set_progress_bar_config(disable=True)
    strips = []
    for question in questions:
        sample = question.sample
        generator = torch.Generator().manual_seed(SEED)
        (answer,), _ = pipeline(
            sample.instruction, sample.image, generator=generator, return_dict=False, **question.settings
        )
        panels = [("input", sample.image), (f'"{sample.instruction}"', answer), ("target", sample.target)]
        strips.append(strip(question.title, panels))
    return stack(strips)
