"""The contract between data sets, tasks, training and evaluation."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One training pair: `instruction` asks to turn `image` into `target` (two RGB pictures of one size)."""

    image: Image.Image
    target: Image.Image
    instruction: str
