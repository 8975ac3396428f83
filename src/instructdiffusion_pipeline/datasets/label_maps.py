"""Semantic segmentation with one label map per image: COCO-Stuff, ADE20K, PASCAL-Context, PASCAL VOC."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    UnreadableSample,
    is_file_name,
    read_annotations,
    read_image,
    require_samples,
)
from instructdiffusion_pipeline.types import LabeledMasks

UNLABELED = {1: 255, 0: 0}  # the value of such a pixel in COCO-Stuff, by the offset from values to class numbers
LAST_NUMBER = 182
PROBED = 100  # number of label maps to check when COCO-Stuff is opened
# These classes were never annotated (eye glasses, window, mirror ...), so an image may contain them without a label.
NEVER_LABELED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
READABLE_NAMES = {
    "playingfield": "playing field",
    "structural-other": "structure",
    "waterdrops": "water drops",
    "window-blind": "window blind",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
CONTEXT_CLASSES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building", "bus",
    "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog", "door", "fence",
    "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse",
    "person", "plate", "platform", "potted plant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky",
    "snow", "sofa", "table", "track", "train", "tree", "truck", "tv monitor", "wall", "water", "window", "wood",
)  # fmt: skip
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
# "2: building, edifice", or a row of ADE20K's objectInfo150.txt with the number first and the names last
CLASS_LINE = re.compile(r"\s*(\d+)\s*(?::|\t.*\t)\s*(.*\S)\s*")

Classes = Mapping[str, set[int]]  # the numbers of each class by its name


class LabelMaps:
    """Images {pictures}/*.jpg, each with a label map {labels}/*{suffix}.

    A pixel with the value v belongs to the class with the number v + `offset`. The annotation has a mask for each
    class; absent classes share one empty mask.

    Args:
        pictures: the folder of the images.
        labels: the folder of the label maps: .png (8 bits, gray or with a palette) or .tif (16 bits).
        classes: the numbers of each class.
        unlabeled: values of pixels whose class is unknown; metrics ignore these pixels.
        background: values of pixels that are known to belong to none of the classes. Any other value without a class
            makes a label map unreadable.
        offset: the difference between class number and pixel value.
        suffix: the file name extension of the label maps.
        stems: the images to read, without ".jpg"; None: all of the folder.
    """

    def __init__(
        self,
        pictures: Path,
        labels: Path,
        classes: Classes,
        unlabeled: set[int],
        offset: int = 0,
        suffix: str = ".png",
        stems: Sequence[str] | None = None,
        background: Set[int] = frozenset(),
    ):
        self.folder, self.labels, self.suffix, self.offset = pictures, labels, suffix, offset
        self.skipped = Skipped()
        self._values = {name: {number - offset for number in numbers} for name, numbers in classes.items()}
        self._unlabeled, self._background = unlabeled, background
        self._stems = []
        labeled = [path.stem for path in labels.glob(f"*{suffix}")]
        for stem in sorted({path.stem for path in pictures.glob("*.jpg")}.union(labeled) if stems is None else stems):
            if not is_file_name(stem):
                self.skipped.append((repr(stem), "a malformed name"))
            elif not os.path.isfile(pictures / f"{stem}.jpg"):
                self.skipped.append((f"{stem}{suffix}", "a missing file"))
            elif not os.path.isfile(labels / f"{stem}{suffix}"):
                self.skipped.append((f"{stem}.jpg", f"no label {suffix[1:].upper()}"))
            else:
                self._stems.append(stem)
        require_samples(pictures, self._stems, self.skipped)

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, index: int) -> tuple[Image.Image, LabeledMasks]:
        path = self.labels / f"{self._stems[index]}{self.suffix}"
        image = read_image(self.folder / f"{self._stems[index]}.jpg", turn=False)
        label = read_label(path)
        if label.shape != (image.height, image.width):
            raise UnreadableSample(path, f"is of {label.shape[::-1]} pixels, its image of {image.size}")
        present = set(np.unique(label).tolist()) - self._unlabeled
        if strange := sorted(present.difference(self._background, *self._values.values())):
            raise UnreadableSample(path, f"has values that belong to no class, such as {strange[0]}")
        labeled = ~np.isin(label, list(self._unlabeled))
        if not labeled.any():
            raise UnreadableSample(path, "no pixel is labeled")
        absent = np.zeros(label.shape, bool)
        masks = {
            name: np.isin(label, list(values)) if values & present else absent for name, values in self._values.items()
        }
        return image, LabeledMasks(masks, labeled)

    def name(self, index: int) -> str:
        return f"{self._stems[index]}.jpg"


class CocoStuff(LabelMaps):
    """COCO-Stuff: images/{split}/*.jpg, annotations/{split}/*.png, labels.txt; splits train2017, val2017.

    A pixel of value v belongs to the class with the number v + 1 in labels.txt; 255 is unlabeled. Label maps that
    contain the numbers themselves, with 0 for unlabeled pixels, are also recognized, by the numbers that never occur
    (`offset` is then 0 instead of 1). An "-other" class includes its subclasses: "wall" includes brick walls.
    """

    def __init__(self, root: str | PathLike[str], split: str = "train2017"):
        folder = Path(root)
        labels = folder / "annotations" / split
        classes = read_annotations(folder / "labels.txt", 'lines like "171: wall-brick"', class_numbers)
        offset = find_offset(sorted(labels.glob("*.png")), set().union(*classes.values()))
        unnamed = possible_values(offset).difference({number - offset for of in classes.values() for number in of})
        super().__init__(folder / "images" / split, labels, classes, unnamed, offset)


def ade20k_150(root: str | PathLike[str], split: str = "training") -> LabelMaps:
    """ADE20K, 150 classes (ADEChallengeData2016): images/{split}/, annotations/{split}/, objectInfo150.txt.

    Splits training, validation.
    """
    folder = Path(root)
    classes = read_annotations(folder / "objectInfo150.txt", "ADE20K's table of 150 classes", numbered_classes)
    return LabelMaps(folder / "images" / split, folder / "annotations" / split, classes, {0})


def ade20k_847(root: str | PathLike[str], split: str = "training") -> LabelMaps:
    """ADE20K, 847 classes: images_detectron2/{split}/, annotations_detectron2/{split}/*.tif, labels.txt.

    The format is that of ADE20K_2021_17_01 converted by MaskFormer's prepare_ade20k_full_sem_seg.py. labels.txt has
    lines such as "2:building,edifice", like OpenSeg's ade20k_847.txt. Splits training, validation.
    """
    folder = Path(root)
    pictures, labels = (folder / f"{kind}_detectron2" / split for kind in ("images", "annotations"))
    return LabelMaps(pictures, labels, named_classes(folder), {65535}, 1, ".tif")


def pascal_context_59(root: str | PathLike[str], split: str = "training") -> LabelMaps:
    """PASCAL-Context, 59 classes: images/{split}/, annotations_ctx59/{split}/*.png, as converted by ODISE.

    Splits training, validation.
    """
    folder = Path(root)
    classes = {name: {number} for number, name in enumerate(CONTEXT_CLASSES)}
    return LabelMaps(folder / "images" / split, folder / "annotations_ctx59" / split, classes, {255})


def pascal_context_459(root: str | PathLike[str], split: str = "training") -> LabelMaps:
    """PASCAL-Context, 459 classes: images/{split}/, annotations_ctx459/{split}/*.tif, labels.txt.

    Label maps as converted by ODISE; labels.txt as published, with lines such as "2: aeroplane". Its class "unknown"
    is ignored. Splits training, validation.
    """
    folder = Path(root)
    classes = named_classes(folder)
    unlabeled = {65535} | {number - 1 for number in classes.pop("unknown", ())}
    return LabelMaps(folder / "images" / split, folder / "annotations_ctx459" / split, classes, unlabeled, 1, ".tif")


def voc(root: str | PathLike[str], split: str = "train") -> LabelMaps:
    """PASCAL VOC 2012, 20 classes: JPEGImages/, SegmentationClass/*.png, ImageSets/Segmentation/{split}.txt.

    Splits train, val, trainval.
    """
    folder = Path(root)
    classes = {name: {number} for number, name in enumerate(VOC_CLASSES, start=1)}
    stems = read_annotations(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "a list of images", str.split)
    labels = folder / "SegmentationClass"
    return LabelMaps(folder / "JPEGImages", labels, classes, {255}, stems=stems, background={0})


def read_label(path: Path) -> np.ndarray:
    """The values of a label map: of a grayscale PNG, palette indices of a palette PNG, or of a 16-bit TIFF."""
    try:
        with Image.open(path) as label:
            if path.suffix == ".tif" and label.mode != "I;16":
                raise ValueError(f"a label TIFF must have 16 bits (mode I;16); got mode {label.mode}")
            if path.suffix == ".png" and label.mode not in ("L", "P"):
                raise ValueError(f"a label PNG must be gray (mode L) or have a palette (P); got mode {label.mode}")
            return np.asarray(label)
    except Exception as error:  # a damaged file can raise any exception
        raise UnreadableSample(path, f"{type(error).__name__}: {error}") from error


def named_classes(folder: Path) -> dict[str, set[int]]:
    """The classes in labels.txt."""
    return read_annotations(folder / "labels.txt", 'lines like "2: building, edifice"', numbered_classes)


def numbered_classes(lines: str) -> dict[str, set[int]]:
    """The number of each class by its name, from lines "2: building, edifice" or rows of ADE20K's table.

    The name of a class is the first of its names. If several classes have the same first name, each gets its next name
    that is not the first name of any class, or keeps the first name if there is none. Classes that still have the same
    name become one.
    """
    synonyms: dict[int, list[str]] = {}
    for match in filter(None, map(CLASS_LINE.fullmatch, lines.splitlines())):
        names = [name.strip() for name in match[2].split(",") if name.strip()]
        if names and int(match[1]):
            synonyms[int(match[1])] = names
    if not synonyms:
        raise ValueError("no such line")
    first = Counter(names[0] for names in synonyms.values())
    classes = defaultdict(set)
    for number, names in synonyms.items():
        others = [] if first[names[0]] == 1 else [name for name in names[1:] if name not in first]
        name = (others or names)[0]
        classes[READABLE_NAMES.get(name, name)].add(number)
    return dict(classes)


def class_numbers(labels: str) -> dict[str, set[int]]:
    """The numbers of each class of COCO-Stuff by its readable name, from lines such as "171: wall-brick"."""
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


def readable_name(label: str) -> str:
    """Convert a label to plain words: "wall-brick" to "brick wall", "sky-other" to "sky"."""
    if label in READABLE_NAMES:
        return READABLE_NAMES[label]
    noun, _, kind = label.partition("-")
    return f"{kind} {noun}" if kind not in ("", "other", "stuff") else noun


def find_offset(labels: Sequence[Path], numbers: Set[int]) -> int:
    """The offset from pixel values to class `numbers`: 1 as in COCO-Stuff, or 0 if more label maps match that."""
    fits = {1: 0, 0: 0}
    for path in labels[:: max(1, len(labels) // PROBED)]:
        try:
            values = set(np.unique(read_label(path)).tolist())
        except UnreadableSample:
            continue
        for offset in fits:
            fits[offset] += values <= {number - offset for number in numbers} | {UNLABELED[offset]}
    return 0 if fits[0] > fits[1] else 1


def possible_values(offset: int) -> set[int]:
    """The pixel values that can occur in COCO-Stuff if the number of a class is its pixel value + `offset`."""
    return {number - offset for number in range(1, LAST_NUMBER + 1) if number not in NEVER_LABELED} | {
        UNLABELED[offset]
    }
