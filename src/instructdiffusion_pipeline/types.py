"""Shared types of datasets, tasks, training and evaluation.

A dataset returns `(image, annotation)`. The type of the annotation depends on the task family:

    keypoints       Joints: joint name -> Joint, or None if it is not visible
    segmentation    Masks: object name -> bool array [height, width]; all False if the object is absent
    restoration     the clean image
    editing         Edit: the instruction and the edited image
    adaptation      the caption

A task converts it to a `Sample` (see `tasks`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One training sample: `target` is the output for `instruction` and `image`. Both are RGB images of one size."""

    image: Image.Image
    target: Image.Image
    instruction: str


class Joint(NamedTuple):
    """A position in pixels; (0, 0) is the center of the top-left pixel. `score` is 0 to 1."""

    x: float
    y: float
    score: float = 1.0


class Edit(NamedTuple):
    """Annotation of an editing dataset: the instruction and the edited image."""

    instruction: str
    edited: Image.Image


Joints = Mapping[str, Joint | None]
Masks = Mapping[str, np.ndarray]


class LabeledMasks(dict[str, np.ndarray]):
    """The masks of an image of which not all pixels are labeled.

    Pixels that are False in `labeled` (bool, [height, width]) belong to no mask, and metrics ignore them.
    """

    def __init__(self, masks: Masks, labeled: np.ndarray):
        super().__init__(masks)
        self.labeled = labeled


@dataclass(frozen=True)
class Pose(Mapping[str, Joint | None]):
    """The ground-truth `joints` of a person in pixels, and the area and sigmas that keypoint AP needs.

    `area`, in square pixels, is the area in the JSON file, or, if that has none, a fraction of the person's box (0.53
    in CrowdPose, 1 in AI Challenger); `sigmas` maps each joint to its OKS sigma. Without both, PCK can be computed,
    but not AP.
    """

    joints: Joints
    area: float | None = None
    sigmas: Mapping[str, float] | None = None

    def __getitem__(self, name: str) -> Joint | None:
        return self.joints[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.joints)

    def __len__(self) -> int:
        return len(self.joints)
