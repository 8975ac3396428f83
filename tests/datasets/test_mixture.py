import itertools
import logging
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.mixture import FixedTask, Mixture, Source
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Joint

BLUR = FixedTask(Restoration("blur"))


class Numbered:
    """Images of one color, which is their number; those in `broken` cannot be read."""

    def __init__(self, length, broken=()):
        self.length, self.broken, self.skipped = length, set(broken), []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableSample(self.name(index), "cut off")
        picture = Image.new("RGB", (2, 2), (index % 256, index // 256, 0))
        return picture, picture

    def name(self, index):
        return f"{index}.png"


def shift(image, clean, rng):
    """A transform that stores a random choice in the blue channel."""
    image = Image.new("RGB", (2, 2), (*image.getpixel((0, 0))[:2], rng.randrange(256)))
    return image, image


def number(sample):
    red, green, _ = sample.image.getpixel((0, 0))
    return red + 256 * green


def mixture(seed=0):
    sources = [("a", 40, 0.2), ("b", 3, 4), ("c", 10, 1), ("d", 10, 1.5)]
    return Mixture([(Source(name, Numbered(length), BLUR, shift), weight) for name, length, weight in sources], seed)


def test_weights_multiply_lengths_and_epochs_differ():
    mixed = mixture()
    assert len(mixed) == 8 + 12 + 10 + 15
    epochs = []
    for epoch in range(10):
        positions = range(epoch * 45, epoch * 45 + 45)
        epochs.append(Counter((mixed.source_of(p).name, number(mixed[p])) for p in positions))
        assert Counter(mixed.source_of(p).name for p in positions) == {"a": 8, "b": 12, "c": 10, "d": 15}
    assert all(epoch["b", n] == 4 for epoch in epochs for n in range(3))
    assert all(epoch["c", n] == 1 for epoch in epochs for n in range(10))
    # five epochs have each item of a source of weight 0.2 once; two epochs have each of one of weight 1.5 three times
    for start in (0, 5):
        assert {sum(epoch["a", n] for epoch in epochs[start : start + 5]) for n in range(40)} == {1}
    assert {epochs[0]["d", n] + epochs[1]["d", n] for n in range(10)} == {3}


def test_a_sample_depends_only_on_seed_and_position():
    first, second, other = mixture(), mixture(), mixture(seed=1)
    content = [(second[p].instruction, np.asarray(second[p].image).tolist()) for p in reversed(range(100))][::-1]
    assert content == [(first[p].instruction, np.asarray(first[p].image).tolist()) for p in range(100)]
    assert content != [(other[p].instruction, np.asarray(other[p].image).tolist()) for p in range(100)]
    assert [number(other[p]) for p in range(45)] != [number(first[p]) for p in range(45)]
    # each position has other random choices
    assert len({first[p].image.getpixel((0, 0))[2] for p in range(45)}) > 20
    assert len({first[p].instruction for p in range(45)}) > 5
    # each epoch has another order
    assert [number(first[p]) for p in range(45)] != [number(first[p + 45]) for p in range(45)]


def as_row(samples):
    return [(sample.instruction, sample.image.getpixel((0, 0))) for sample in samples]


def test_workers_do_not_change_samples():
    alone = [row for batch in DataLoader(mixture(), 7, collate_fn=as_row) for row in batch]
    loader = DataLoader(mixture(), 7, collate_fn=as_row, num_workers=2)
    assert [row for batch in loader for row in batch] == alone
    ranks = [[as_row([mixture()[p]])[0] for p in range(rank, 45, 3)] for rank in range(3)]
    assert [ranks[p % 3][p // 3] for p in range(45)] == alone


def test_unreadable_samples_are_counted_logged_once_and_replaced(caplog):
    mixed = Mixture([(Source("a", Numbered(5, broken={1, 2}), BLUR), 2), (Source("b", Numbered(5), BLUR), 1)])
    with caplog.at_level(logging.WARNING):
        shown = Counter(number(mixed[p]) for p in range(30) if mixed.source_of(p).name == "a")
    # 1 and 2 are replaced with the next readable one, 3, which then occurs three times as often
    assert shown == {0: 4, 3: 12, 4: 4}
    assert mixed.skipped == {"a: 1.png": 4, "a: 2.png": 8}
    assert len(caplog.records) == 2 and "a: 1.png cannot be used" in caplog.text and "cut off" in caplog.text


def test_thousands_of_unreadable_samples_are_counted_with_a_hundred_warnings(caplog):
    mixed = Mixture([(Source("a", Numbered(2000, broken=set(range(1999))), BLUR), 1)])
    with caplog.at_level(logging.WARNING):
        assert number(mixed[0]) == 1999
    assert len(mixed.skipped) >= 500 and caplog.text.count("cannot be used and is replaced") == 100
    assert caplog.records[-1].message == "Further samples that cannot be used are counted without a warning."


class Annotated(Numbered):
    """The same images, each with the annotation `annotations[number]`."""

    def __init__(self, *annotations):
        super().__init__(len(annotations))
        self.annotations = annotations

    def __getitem__(self, index):
        return super().__getitem__(index)[0], self.annotations[index]


@pytest.mark.parametrize(
    "pick, nothing, something",
    [
        (Segmentation.from_annotation, {}, {"cat": np.ones((2, 2), bool)}),
        (Keypoints.from_annotation, {"nose": Joint(900, 900)}, {"nose": Joint(1, 1)}),
    ],
)
def test_samples_without_a_task_are_replaced(pick, nothing, something, caplog):
    mixed = Mixture([(Source("a", Annotated(nothing, something), pick), 2)])
    assert {number(sample) for sample in mixed} == {1}
    assert mixed.skipped == {"a: 0.png": 2} and "a: 0.png cannot be used" in caplog.text


@pytest.mark.parametrize(
    "pick, annotation",
    [(BLUR, Image.new("RGB", (3, 2))), (Segmentation.from_annotation, {"cat": np.ones((2, 3), bool)})],
)
def test_annotations_of_another_size_are_reported(pick, annotation):
    with pytest.raises(ValueError, match=r"^a: 0.png: "):
        Mixture([(Source("a", Annotated(annotation), pick), 1)])[0]


def test_iterating_ends_after_one_epoch():
    mixed = mixture()
    assert as_row(itertools.islice(mixed, 100)) == as_row(mixed[position] for position in range(45))


def test_a_source_without_usable_samples_raises_an_error():
    mixed = Mixture([(Source("a", Numbered(3, broken={0, 1, 2}), BLUR), 1)])
    with pytest.raises(ValueError, match="a: none of the 3 samples can be used"):
        mixed[0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="`sources` must have at least one"):
        Mixture([])
    for weight in (-1, 0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"the weight of a must be finite and above 0; got {weight}"):
            Mixture([(Source("a", Numbered(3), BLUR), weight)])
    with pytest.raises(IndexError, match="`position` must be at least 0; got -1"):
        mixture()[-1]


def test_a_mixture_of_millions_needs_little_time_and_memory():
    mixed = Mixture([(Source("a", Numbered(3_000_000), BLUR), 1), (Source("b", Numbered(400_000), BLUR), 0.1)])
    assert mixed.source_of(0).name in "ab" and len(mixed) == 3_040_000
    assert len(pickle.dumps(mixed)) < 30_000_000  # the order has eight bytes per sample


def test_skipped_entries_of_a_dataset_are_counted_and_reported_at_once(caplog):
    class Lossy(list):
        skipped = [(f"row {number}", "no instruction") for number in range(5)]

        def name(self, index):
            return str(index)

    Mixture([(Source("mine", Lossy([1]), lambda *_: None), 1)])
    assert (
        "mine: 5 entries cannot be used, such as row 0: no instruction, row 1: no instruction, row 2:" in caplog.text
    )
