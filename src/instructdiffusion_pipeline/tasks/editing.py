"""Editing: the output is the edited image itself (Geng et al., CVPR 2024, section 3.1)."""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import DEFAULT_SETTINGS, Box
from instructdiffusion_pipeline.tasks.frames import before_and_after, paste_answer
from instructdiffusion_pipeline.tasks.transfer import transfer_change, transfer_in_box
from instructdiffusion_pipeline.types import Edit


@dataclass(frozen=True)
class Editing:
    """An edit described by a free-text instruction. Raises a ValueError if the text is empty."""

    text: str

    family: ClassVar[str] = "editing"
    settings: ClassVar[dict[str, float]] = {
        name: value for name, value in DEFAULT_SETTINGS.items() if name != "ensemble_size"
    }

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f'`text` must say what to edit, as "make it winter" does; got {self.text!r}.')

    @classmethod
    def from_annotation(cls, image: Image.Image, edit: Edit, rng: random.Random) -> "Editing":
        """The instruction in the dataset."""
        return cls(edit.instruction)

    def instruction(self, rng: random.Random | None = None) -> str:
        """The text itself."""
        return self.text

    def draw(self, image: Image.Image, edit: Edit) -> Image.Image:
        """The edited image."""
        return edit.edited

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Image.Image:
        """The edited image in the size of `image`. Pixels outside of the `box` that `answer` shows are unchanged."""
        return paste_answer(image, answer, box)

    def transfer(
        self, image: Image.Image, reconstruction: Image.Image, answer: Image.Image, box: Box | None = None
    ) -> Image.Image:
        """See `PictureTask`."""
        return transfer_in_box(transfer_change, image, reconstruction, answer, box)

    def overlay(self, image: Image.Image, edited: Image.Image) -> Image.Image:
        """The left half of the input and the right half of the result."""
        return before_and_after(image, edited)
