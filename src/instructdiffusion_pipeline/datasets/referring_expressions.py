"""Objects that a sentence names: RefCOCO, RefCOCO+, RefCOCOg (pickled references) and gRefCOCO (JSON).

Coordinates count pixels as they are stored; a file's EXIF orientation is ignored, as COCO's tools do.
"""

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    coco_pictures,
    list_records,
    missing_field,
    read_annotations,
    read_image,
    require_samples,
)
from instructdiffusion_pipeline.types import Masks

NO_TARGET = -1


class ReferringExpressions:
    """One item a reference: an object, or several, or none, with the sentences that name it.

    Args:
        references: refs(unc).p, refs(umd).p, refs(google).p or grefs(unc).json; instances.json lies beside it.
        images: the folder of COCO's train2014 pictures.
        split: as the references name it: train, val, testA, testB, test.

    The annotation gives each sentence, in lower case as the original asks it, the same mask: the union of all its
    objects and their polygons, all False where a sentence of gRefCOCO names nothing in the picture.
    """

    def __init__(self, references: str | PathLike[str], images: str | PathLike[str], split: str = "train"):
        path = Path(references)
        file = path.parent / "instances.json"
        instances = read_annotations(file, "a JSON file of COCO instances")
        self.folder, self.skipped = Path(images), Skipped()
        self._pictures = coco_pictures(instances, file, self.skipped)
        objects = {item.get("id"): item.get("segmentation") for item in list_records(instances, file, "annotations")}
        self._references: list[dict[str, Any]] = []
        self._objects: dict[int, Any] = {}
        is_json = path.suffix == ".json"
        found = read_annotations(path, "a JSON file of references") if is_json else load_plain_pickle(path)
        missing = {id for id, item in self._pictures.items() if not (self.folder / item["file_name"]).is_file()}
        for reference in list_records(found, path):
            if reference.get("split", split) != split:
                continue
            why = (
                missing_field(reference, "ref_id", "ann_id", "image_id", "split", "sentences")
                or (not sentences(reference) and "no sentence")
                or (reference["image_id"] not in self._pictures and "a picture that instances.json lacks")
                or (reference["image_id"] in missing and "a missing file")
                or missing_field(self._pictures[reference["image_id"]], "width", "height")
                or (not all(usable(objects.get(id)) for id in object_ids(reference)) and "no outline")
            )
            if why:
                self.skipped.append((f"reference {reference.get('ref_id')}", why))
            else:
                self._references.append(reference)
                self._objects |= {id: objects[id] for id in object_ids(reference)}
        require_samples(f"{path}, split {split!r}", self._references, self.skipped)

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        reference = self._references[index]
        picture = self._pictures[reference["image_id"]]
        size = picture["width"], picture["height"]
        image = read_image(self.folder / picture["file_name"], turn=False, size=size)
        mask = np.zeros((image.height, image.width), bool)
        for id in object_ids(reference):
            mask |= outline_mask(self._objects[id], image.size)
        return image, dict.fromkeys(sentences(reference), mask)

    def name(self, index: int) -> str:
        reference = self._references[index]
        return f"{self._pictures[reference['image_id']]['file_name']}, reference {reference['ref_id']}"


def object_ids(reference: dict[str, Any]) -> list[int]:
    """Ids of the objects that a reference names: one in RefCOCO, any number in gRefCOCO."""
    ids = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
    return [id for id in ids if id != NO_TARGET]


def sentences(reference: dict[str, Any]) -> list[str]:
    """What a reference's object is called, in lower case."""
    said = (sentence["sent"].strip().lower() for sentence in reference["sentences"])
    return [sentence for sentence in said if sentence]


def usable(outline: Any) -> bool:
    """Whether a COCO segmentation has an outline: run lengths, or a polygon of three corners at least."""
    return isinstance(outline, dict) or any(len(polygon) >= 6 for polygon in outline or ())


def outline_mask(outline: Any, size: tuple[int, int]) -> np.ndarray:
    """A COCO segmentation (polygons or run lengths) as bool [height, width]; needs pycocotools."""
    from pycocotools import mask

    width, height = size
    if isinstance(outline, list):
        outline = [polygon for polygon in outline if len(polygon) >= 6]
    elif isinstance(outline["counts"], str):
        return mask.decode(outline).astype(bool)
    else:
        outline = [outline]
    return mask.decode(mask.merge(mask.frPyObjects(outline, height, width))).astype(bool)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """A pickle of lists, dictionaries, strings and numbers, also of Python 2. Anything else is a ValueError."""
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise ValueError(
                f"{path}: {error}. Only pickles of lists, dictionaries, strings and numbers are read."
            ) from error
