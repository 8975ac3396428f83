"""One module per task: prompt templates, default arguments, drawing of targets, decoding of outputs."""

import random
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.types import Sample

Reading = TypeVar("Reading")


class TrainingTask(Protocol):
    """A task that a model can be trained on: an instruction, and the picture that answers it.

    Classes also have `from_annotation(image, annotation, rng)`, which chooses a task for an annotated picture, or
    raises `EmptyAnnotation`.
    """

    family: ClassVar[str]  # the key of the task in `task_settings`
    settings: ClassVar[dict[str, float]]  # the settings of the original

    def instruction(self, rng: random.Random | None = None) -> str:
        """The instruction: one of several wordings with `rng`, else always the same."""

    def draw(self, image: Image.Image, annotation: Any) -> Image.Image:
        """The picture that answers the instruction, for training."""


class Task(TrainingTask, Protocol[Reading]):
    """A question about a picture. `read` inverts `draw`: read(image, draw(image, x)) returns the annotation x."""

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Reading:
        """The data in an answer, in pixels of `image`; `box` is the part of `image` that `answer` shows."""

    def overlay(self, image: Image.Image, reading: Reading) -> Image.Image:
        """The reading drawn on the input."""


@runtime_checkable
class PictureTask(Task[Image.Image], Protocol):
    """A task whose data is a picture, at the resolution of the input."""

    def transfer(
        self, image: Image.Image, reconstruction: Image.Image, answer: Image.Image, box: Box | None = None
    ) -> Image.Image:
        """Apply what the model changed to `image`, at its own resolution.

        `reconstruction` is `image` after encoding and decoding by the VAE. It and `answer` are of working size, and
        show the `box` of `image`.
        """


class EmptyAnnotation(ValueError):
    """An annotation has nothing to ask for: no object, or no joint in the frame."""


def make_sample(task: TrainingTask, image: Image.Image, annotation: Any, rng: random.Random) -> Sample:
    """The training pair for one question about an annotated picture. Raises a ValueError if its two sizes differ."""
    target = task.draw(image, annotation)
    if target.size != image.size:
        raise ValueError(f"`annotation` must be of the picture's size {image.size}; its picture is {target.size}.")
    return Sample(image, target, task.instruction(rng))
