"""COCO-Stuff: semantic segmentation with one PNG label map per image."""

from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    UnreadableSample,
    read_annotations,
    read_image,
    require_samples,
)
from instructdiffusion_pipeline.types import Masks

UNLABELED = {1: 255, 0: 0}  # the value of a pixel, by the offset from values to numbers
LAST_NUMBER = 182
PROBED = 100  # number of label maps that are checked when a data set is opened
# These classes were never annotated (eye glasses, window, mirror ...), so an image may contain them without a label.
NEVER_LABELED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
READABLE_NAMES = {
    "playingfield": "playing field",
    "structural-other": "structure",
    "waterdrops": "water drops",
    "window-blind": "window blind",
}


def readable_name(label: str) -> str:
    """Convert a label to plain words: "wall-brick" to "brick wall", "sky-other" to "sky"."""
    if label in READABLE_NAMES:
        return READABLE_NAMES[label]
    noun, _, kind = label.partition("-")
    return f"{kind} {noun}" if kind not in ("", "other", "stuff") else noun


class CocoStuff:
    """COCO-Stuff: images/{split}/*.jpg, annotations/{split}/*.png, labels.txt; splits train2017, val2017.

    A pixel of value v belongs to the class with the number v + 1 in labels.txt; 255 is unlabeled. Label maps that
    contain the numbers themselves, and 0 for unlabeled, are recognized by the numbers that never occur (`offset` is
    then 0, not 1). The annotation has a mask for every class; absent classes share one empty mask. An "-other" class
    includes its subclasses: "wall" includes brick walls.
    """

    def __init__(self, root: str | PathLike[str], split: str = "train2017"):
        self.folder, self.skipped = Path(root) / "images" / split, Skipped()
        self.labels = Path(root) / "annotations" / split
        self._numbers = read_annotations(Path(root) / "labels.txt", 'lines like "171: wall-brick"', class_numbers)
        self._stems = []
        for picture in sorted(self.folder.glob("*.jpg")):
            if (self.labels / f"{picture.stem}.png").is_file():
                self._stems.append(picture.stem)
            else:
                self.skipped.append((picture.name, "no label PNG"))
        pictures = set(self._stems) | {Path(name).stem for name, _ in self.skipped}
        self.skipped += [
            (label.name, "a missing file") for label in sorted(self.labels.glob("*.png")) if label.stem not in pictures
        ]
        require_samples(self.folder, self._stems, self.skipped)
        self.offset = self._find_offset()

    def _find_offset(self) -> int:
        """The difference between class number and pixel value: 1 as published, 0 if more label maps fit that."""
        fits = {1: 0, 0: 0}
        for stem in self._stems[:: max(1, len(self._stems) // PROBED)]:
            try:
                values = set(np.unique(read_label(self.labels / f"{stem}.png")).tolist())
            except UnreadableSample:
                continue
            for offset in fits:
                fits[offset] += values <= possible_values(offset)
        return 0 if fits[0] > fits[1] else 1

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        path = self.labels / f"{self._stems[index]}.png"
        image = read_image(self.folder / f"{self._stems[index]}.jpg", turn=False)
        label = read_label(path)
        if label.shape != (image.height, image.width):
            raise UnreadableSample(path, f"is of {label.shape[::-1]} pixels, its picture of {image.size}")
        values = set(np.unique(label).tolist())
        if strange := sorted(values - possible_values(self.offset)):
            raise UnreadableSample(path, f"holds values that stand for no class, such as {strange[0]}")
        present = {value + self.offset for value in values - {UNLABELED[self.offset]}}
        if not present:
            raise UnreadableSample(path, "no pixel is labelled")
        absent = np.zeros(label.shape, bool)
        return image, {
            name: np.isin(label, [number - self.offset for number in numbers]) if numbers & present else absent
            for name, numbers in self._numbers.items()
        }

    def name(self, index: int) -> str:
        return f"{self._stems[index]}.jpg"


def read_label(path: Path) -> np.ndarray:
    """Pixel values of a grayscale PNG, or palette indices of a palette PNG."""
    try:
        with Image.open(path) as label:
            if label.mode not in ("L", "P"):
                raise ValueError(f"a label PNG must be grey (mode L) or have a palette (P); got mode {label.mode}")
            return np.asarray(label)
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableSample(path, f"{type(error).__name__}: {error}") from error


def possible_values(offset: int) -> set[int]:
    """The possible pixel values of label maps, if the number of a class is its pixel value + `offset`."""
    return {number - offset for number in range(1, LAST_NUMBER + 1) if number not in NEVER_LABELED} | {
        UNLABELED[offset]
    }


def class_numbers(labels: str) -> dict[str, set[int]]:
    """The numbers of each class by its readable name, from lines "171: wall-brick"."""
    numbers: dict[str, int] = {}
    for line in labels.splitlines():
        key, _, label = line.partition(": ")
        if label.strip() and int(key) not in NEVER_LABELED | {0}:
            numbers[label.strip()] = int(key)
    if not numbers:
        raise ValueError("no such line")
    found = {}
    for label, number in numbers.items():
        family = label.removesuffix("other") if label.endswith("-other") else "\0"
        found[readable_name(label)] = {number} | {n for kind, n in numbers.items() if kind.startswith(family)}
    return found
