"""What an evaluation asks: cases, opened one at a time, so that a data set need not fit in memory."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, most_visible_first
from instructdiffusion_pipeline.tasks.keypoints import MAX_JOINTS, Keypoints
from instructdiffusion_pipeline.types import Joints


class Example(NamedTuple):
    """An RGB picture, the questions about it, and its annotation, which answers them all.

    Several questions are read into one reading: a person's 17 joints take four, and are scored together.
    """

    image: Image.Image
    tasks: Sequence[Task]
    truth: Any


@dataclass(frozen=True)
class Case:
    """One sample of the table's `row`, all of which are of one family.

    `name` is the case's own and stays the same from run to run. `open` may raise: such a case is counted as failed.
    """

    name: str
    row: str
    open: Callable[[], Example]


Ask = Callable[[Image.Image, Any, random.Random], Sequence[Task]]


def examples_from(source: Source, count: int, seed: int = 0, ask: Ask | None = None) -> list[Case]:
    """`count` cases out of a data set (all, if it has fewer), the same ones for a seed; their row is `source.name`.

    `ask` chooses the questions about a picture; by default the one that `source.make_task` does.
    """
    length = len(source.dataset)
    chosen = sorted(random.Random(f"{seed}/{source.name}").sample(range(length), min(count, length)))
    return [
        Case(
            f"{source.name} {index}: {source.dataset.name(index)}",
            source.name,
            partial(_open, source, index, seed, ask),
        )
        for index in chosen
    ]


def _open(source: Source, index: int, seed: int, ask: Ask | None) -> Example:
    rng = random.Random(f"{seed}/{source.name}/{index}")
    image, truth = source.read(index, rng)
    tasks = ask(image, truth, rng) if ask else [cast(Task, source.make_task(image, truth, rng))]
    return Example(image, tasks, truth)


def whole_person(image: Image.Image, joints: Joints, rng: random.Random) -> list[Keypoints]:
    """Questions for all joints of a person, at most `MAX_JOINTS` each, in colours that show on most of the picture."""
    colors = most_visible_first(image, KEYPOINT_COLORS)
    groups = np.array_split(list(joints), -(-len(joints) // MAX_JOINTS))
    return [Keypoints({str(name): color for name, color in zip(group, colors, strict=False)}) for group in groups]
