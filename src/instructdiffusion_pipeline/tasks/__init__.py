"""One file a task family: its wording, its sampling preset, how answers are drawn and how they are read."""

import random
from typing import Any, ClassVar, Protocol, TypeVar

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.types import Sample

Reading = TypeVar("Reading")


class TrainingTask(Protocol):
    """What a model can be trained on: words, and the picture that answers them.

    Classes also have a `pick(image, annotation, rng)`, which chooses one for an annotated picture or raises
    `EmptyAnnotation`.
    """

    family: ClassVar[str]  # what settings and presets call it
    settings: ClassVar[dict[str, float]]  # what the original samples the family with

    def instruction(self, rng: random.Random | None = None) -> str:
        """The question in words."""

    def draw(self, image: Image.Image, annotation: Any) -> Image.Image:
        """The picture that answers it, for training."""


class Task(TrainingTask, Protocol[Reading]):
    """One question to a picture. `read` undoes `draw`: read(image, draw(image, annotation)) gives the annotation."""

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Reading:
        """What an answer says, in pixels of `image`; `box` is the part of it that `answer` shows."""

    def overlay(self, image: Image.Image, reading: Reading) -> Image.Image:
        """A picture of a reading on its input."""


class EmptyAnnotation(ValueError):
    """An annotation holds nothing that a task could ask for: no object, or no joint in the frame."""


def make_sample(task: TrainingTask, image: Image.Image, annotation: Any, rng: random.Random) -> Sample:
    """The training pair for one question about an annotated picture. Raises a ValueError if its two sizes differ."""
    target = task.draw(image, annotation)
    if target.size != image.size:
        raise ValueError(f"`annotation` must be of the picture's size {image.size}; its picture is {target.size}.")
    return Sample(image, target, task.instruction(rng))
