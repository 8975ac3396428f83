"""One module per task: prompt templates, default arguments, drawing of targets, decoding of outputs."""

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.types import Sample

Reading = TypeVar("Reading")


class TrainingTask(Protocol):
    """A task for training: an instruction and a target image.

    Each class also has `from_annotation(image, annotation, rng)`, which creates a task from an annotated image, or
    raises `EmptyAnnotation`.
    """

    family: ClassVar[str]  # the key of the task in `task_settings`
    settings: ClassVar[dict[str, float]]  # default call arguments, from the original code

    def instruction(self, rng: random.Random | None = None) -> str:
        """The instruction: a random wording with `rng`, otherwise always the same."""

    def draw(self, image: Image.Image, annotation: Any) -> Image.Image:
        """The target image of the instruction, for training."""


class Task(TrainingTask, Protocol[Reading]):
    """A task whose outputs can be decoded. `read` is the inverse of `draw`: read(image, draw(image, x)) is about x."""

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Reading:
        """Decode an output image `answer`, which shows the `box` of `image`. The result is in pixels of `image`."""

    def overlay(self, image: Image.Image, reading: Reading) -> Image.Image:
        """The decoded data drawn on the input."""


@runtime_checkable
class PictureTask(Task[Image.Image], Protocol):
    """A task whose data is an image, at the resolution of the input."""

    def transfer(
        self, image: Image.Image, reconstruction: Image.Image, answer: Image.Image, box: Box | None = None
    ) -> Image.Image:
        """Apply what the model changed to `image`, at its own resolution.

        `reconstruction` is `image` after encoding and decoding by the VAE. `reconstruction` and `answer` have working
        size, and show the `box` of `image`.
        """


def call_settings(
    task: TrainingTask | type[TrainingTask], task_settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The call arguments of a task or its class: its `settings`, overridden by the `task_settings` of a model.

    The ensemble size is 1 if neither has one, because the default of the pipeline's `__call__` is that of editing.
    """
    return {"ensemble_size": 1, **task.settings, **task_settings.get(task.family, {})}


class EmptyAnnotation(ValueError):
    """Raised for an annotation from which no task can be created: it has no object, or no joint inside the image."""


def make_sample(task: TrainingTask, image: Image.Image, annotation: Any, rng: random.Random) -> Sample:
    """The training sample of a task and an annotated image. Raises a ValueError if the two image sizes differ."""
    target = task.draw(image, annotation)
    if target.size != image.size:
        raise ValueError(f"`annotation` must have the image size {image.size}; its image has {target.size}.")
    return Sample(image, target, task.instruction(rng))
