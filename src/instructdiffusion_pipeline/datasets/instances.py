"""Segmentation of the objects in a COCO instances JSON: COCO's own, or one for your images."""

import os
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    coco_images,
    coco_pictures,
    is_id,
    is_size,
    list_records,
    read_annotations,
    read_image,
    require_samples,
    wrong_field,
)
from instructdiffusion_pipeline.datasets.outlines import RunLengths, encode_outline
from instructdiffusion_pipeline.pipeline_instruct_diffusion import is_text
from instructdiffusion_pipeline.types import Masks


class CocoInstances:
    """Images with the objects of a COCO instances JSON, one sample per image.

    Args:
        annotations: the JSON file.
        images: the folder of the images.

    The annotation maps each category of the JSON to the union of the masks of its objects; absent categories share one
    empty mask. A category is left out of an image in which one of its objects is a crowd, whose outline is coarse, or
    has an outline that cannot be used. Coordinates count pixels as they are stored; a file's EXIF orientation is
    ignored, as COCO's tools do. Needs pycocotools.
    """

    def __init__(self, annotations: str | PathLike[str], images: str | PathLike[str]):
        content = read_annotations(Path(annotations), "a JSON file of COCO instances")
        self.folder, self.skipped = Path(images), Skipped()
        categories: dict[int, str] = {}
        for item in list_records(content, annotations, "categories"):
            if why := wrong_field(item, id=is_id, name=is_text):
                self.skipped.append((f"category {item.get('name') or item.get('id')}", why))
            else:
                categories[item["id"]] = item["name"]
        pictures = coco_pictures(content, annotations, self.skipped)
        # The outlines of each category by image; None if the mask of the category is unknown.
        outlines: dict[int, dict[str, list[RunLengths] | None]] = {}
        for id, picture in pictures.items():
            missing = not os.path.isfile(self.folder / picture["file_name"])
            if why := wrong_field(picture, width=is_size, height=is_size) or ("a missing file" if missing else ""):
                self.skipped.append((picture["file_name"], why))
            else:
                outlines[id] = {name: [] for name in categories.values()}
        for item in list_records(content, annotations, "annotations"):
            unusable = (
                wrong_field(item, image_id=is_id, category_id=is_id)
                or (item["image_id"] not in pictures and "an image that the JSON lacks")
                or (item["category_id"] not in categories and "a category that the JSON lacks")
            )
            if not unusable and (found := outlines.get(item["image_id"])):
                unusable = add_outline(item, found, categories[item["category_id"]], pictures[item["image_id"]])
            if unusable:
                self.skipped.append((f"annotation {item.get('id')} of image {item.get('image_id')}", unusable))
        self._samples = []
        for id, found in outlines.items():
            known = {name: parts for name, parts in found.items() if parts is not None}
            if known:
                self._samples.append((pictures[id], known))
        require_samples(annotations, self._samples, self.skipped)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        from pycocotools import mask

        picture, found = self._samples[index]
        size = picture["width"], picture["height"]
        image = read_image(self.folder / picture["file_name"], turn=False, size=size)
        absent = np.zeros((image.height, image.width), bool)
        return image, {
            name: mask.decode(mask.merge(parts)).astype(bool) if parts else absent for name, parts in found.items()
        }

    def name(self, index: int) -> str:
        return self._samples[index][0]["file_name"]


def add_outline(
    item: dict[str, Any], outlines: dict[str, list[RunLengths] | None], name: str, picture: dict[str, Any]
) -> str:
    """Add the outline of an object to those of the category `name`. Returns the reason if it cannot be used, or ""."""
    try:
        if item.get("iscrowd"):
            raise ValueError("a crowd")
        outline = encode_outline(item.get("segmentation"), picture["width"], picture["height"])
    except ValueError as error:
        outlines[name] = None
        return str(error)
    if (parts := outlines[name]) is not None:
        parts.append(outline)
    return ""


def coco_instances(root: str | PathLike[str], split: str = "train2017") -> CocoInstances:
    """COCO: annotations/instances_{split}.json, and images in {split}/ or images/{split}/."""
    return CocoInstances(Path(root, "annotations", f"instances_{split}.json"), coco_images(Path(root), split))
