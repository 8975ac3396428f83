"""Validation images: the same examples with the same noise at every validation step."""

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.image_grid import labeled_grid
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.tasks import EmptyAnnotation, call_settings, make_sample
from instructdiffusion_pipeline.training.encoding import Batch, FrozenEncoders, diffusion_latents
from instructdiffusion_pipeline.training.model import Denoiser
from instructdiffusion_pipeline.types import Sample

SEED = 0
EXAMPLES = 4


@dataclass(frozen=True)
class ValidationExample:
    """A sample to show under a title, and the arguments of the pipeline's call (steps and scales)."""

    title: str
    sample: Sample
    settings: Mapping[str, Any]


def validation_examples(
    mixture: Mixture,
    settings_by_family: Mapping[str, Mapping[str, Any]] | None = None,
    examples_per_family: int = EXAMPLES,
) -> list[ValidationExample]:
    """Take the first usable samples of each family in `mixture`.

    Their settings are those of the task, overridden by `settings_by_family` (such as `pipeline.config.task_settings`).
    """
    examples: dict[str, list[ValidationExample]] = {}
    for source in mixture.sources:
        for index in range(len(source.dataset)):
            rng = random.Random(SEED + index)
            try:
                image, annotation = source.read(index, rng)
                task = source.make_task(image, annotation, rng)
            except (UnreadableSample, EmptyAnnotation):
                continue
            of_family = examples.setdefault(task.family, [])
            if len(of_family) == examples_per_family:
                break
            settings = call_settings(task, settings_by_family or {})
            sample = make_sample(task, image, annotation, rng)
            of_family.append(ValidationExample(f"{task.family}: {source.name}", sample, settings))
    return [example for of_family in examples.values() for example in of_family]


@torch.no_grad()
def validation_loss(
    model: Denoiser,
    encoders: FrozenEncoders,
    scheduler: DDPMScheduler,
    batches: Iterable[Batch],
    scaling_factor: float,
    text_to_image: bool = False,
) -> float:
    """The mean loss of the samples in `batches`, without conditioning dropout and loss weights."""
    device, losses = encoders.vae.device, []
    for batch in batches:
        batch = encoders.encode(send_to_device(batch, device))
        noise = batch["step_noise"]
        # Embeddings of cached samples have half precision.
        text = batch["prompt_embeds"].float() if model.text_encoder is None else batch["input_ids"]
        latents, image_latents = diffusion_latents(batch, noise, scaling_factor, text_to_image)
        # The compiled call is for training batches only.
        losses.append(model.forward(scheduler, latents, image_latents, text, noise.noise, noise.timesteps, None))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def validation_grid(
    pipeline: InstructDiffusionPipeline, examples: Sequence[ValidationExample], text_to_image: bool = False
) -> Image.Image:
    """A row for each example: input, output and target. With `text_to_image` the input is zero latents, not shown."""
    pipeline = copy.copy(pipeline)  # with the same modules, but its own settings of the progress bar
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
            **{**example.settings, "resolution": 0},  # the size of the training images
        )
        panels = [(f'"{sample.instruction}"', answer), ("target", sample.target)]
        rows.append((example.title, panels if text_to_image else [("input", sample.image), *panels]))
    return labeled_grid(rows)
