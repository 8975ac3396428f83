"""The whole pose at once: a question that a small model learns before it tells joints apart by name."""

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
    """Asks for nine joints, each always in the same colour.

    One sample shows where nine joints are and which side is which, whatever the words; a question of `Keypoints` has a
    few of them, and shows a model that does not yet know the names hardly anything.
    """

    colors: Mapping[str, str] = field(default_factory=lambda: COLORS)

    def __post_init__(self) -> None:
        """Nine are too many for a sentence that names them, but not for this one."""

    def instruction(self, rng: random.Random | None = None) -> str:
        """One wording of the question; without `rng` always the same."""
        return rng.choice(WORDINGS) if rng else WORDINGS[0]
