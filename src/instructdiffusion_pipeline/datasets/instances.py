"""Segmentation of the objects in a COCO instances JSON: COCO's own, or one for your images."""

import os
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    UnreadableSample,
    coco_image_folder,
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


class AnnotatedImage(NamedTuple):
    """An image of the JSON, the outlines of its objects by category, and the categories whose mask is unknown."""

    file_name: str
    size: tuple[int, int]
    outlines: dict[str, list[RunLengths]]
    unknown: set[str]


class CocoInstances:
    """Images with the objects of a COCO instances JSON, one sample per image.

    Args:
        annotations: the JSON file.
        images: the folder of the images.

    The annotation maps each category that the JSON has objects of to the union of their masks in the image; categories
    without an object in the image share one empty mask. A category is left out of an image if the outline of one of
    its objects cannot be used, and an image is skipped if the category of one of its objects is unknown. An image with
    an EXIF orientation is unreadable, because annotation tools differ on whether outlines refer to the stored or the
    turned image. Needs pycocotools.

    Raises:
        ValueError: if the JSON is malformed, two images have the same id or file, an object belongs to no image, or no
            object has an outline that can be used.
    """

    def __init__(self, annotations: str | PathLike[str], images: str | PathLike[str]):
        content = read_annotations(Path(annotations), "a JSON file of COCO instances")
        self.folder, self.skipped = Path(images), Skipped()
        categories = read_categories(content, annotations)
        found: dict[int, AnnotatedImage] = {}
        names = set()
        pictures = coco_pictures(content, annotations, self.skipped)
        for id, picture in pictures.items():
            name = picture["file_name"]
            if name in names:
                raise ValueError(f"{annotations}: several images have the file name {name}.")
            names.add(name)
            if why := wrong_field(picture, width=is_size, height=is_size):
                self.skipped.append((name, why))
            elif not os.path.isfile(self.folder / name):
                self.skipped.append((name, "a missing file"))
            else:
                found[id] = AnnotatedImage(name, (picture["width"], picture["height"]), {}, set())

        used = set()
        for item in list_records(content, annotations, "annotations"):
            what = f"annotation {item.get('id')}"
            if why := wrong_field(item, image_id=is_id):
                raise ValueError(f"{annotations}: {what} has {why}, so any image may lack an object.")
            image = found.get(item["image_id"])
            if image is None:
                if item["image_id"] not in pictures:
                    self.skipped.append((f"{what} of image {item['image_id']}", "an image that the JSON lacks"))
                continue
            if not is_id(item.get("category_id")) or item["category_id"] not in categories:
                self.skipped.append((image.file_name, "an object of an unknown category"))
                del found[item["image_id"]]
                continue
            name = categories[item["category_id"]]
            used.add(name)
            try:
                outline = encode_outline(item.get("segmentation"), *image.size)
            except ValueError as error:
                self.skipped.append((f"{what} of {image.file_name}", str(error)))
                image.unknown.add(name)
            else:
                image.outlines.setdefault(name, []).append(outline)
        # A category without objects was not annotated; Roboflow exports the supercategory as one.
        self.skipped += [(f"category {name}", "no object") for name in sorted(set(categories.values()) - used)]
        self._categories = [name for name in dict.fromkeys(categories.values()) if name in used]
        self._images = [image for image in found.values() if not image.unknown.issuperset(self._categories)]
        usable = [image for image in self._images if image.outlines.keys() - image.unknown]
        require_samples(annotations, usable, self.skipped)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        from pycocotools import mask

        file_name, size, outlines, unknown = self._images[index]
        image = read_image(self.folder / file_name, turn=False, size=size)
        if is_turned(self.folder / file_name):
            raise UnreadableSample(self.folder / file_name, "has an EXIF orientation; save it without one")
        absent = np.zeros((image.height, image.width), bool)
        return image, {
            name: mask.decode(mask.merge(outlines[name])).astype(bool) if name in outlines else absent
            for name in self._categories
            if name not in unknown
        }

    def name(self, index: int) -> str:
        return self._images[index].file_name


def read_categories(content: Any, file: str | PathLike[str]) -> Mapping[int, str]:
    """The names of the categories of a COCO JSON by id. Raises a ValueError if one is malformed or an id repeats.

    Names that differ in case only get the spelling of the first one, because the tokenizer ignores case.
    """
    categories: dict[int, str] = {}
    spelling: dict[str, str] = {}
    for item in list_records(content, file, "categories"):
        why = wrong_field(item, id=is_id, name=lambda name: is_text(name) and bool(name.strip()))
        if why or item["id"] in categories:
            raise ValueError(f"{file}: the category {item} has {why or 'an id that another one has'}.")
        name = item["name"].strip()
        categories[item["id"]] = spelling.setdefault(name.lower(), name)
    return categories


def is_turned(path: Path) -> bool:
    """Whether an image has an EXIF orientation other than upright."""
    with Image.open(path) as image, suppress(Exception):  # a damaged EXIF block can raise any exception
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def coco_instances(root: str | PathLike[str], split: str = "train2017") -> CocoInstances:
    """COCO: annotations/instances_{split}.json, and images in {split}/ or images/{split}/."""
    return CocoInstances(Path(root, "annotations", f"instances_{split}.json"), coco_image_folder(root, split))
