"""Every pixel's class as a PNG beside each picture: COCO-Stuff."""

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

UNLABELED = 255
# COCO drew these things in no picture (eye glasses, window, mirror ...): a picture may well show what has no mask.
NEVER_LABELED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
READABLE_NAMES = {
    "playingfield": "playing field",
    "structural-other": "structure",
    "waterdrops": "water drops",
    "window-blind": "window blind",
}


def readable_name(label: str) -> str:
    """A label as a person would say it: "wall-brick" is a brick wall, "sky-other" the sky."""
    if label in READABLE_NAMES:
        return READABLE_NAMES[label]
    noun, _, kind = label.partition("-")
    return f"{kind} {noun}" if kind not in ("", "other", "stuff") else noun


class CocoStuff:
    """COCO-Stuff: images/{split}/*.jpg, annotations/{split}/*.png, labels.txt; splits train2017, val2017.

    A pixel of value v is of the class that labels.txt gives the number v + 1; 255 is unlabeled. The annotation has a
    mask for each class, those the picture lacks included: these share one mask that is all False. A general class
    covers its kinds: "wall-other", said as "wall", is every wall, brick walls too.
    """

    def __init__(self, root: str | PathLike[str], split: str = "train2017"):
        self.folder, self.skipped = Path(root) / "images" / split, Skipped()
        self.labels = Path(root) / "annotations" / split
        self._values = read_annotations(Path(root) / "labels.txt", 'lines like "171: wall-brick"', pixel_values)
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

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        path = self.labels / f"{self._stems[index]}.png"
        image = read_image(self.folder / f"{self._stems[index]}.jpg", turn=False)
        label = read_label(path)
        if label.shape != (image.height, image.width):
            raise UnreadableSample(path, f"is of {label.shape[::-1]} pixels, its picture of {image.size}")
        present = set(np.unique(label).tolist()) - {UNLABELED}
        if not present:
            raise UnreadableSample(path, "no pixel is labelled")
        absent = np.zeros(label.shape, bool)
        return image, {
            name: np.isin(label, list(values)) if values & present else absent for name, values in self._values.items()
        }

    def name(self, index: int) -> str:
        return f"{self._stems[index]}.jpg"


def read_label(path: Path) -> np.ndarray:
    """The values of a grey PNG, or of one with a palette the indices: its colours only serve the eye."""
    try:
        with Image.open(path) as label:
            if label.mode not in ("L", "P"):
                raise ValueError(f"a label PNG must be grey (mode L) or have a palette (P); got mode {label.mode}")
            return np.asarray(label)
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableSample(path, f"{type(error).__name__}: {error}") from error


def pixel_values(labels: str) -> dict[str, set[int]]:
    """The pixel values of each class by its spoken name, from lines "171: wall-brick"."""
    numbers: dict[str, int] = {}
    for line in labels.splitlines():
        key, _, label = line.partition(": ")
        if label and int(key) not in NEVER_LABELED | {0}:
            numbers[label.strip()] = int(key)
    values = {}
    for label, number in numbers.items():
        family = label.removesuffix("other") if label.endswith("-other") else "\0"
        values[readable_name(label)] = {number - 1} | {n - 1 for kind, n in numbers.items() if kind.startswith(family)}
    return values
