"""Ask a model one question about a picture, and get data back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from PIL import Image

from instructdiffusion_pipeline.hub import find_file
from instructdiffusion_pipeline.pipeline_instruct_diffusion import (
    Box,
    InstructDiffusionPipeline,
    upright_rgb,
    working_size,
)
from instructdiffusion_pipeline.readout import LearnedReading
from instructdiffusion_pipeline.tasks import Task

FAMILIES = ("keypoints", "segmentation", "restoration", "editing")


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model answered: `picture` as it came, in the input's size; `data` as the task reads it.

    `picture` shows the `box` (left, top, right, bottom) of the input. `data` is in pixels of the input: a dictionary
    of `Mask` or of `Joint` (None: not there), or the restored or edited picture. If the safety checker of a pipeline
    that has one blackened the picture, `nsfw_content_detected` is true and `data` means nothing.
    """

    task: Task
    image: Image.Image
    picture: Image.Image
    box: Box
    data: Any
    nsfw_content_detected: bool = False

    @property
    def overlay(self) -> Image.Image:
        """The reading on the input, to look at."""
        return self.task.overlay(self.image, self.data)


def ask(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Task,
    resolution: int | None | Literal["trained"] = "trained",
    instruction: str | None = None,
    reading: LearnedReading | None = None,
    **settings: Any,
) -> Answer:
    """Ask `task` about `image` (PIL, any mode and size) and read the answer.

    `resolution` is the pipeline's, by default the one that the model's UNet was made for (512 for Stable Diffusion
    1.5). The words are the task's own unless `instruction` brings others. Answers are read by colour unless a model
    has a `reading` of its own. `settings` go to the pipeline and come before the task's preset.

    Raises: what `ask_batch` raises.
    """
    return ask_batch(pipeline, [image], [task], [instruction], resolution, reading, **settings)[0]


def ask_batch(
    pipeline: InstructDiffusionPipeline,
    images: Sequence[Image.Image],
    tasks: Sequence[Task],
    instructions: Sequence[str | None],
    resolution: int | None | Literal["trained"] = "trained",
    reading: LearnedReading | None = None,
    **settings: Any,
) -> list[Answer]:
    """`ask` for several pictures of one working size in one call, by tasks that share a preset.

    Raises:
        TypeError: an image is no PIL picture, a task no task, or `reading` no reading.
        ValueError: there are no pictures, or not as many tasks and instructions; presets differ; or `settings` would
            change how many pictures come back or in which form.
    """
    if not len(images) == len(tasks) == len(instructions) > 0:
        raise ValueError(
            "`images`, `tasks` and `instructions` must be equally many, at least one; got"
            f" {len(images)}, {len(tasks)} and {len(instructions)}."
        )
    for image, task in zip(images, tasks, strict=True):
        if not isinstance(image, Image.Image) or not hasattr(task, "read"):
            raise TypeError(
                "`image` must be a PIL picture and `task` a question such as Segmentation({'cat': 'red'}); got"
                f" {type(image).__name__} and {type(task).__name__}."
            )
    if not isinstance(reading, LearnedReading | None):
        raise TypeError(
            "`reading` must be a LearnedReading, as LearnedReading.beside(model) gives, or None; got"
            f" {type(reading).__name__}."
        )
    if any(task.preset != tasks[0].preset for task in tasks):
        raise ValueError(f"`tasks` must share a preset; got {', '.join(type(task).__name__ for task in tasks)}.")
    if fixed := settings.keys() & {"prompt", "image", "output_type", "return_dict", "num_images_per_prompt"}:
        raise ValueError(
            f"`settings` may not have {', '.join(sorted(fixed))}: a question has one picture as its answer."
        )
    images = [upright_rgb(image) for image in images]
    if resolution == "trained":
        resolution = model_resolution(pipeline)
    words = [task.instruction() if own is None else own for task, own in zip(tasks, instructions, strict=True)]
    pictures, flags = pipeline(words, images, resolution=resolution, **(tasks[0].preset | settings), return_dict=False)
    answers = []
    for image, task, picture, flag in zip(images, tasks, pictures, flags or [False] * len(images), strict=True):
        box = working_size(*image.size, resolution, pipeline.vae_scale_factor).box
        data = reading(task, image, picture, box) if reading else task.read(image, picture, box)
        answers.append(Answer(task, image, picture, box, data, flag))
    return answers


def model_resolution(pipeline: InstructDiffusionPipeline) -> int:
    """The side in pixels of the pictures a pipeline's UNet was made for: 512 for Stable Diffusion 1.5."""
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def load_presets(model: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """A model's own settings by family, from presets.json in its folder or Hub repository.

    {} if it has none or, offline, the cache has none.

    Raises a ValueError if the file has settings for anything else than `FAMILIES`, or if `model` is no folder and
    cannot be a repository either.
    """
    path = find_file(model, "presets.json")
    if path is None:
        return {}
    presets = json.loads(path.read_text())
    if unknown := sorted(presets.keys() - set(FAMILIES)):
        raise ValueError(f"{path} must have settings for {', '.join(FAMILIES)}; it has some for {', '.join(unknown)}.")
    return presets
