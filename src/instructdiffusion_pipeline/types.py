"""The contract between data sets, tasks, training and evaluation.

A data set reads `(image, annotation)`. What an annotation is depends on the family alone:

    keypoints       Joints: joint name -> Joint, or None where it is not visible
    segmentation    Masks: object name -> bool array [height, width]; all False where the object is absent
    restoration     the clean picture
    editing         Edit: the instruction and the edited picture
    adaptation      the caption

A task then turns it into a `Sample` (see `tasks`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One training pair: `instruction` asks to turn `image` into `target` (two RGB pictures of one size)."""

    image: Image.Image
    target: Image.Image
    instruction: str


class Joint(NamedTuple):
    """A place in pixels; (0, 0) is the middle of the top left pixel. `confidence` is 0 to 1."""

    x: float
    y: float
    confidence: float = 1.0


class Edit(NamedTuple):
    """What an editing data set says of a picture."""

    instruction: str
    edited: Image.Image


Joints = Mapping[str, Joint | None]
Masks = Mapping[str, np.ndarray]
