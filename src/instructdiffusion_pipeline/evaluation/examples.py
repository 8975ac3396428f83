"""Examples of an evaluation, opened one at a time, so that a dataset need not fit in memory."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from PIL import Image

from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_sources, load_test_sources, parse_entries
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.keypoints import Keypoints, joint_tasks
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Joints, Masks


class Example(NamedTuple):
    """An RGB image, its tasks, and its annotation.

    The results of several tasks are merged before scoring, for example four tasks for the 17 joints of a person.
    """

    image: Image.Image
    tasks: Sequence[Task]
    truth: Any


@dataclass(frozen=True)
class LazyExample:
    """An example that is read when it is needed.

    Attributes:
        name: unique, and the same in every run.
        row: its row in the table. The examples of a row are of one family.
        open: reads the example. If it raises an exception, the example is counted as failed.
        source: where the example is from, if known. The examples of a row must be from one source.
    """

    name: str
    row: str
    open: Callable[[], Example]
    source: Source | None = None


MakeTasks = Callable[[Image.Image, Any, random.Random], Sequence[Task]]


def examples_from(source: Source, count: int, seed: int = 0, make_tasks: MakeTasks | None = None) -> list[LazyExample]:
    """Choose `count` examples of a source at random, or all if it has fewer. Their row is named `source.name`.

    `make_tasks` makes the tasks of an image; by default there is one, from `source.make_task`.
    """
    length = len(source.dataset)
    chosen = sorted(random.Random(f"{seed}/{source.name}").sample(range(length), min(count, length)))
    return [
        LazyExample(
            f"{source.name} {index}: {source.dataset.name(index)}",
            source.name,
            partial(_open, source, index, seed, make_tasks),
            source,
        )
        for index in chosen
    ]


def load_examples(
    entries: Sequence[str],
    size: int,
    samples: int,
    test_samples: int,
    test_split: str | None = None,
    seed: int = 0,
    augment: bool = True,
) -> tuple[list[LazyExample], list[LazyExample]]:
    """Choose examples of the training splits and of the test splits of datasets "NAME=FOLDER".

    Args:
        entries: see `datasets.specs.parse_entries`.
        size: side of the images in pixels, for the transforms of the training splits.
        samples: number of training examples per dataset.
        test_samples: number of test examples per dataset.
        test_split: split to use in place of each dataset's own test split.
        seed: seed of the choice of examples.
        augment: whether the training examples are cropped, turned and flipped at random as in training. Otherwise
            they are cropped like the test examples.

    Raises:
        ValueError: if an entry is malformed, or a dataset cannot be read.
    """
    if augment:
        training = [source for source, _ in load_sources(entries, size)]
    else:
        training = [
            DATASETS[entry.key].test_source(entry.name, entry.folder, size, DATASETS[entry.key].train_split)
            for entry in parse_entries(entries)
        ]
    test = load_test_sources(entries, size, test_split)
    return (
        [example for source in training for example in examples_from(source, samples, seed)],
        [example for source in test for example in examples_from(source, test_samples, seed)],
    )


def _open(source: Source, index: int, seed: int, make_tasks: MakeTasks | None) -> Example:
    rng = random.Random(f"{seed}/{source.name}/{index}")
    image, truth = source.read(index, rng)
    tasks = make_tasks(image, truth, rng) if make_tasks else [cast(Task, source.make_task(image, truth, rng))]
    return Example(image, tasks, truth)


def whole_person(image: Image.Image, joints: Joints, rng: random.Random) -> list[Keypoints]:
    """Tasks for all joints of a person; see `joint_tasks`."""
    return joint_tasks(image, list(joints))


def every_object(image: Image.Image, masks: Masks, rng: random.Random) -> list[Segmentation]:
    """One task for each object in the image, or for each name if the image has none of the objects."""
    present = {name: mask for name, mask in masks.items() if mask.any()}
    return [Segmentation.from_annotation(image, {name: mask}, rng) for name, mask in (present or masks).items()]
