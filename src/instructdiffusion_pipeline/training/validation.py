"""Pictures that show how far training is: the same questions, with the same noise, every time."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.image_grid import stack, strip
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.tasks import EmptyAnnotation, make_sample
from instructdiffusion_pipeline.types import Sample

SEED = 0


@dataclass(frozen=True)
class ValidationQuestion:
    """A sample to show under a title, and what the pipeline is called with (steps and scales)."""

    title: str
    sample: Sample
    settings: Mapping[str, Any]


def validation_questions(
    mixture: Mixture, settings_by_family: Mapping[str, Mapping[str, Any]] | None = None
) -> list[ValidationQuestion]:
    """The first sample of each family in `mixture`, with the family's preset and what `settings_by_family` changes."""
    questions: dict[str, ValidationQuestion] = {}
    for source in mixture.sources:
        for index in range(len(source.dataset)):
            rng = random.Random(SEED)
            try:
                image, annotation = source.read(index, rng)
                lesson = source.make_task(image, annotation, rng)
            except (UnreadableSample, EmptyAnnotation):
                continue
            if lesson.family not in questions:
                settings = {**lesson.settings, **(settings_by_family or {}).get(lesson.family, {})}
                sample = make_sample(lesson, image, annotation, rng)
                questions[lesson.family] = ValidationQuestion(f"{lesson.family}: {source.name}", sample, settings)
            break
    return list(questions.values())


@torch.no_grad()
def validation_sheet(
    pipeline: InstructDiffusionPipeline, questions: Sequence[ValidationQuestion], text_to_image: bool = False
) -> Image.Image:
    """A row for each question: input (zero latents if `text_to_image`), answer and target."""
    pipeline = type(pipeline)(**pipeline.components)  # with a progress bar of its own to switch off
    pipeline.set_progress_bar_config(disable=True)
    strips = []
    for question in questions:
        sample, factor = question.sample, pipeline.vae_scale_factor
        width, height = sample.image.size
        nothing = torch.zeros(1, pipeline.vae.config.latent_channels, height // factor, width // factor)
        (answer,), _ = pipeline(
            sample.instruction,
            nothing if text_to_image else sample.image,
            generator=torch.Generator().manual_seed(SEED),
            return_dict=False,
            **question.settings,
        )
        panels = [(f'"{sample.instruction}"', answer), ("target", sample.target)]
        strips.append(strip(question.title, panels if text_to_image else [("input", sample.image), *panels]))
    return stack(strips)
