"""Training samples from several datasets. Their order and all random choices depend on one seed."""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import AnnotatedImages, UnreadableSample
from instructdiffusion_pipeline.tasks import EmptyAnnotation, TrainingTask, make_sample
from instructdiffusion_pipeline.types import Sample

logger = logging.getLogger(__name__)
SHOWN = 3  # maximum number of entries in a warning
WARNINGS = 100  # maximum number of unusable samples with a warning

MakeTask = Callable[[Image.Image, Any, random.Random], TrainingTask]
Transform = Callable[[Image.Image, Any, random.Random], tuple[Image.Image, Any]]


@dataclass(frozen=True)
class Source:
    """A dataset with its transform and task.

    `transform` crops and flips a sample (see `transforms`); `make_task` chooses the task for the result, for example
    `Segmentation.from_annotation`.
    """

    name: str
    dataset: AnnotatedImages[Any]
    make_task: MakeTask
    transform: Transform | None = None

    def read(self, index: int, rng: random.Random) -> tuple[Image.Image, Any]:
        """The transformed image and annotation. Raises an `UnreadableSample` if a file is damaged."""
        image, annotation = self.dataset[index]
        return self.transform(image, annotation, rng) if self.transform else (image, annotation)


def check_source_names(names: Iterable[str]) -> None:
    """Raise a ValueError if two sources have the same name, because their scores could not be distinguished."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"Sources must have different names; these are used more than once: {', '.join(repeated)}.")


@dataclass(frozen=True)
class FixedTask:
    """A `make_task` that returns the same task for every image."""

    task: TrainingTask

    def __call__(self, image: Image.Image, annotation: Any, rng: random.Random) -> TrainingTask:
        return self.task


class Mixture:
    """Weighted mixture of several sources, in an order that depends on `seed`.

    An epoch contains `weight * len(source)` samples of each source. With a weight of 0.2 each epoch has a different
    fifth of the source; with a weight of 20 the source is repeated 20 times. `len(mixture)` is the length of an epoch.
    `mixture[position]` is defined for any position >= 0 and depends only on `seed` and `position`, so positions can be
    distributed freely over processes and workers.

    Attributes:
        counts: number of samples of each source in an epoch.
        skipped: how often each sample could not be used, by source and name, in this process.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int = 0):
        if not sources:
            raise ValueError("`sources` must have at least one (source, weight); got none.")
        for source, weight in sources:
            if not 0 < weight < math.inf:
                raise ValueError(f"`sources`: the weight of {source.name} must be finite and above 0; got {weight}.")
        self.sources = [source for source, _ in sources]
        self.seed = seed
        self.skipped: Counter[str] = Counter()
        for source in self.sources:
            if lost := source.dataset.skipped:
                some = ", ".join(f"{what}: {why}" for what, why in lost[:SHOWN])
                logger.warning("%s: %d entries cannot be used, such as %s", source.name, len(lost), some)
        self._lengths = [len(source.dataset) for source in self.sources]
        self.counts = [max(1, round(weight * len(source.dataset))) for source, weight in sources]
        self._ends = np.cumsum(self._lengths)
        self._plan: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, position: int) -> Sample:
        source, start = self._locate(position)
        for step in range(len(source.dataset)):
            index = (start + step) % len(source.dataset)
            name = f"{source.name}: {source.dataset.name(index)}"
            rng = random.Random(f"{self.seed}/{position}")
            try:
                image, annotation = source.read(index, rng)
                return make_sample(source.make_task(image, annotation, rng), image, annotation, rng)
            except (UnreadableSample, EmptyAnnotation) as error:
                self._skip(name, error)
            except (ValueError, IndexError) as error:  # a mask of a wrong size raises an IndexError
                raise ValueError(f"{name}: {error}") from error
        raise ValueError(f"{source.name}: none of the {len(source.dataset)} samples can be used.")

    def source_of(self, position: int) -> Source:
        """The source that `mixture[position]` is drawn from."""
        return self._locate(position)[0]

    def _locate(self, position: int) -> tuple[Source, int]:
        if position < 0:
            raise IndexError(f"`position` must be at least 0; got {position}.")
        epoch, offset = divmod(position, len(self))
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._order(epoch)
        place = int(self._plan[1][offset])
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self.sources[number], place - int(self._ends[number]) + self._lengths[number]

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch as indices into the concatenated sources, [len(self)]."""
        parts = []
        for number, (length, count) in enumerate(zip(self._lengths, self.counts, strict=True)):
            # Each source is an endless sequence of permutations; an epoch takes the next `count` samples.
            first, last = epoch * count, (epoch + 1) * count
            rounds = range(first // length, -(-last // length))
            stream = np.concatenate([self._permutation(length, number + 1, turn) for turn in rounds])
            parts.append(stream[first % length :][:count] + int(self._ends[number]) - length)
        return np.concatenate(parts)[self._permutation(len(self), 0, epoch)]

    def _permutation(self, length: int, *key: int) -> np.ndarray:
        return np.random.default_rng((self.seed, *key)).permutation(length)

    def _skip(self, name: str, error: Exception) -> None:
        if name not in self.skipped and len(self.skipped) < WARNINGS:
            logger.warning("%s cannot be used and is replaced by the next usable one: %s", name, error)
            if len(self.skipped) == WARNINGS - 1:
                logger.warning("Further samples that cannot be used are counted without a warning.")
        self.skipped[name] += 1
