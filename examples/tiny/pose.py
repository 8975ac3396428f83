"""A task for the whole pose at once, which a small model learns faster than single joints by name."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from instructdiffusion_pipeline.tasks.keypoints import Keypoints

COLORS = {
    "nose": "white",
    "left elbow": "magenta",
    "right elbow": "cyan",
    "left wrist": "red",
    "right wrist": "blue",
    "left knee": "yellow",
    "right knee": "green",
    "left ankle": "gray",
    "right ankle": "black",
}
WORDINGS = [
    "show the pose",
    "draw the whole pose",
    "where are all the joints?",
    "mark every joint in its own color",
    "show how this person stands",
]


@dataclass(frozen=True)
class WholePose(Keypoints):
    """Asks for nine joints, each always in the same color.

    A model that has not learned the names of joints yet learns more from it than from `Keypoints`, because every
    sample shows nine joints and distinguishes left from right.
    """

    colors: Mapping[str, str] = field(default_factory=lambda: COLORS)

    def __post_init__(self) -> None:
        """Skip the check of `Keypoints`, which allows only five joints because its instruction names them."""

    def instruction(self, rng: random.Random | None = None) -> str:
        """Return a random wording; without `rng` always the same."""
        return rng.choice(WORDINGS) if rng else WORDINGS[0]
