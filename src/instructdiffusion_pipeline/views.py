"""Run a pipeline on views: images or parts of images, each with the prompt of a task."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, InstructDiffusionPipeline, center_crop
from instructdiffusion_pipeline.readout import mask_margins
from instructdiffusion_pipeline.tasks import PictureTask, Task
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

# Settings that may be a list or a tensor with one value per image.
PER_IMAGE = {"generator", "negative_prompt", "negative_prompt_embeds"}


class View(NamedTuple):
    """One input of the pipeline: an image or a slice of it, with the prompt of a task or of one of its objects."""

    number: int  # of the image in the batch
    task: Task
    prompt: str
    image: Image.Image
    offset: tuple[int, int]  # of `image` in the whole image, in pixels


class Response(NamedTuple):
    """The output of the pipeline for a view, at working size; it shows the region `box` of the view's image."""

    picture: Image.Image
    reconstruction: Image.Image | None
    box: Box
    flag: bool


def run_views(
    pipeline: InstructDiffusionPipeline,
    views: Sequence[View],
    resolution: int | None,
    resize_mode: str,
    **settings: Any,
) -> list[Response]:
    """Outputs for all views of one working size in one call of the pipeline."""
    pixels, _ = pipeline.preprocess_image([view.image for view in views], resolution, resize_mode)
    image_latents = pipeline.encode_image_latents(pixels, pipeline._execution_device)
    settings = for_images(settings, [view.number for view in views])
    pictures, flags = pipeline([view.prompt for view in views], image_latents, **settings, return_dict=False)
    reconstructions: list[Image.Image] | list[None] = [None] * len(views)
    if any(isinstance(view.task, PictureTask) for view in views):
        reconstructions = decode_pictures(pipeline, image_latents)
    # With "crop", the output shows the center of the image, otherwise all of it.
    crop = resize_mode == "crop" and resolution != 0
    boxes = [center_crop(view.image.size, pictures[0].size if crop else view.image.size) for view in views]
    return [
        Response(*response)
        for response in zip(pictures, reconstructions, boxes, flags or [False] * len(views), strict=True)
    ]


def decode_pictures(pipeline: InstructDiffusionPipeline, image_latents: torch.Tensor) -> list[Image.Image]:
    """Decode image latents (B, C, h, w) to images at working size."""
    decoded = pipeline.decode_latents(image_latents * pipeline.vae.config.scaling_factor)
    sizes = [(decoded.shape[3], decoded.shape[2])] * len(decoded)
    return cast(list[Image.Image], pipeline.postprocess_image(decoded, "pil", sizes, crop=False))


def view_margins(view: View, response: Response, readout: UNet2DModel | None) -> dict[str, np.ndarray]:
    """The margin of each object that a view asks about, in pixels of its image."""
    return mask_margins(cast(Segmentation, view.task), view.image, response.picture, response.box, readout)


def for_images(settings: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The settings for the images with these `numbers`.

    Lists and tensors have one value per image, or one for all. A number may occur several times, because an image has
    a view for each object and slice.
    """
    chosen = dict(settings)
    for name in PER_IMAGE & settings.keys():
        values = settings[name]
        if isinstance(values, list):
            chosen[name] = [values[number if len(values) > 1 else 0] for number in numbers]
        elif is_per_image(values) and len(values) > 1:
            chosen[name] = values[list(numbers)]
    return chosen


def is_per_image(values: Any) -> bool:
    """Whether the value of a setting in `PER_IMAGE` is a list or tensor of values per image."""
    return isinstance(values, list) or (isinstance(values, torch.Tensor) and values.ndim > 0)


def check_lengths(settings: Mapping[str, Any], count: int, noun: str) -> None:
    """Raise a ValueError if a setting in `PER_IMAGE` has neither one entry nor `count`, one per `noun`."""
    for name in sorted(PER_IMAGE & settings.keys()):
        if is_per_image(settings[name]) and len(settings[name]) not in (1, count):
            raise ValueError(f"`{name}` must have one entry, or one per {noun} ({count}); got {len(settings[name])}.")
