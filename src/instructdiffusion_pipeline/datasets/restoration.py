"""Paired folders of degraded and clean images: GoPro, REDS (blur), SIDD (noise), CLWD (watermarks)."""

import re
from os import PathLike
from pathlib import Path

from PIL import Image

from instructdiffusion_pipeline.datasets import Skipped, UnreadableSample, files_below, read_image, require_samples

SUFFIXES = {".png", ".jpg", ".jpeg"}


class PairedImages:
    """Pairs of a degraded image and its clean image. The clean image is the annotation.

    Args:
        folder: searched recursively.
        patterns: pairs of a regular expression for the path of a degraded image, relative to `folder`, with forward
            slashes, and the path of its clean image, with \\1, \\2 for the expression's groups. The first pattern
            whose clean image exists is used.
    """

    def __init__(self, folder: str | PathLike[str], *patterns: tuple[str, str]):
        self.folder, self.skipped = Path(folder), Skipped()
        self._pairs: list[tuple[str, str]] = []
        files = files_below(self.folder)
        for path in sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES):
            matches = [(match, clean) for degraded, clean in patterns if (match := re.fullmatch(degraded, path))]
            clean_path = next((found for match, clean in matches if (found := match.expand(clean)) in files), None)
            if clean_path:
                self._pairs.append((path, clean_path))
            elif matches:
                self.skipped.append((path, "no clean image"))
        require_samples(self.folder, self._pairs, self.skipped)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, clean = (read_image(self.folder / path) for path in self._pairs[index])
        if image.size != clean.size:
            raise UnreadableSample(
                self.folder / self._pairs[index][0], f"is of {image.size} pixels, its clean image of {clean.size}"
            )
        return image, clean

    def name(self, index: int) -> str:
        return self._pairs[index][0]


def gopro(root: str | PathLike[str], split: str = "train", gamma: bool = False) -> PairedImages:
    """GoPro: {split}/{clip}/blur/*.png and sharp/, or with `gamma` blur_gamma/; also {split}/input/ and target/."""
    root = Path(root)
    if (root / split / "input").is_dir():
        return PairedImages(root / split, (r"input/(.+)", r"target/\1"))
    return PairedImages(root / split, (rf"(.+)/{'blur_gamma' if gamma else 'blur'}/(.+)", r"\1/sharp/\2"))


def reds(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """REDS: {split}/{split}_blur/{clip}/*.png and {split}_sharp/; also {split}/blur/ and sharp/.

    Also {split}_blur_jpeg/{clip}/*.jpg, with the same clean images. If both folders exist, both are read.
    """
    blurred = rf"((?:{split}_)?)blur(?:_jpeg)?"
    return PairedImages(
        Path(root) / split, (rf"{blurred}/(.+)", r"\1sharp/\2"), (rf"{blurred}/(.+)\.jpg", r"\1sharp/\2.png")
    )


def sidd(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """SIDD, sRGB: Data/{scene}/*NOISY*.PNG and *GT*.PNG as published, for train; also {split}/input/ and gt/.

    Also {split}/input_crops/ and gt_crops/. Files of a pair have the same name, or NOISY in one and GT in the other.

    All of Data/ is the training split. For validation, convert SIDD's blocks (.mat files) to PNG files in val/input/
    and val/gt/.
    """
    root = Path(root)
    if (root / "Data").is_dir() and split == "train":
        return PairedImages(root / "Data", (r"(.*)NOISY(.*)", r"\1GT\2"))
    if (root / "Data").is_dir() and not any((root / split / name).is_dir() for name in ("input", "input_crops")):
        raise ValueError(
            f"`split` is {split!r}, but {root / 'Data'} is the split 'train'. Put the PNG files of {split!r} into"
            f" {root / split / 'input'} and {root / split / 'gt'}."
        )
    return PairedImages(
        root / split, (r"input(|_crops)/(.+)", r"gt\1/\2"), (r"input(|_crops)/(.*)NOISY(.*)", r"gt\1/\2GT\3")
    )


def clwd(root: str | PathLike[str], split: str = "train") -> PairedImages:
    """CLWD: {split}/Watermarked_image/*.jpg and Watermark_free_image/; splits train, test."""
    root = Path(root)
    return PairedImages(root / split, (r"Watermarked_image/(.+)", r"Watermark_free_image/\1"))
