"""Validation pictures: the same examples with the same noise at every stage of a run."""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.image_grid import labeled_grid
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.tasks import EmptyAnnotation, make_sample
from instructdiffusion_pipeline.types import Sample

SEED = 0


@dataclass(frozen=True)
class ValidationExample:
    """A sample to show under a title, and the arguments of the pipeline's call (steps and scales)."""

    title: str
    sample: Sample
    settings: Mapping[str, Any]


def validation_examples(
    mixture: Mixture, settings_by_family: Mapping[str, Mapping[str, Any]] | None = None
) -> list[ValidationExample]:
    """Take the first usable sample of each family in `mixture`.

    Its settings are those of the task, overridden by `settings_by_family` (such as `pipeline.config.task_settings`).
    """
    examples: dict[str, ValidationExample] = {}
    for source in mixture.sources:
        for index in range(len(source.dataset)):
            rng = random.Random(SEED)
            try:
                image, annotation = source.read(index, rng)
                task = source.make_task(image, annotation, rng)
            except (UnreadableSample, EmptyAnnotation):
                continue
            if task.family not in examples:
                settings = {**task.settings, **(settings_by_family or {}).get(task.family, {})}
                sample = make_sample(task, image, annotation, rng)
                examples[task.family] = ValidationExample(f"{task.family}: {source.name}", sample, settings)
            break
    return list(examples.values())


@torch.no_grad()
def validation_grid(
    pipeline: InstructDiffusionPipeline, examples: Sequence[ValidationExample], text_to_image: bool = False
) -> Image.Image:
    """A row for each example: input, answer and target. With `text_to_image` the input is zero latents, not shown."""
    pipeline = copy.copy(pipeline)  # the modules are shared, the progress bar's settings are not
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for example in examples:
        sample, factor = example.sample, pipeline.vae_scale_factor
        width, height = sample.image.size
        zeros = torch.zeros(1, pipeline.vae.config.latent_channels, height // factor, width // factor)
        (answer,), _ = pipeline(
            sample.instruction,
            zeros if text_to_image else sample.image,
            generator=torch.Generator().manual_seed(SEED),
            return_dict=False,
            **{"resolution": 0, **example.settings},  # the size of the training pictures
        )
        panels = [(f'"{sample.instruction}"', answer), ("target", sample.target)]
        rows.append((example.title, panels if text_to_image else [("input", sample.image), *panels]))
    return labeled_grid(rows)
