"""Degraded pictures and their clean ones, in folders: GoPro, REDS (blur), SIDD (noise), CLWD (watermarks)."""

import re
from os import PathLike
from pathlib import Path

from PIL import Image

from instructdiffusion_pipeline.datasets import Skipped, UnreadableSample, files_below, read_image, require_samples

SUFFIXES = {".png", ".jpg", ".jpeg"}


class PairedImages:
    """Pairs below `folder`: the annotation is the clean picture.

    Args:
        folder: where to look, at any depth.
        degraded: regular expression for the path of a degraded picture, from `folder`, with forward slashes.
        clean: the path of its clean one, with \\1, \\2 for the expression's groups.
    """

    def __init__(self, folder: str | PathLike[str], degraded: str, clean: str):
        self.folder, self.skipped = Path(folder), Skipped()
        self._pairs: list[tuple[str, str]] = []
        files = files_below(self.folder)
        for path in sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES):
            match = re.fullmatch(degraded, path)
            if match and match.expand(clean) in files:
                self._pairs.append((path, match.expand(clean)))
            elif match:
                self.skipped.append((path, "no clean picture"))
        require_samples(self.folder, self._pairs, self.skipped)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, clean = (read_image(self.folder / path) for path in self._pairs[index])
        if image.size != clean.size:
            raise UnreadableSample(
                self.folder / self._pairs[index][0], f"is of {image.size} pixels, its clean picture of {clean.size}"
            )
        return image, clean

    def name(self, index: int) -> str:
        return self._pairs[index][0]


def gopro(root: str | PathLike[str], split: str = "train", gamma: bool = False) -> PairedImages:
    """GoPro: {split}/{clip}/blur/*.png and sharp/, or with `gamma` blur_gamma/; also {split}/input/ and target/."""
    root = Path(root)
    if (root / split / "input").is_dir():
        return PairedImages(root / split, r"input/(.+)", r"target/\1")
    return PairedImages(root / split, rf"(.+)/{'blur_gamma' if gamma else 'blur'}/(.+)", r"\1/sharp/\2")


def reds(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """REDS: {split}/{split}_blur/{clip}/*.png and {split}_sharp/; also {split}/blur/ and sharp/."""
    root = Path(root)
    return PairedImages(root / split, rf"((?:{split}_)?)blur/(.+)", r"\1sharp/\2")


def sidd(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """SIDD, sRGB: Data/{scene}/*NOISY*.PNG and *GT*.PNG as published, for train; also {split}/input/ and gt/.

    Nothing of Data/ is held out, because SIDD publishes all of it for training, and models are trained on all of it.
    For validation it publishes blocks in .mat files; as PNGs they go to val/input/ and val/gt/, beside Data/ or not.
    """
    root = Path(root)
    if (root / "Data").is_dir() and split == "train":
        return PairedImages(root / "Data", r"(.*)NOISY(.*)", r"\1GT\2")
    if (root / "Data").is_dir() and not (root / split / "input").is_dir():
        raise ValueError(
            f"`split` must be train, which {root / 'Data'} is published for, or have pictures in"
            f" {root / split / 'input'} and gt; got {split!r}."
        )
    return PairedImages(root / split, r"input/(.+)", r"gt/\1")


def clwd(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """CLWD: {split}/Watermarked_image/*.jpg and Watermark_free_image/; splits train, test."""
    root = Path(root)
    return PairedImages(root / split, r"Watermarked_image/(.+)", r"Watermark_free_image/\1")
