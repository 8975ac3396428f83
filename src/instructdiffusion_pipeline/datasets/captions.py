"""Images with captions, for the adaptation stage: img2dataset's folders (LAION and others) and COCO's captions."""

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from instructdiffusion_pipeline.datasets import (
    ReducibleImages,
    Skipped,
    coco_image_folder,
    coco_pictures,
    files_below,
    is_id,
    list_records,
    read_annotations,
    require_samples,
)
from instructdiffusion_pipeline.pipeline_instruct_diffusion import is_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class CaptionedPictures(ReducibleImages):
    """Images with captions as annotations, from pairs of an image path relative to `folder` and a caption."""

    def __init__(self, folder: str | PathLike[str], captions: Iterable[tuple[str, Any]]):
        self.folder, self.skipped = Path(folder), Skipped()
        files = files_below(self.folder)
        self._captions: list[tuple[str, str]] = []
        for path, caption in captions:
            if path not in files:
                self.skipped.append((path, "a missing file"))
            elif not is_text(caption) or not caption.strip():
                self.skipped.append((path, "no caption"))
            else:
                self._captions.append((path, " ".join(caption.split())))
        require_samples(self.folder, self._captions, self.skipped)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        path, caption = self._captions[index]
        return self._read_image(self.folder / path), caption

    def name(self, index: int) -> str:
        return self._captions[index][0]


def img2dataset(root: str | PathLike[str]) -> CaptionedPictures:
    """The output of img2dataset with output_format="files": {shard}/{key}.jpg (.png, .webp) and {shard}/{key}.txt."""
    root = Path(root)
    pictures = sorted(path for path in files_below(root) if path.lower().endswith(SUFFIXES))
    return CaptionedPictures(root, ((path, caption_beside(root / path)) for path in pictures))


def caption_beside(picture: Path) -> str:
    """The text in the file of an image's caption; empty if there is no file, or it cannot be read."""
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""


def coco_captions(root: str | PathLike[str], split: str = "train2017") -> CaptionedPictures:
    """COCO: annotations/captions_{split}.json; images in {split}/ or images/{split}/. One sample per caption."""
    root = Path(root)
    file = root / "annotations" / f"captions_{split}.json"
    about = read_annotations(file, "a JSON file of captions")
    pictures = coco_pictures(about, file, skipped := Skipped())

    def captions() -> Iterator[tuple[str, Any]]:
        for item in list_records(about, file, "annotations"):
            picture = pictures.get(item["image_id"]) if is_id(item.get("image_id")) else None
            yield picture["file_name"] if picture else f"image {item.get('image_id')}", item.get("caption")

    data = CaptionedPictures(coco_image_folder(root, split), captions())
    data.skipped[:0] = skipped
    return data
