"""Referring expression segmentation: RefCOCO, RefCOCO+, RefCOCOg, RefClef (pickled references) and gRefCOCO (JSON).

Coordinates count pixels as they are stored; a file's EXIF orientation is ignored, as COCO's tools do.
"""

import os
import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    coco_pictures,
    is_id,
    is_list_of,
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

NO_TARGET = -1


class ReferringExpressions:
    """One sample per reference: zero or more objects and the expressions that refer to them.

    Args:
        references: refs(unc).p, refs(umd).p, refs(google).p or grefs(unc).json, in a folder with instances.json.
        images: the folder of COCO's train2014 images; for RefClef, of the images of saiapr_tc-12.
        split: train, val, test, testA, testB or testC, as in the official reader (refer.py): test has all references
            whose split begins with "test", and testA those of testA, testAB and testAC.

    The annotation maps each expression, in lower case as in the original code, to the union of the masks of its
    objects. The mask is empty if an expression of gRefCOCO has no target. Needs pycocotools.
    """

    def __init__(self, references: str | PathLike[str], images: str | PathLike[str], split: str = "train"):
        path = Path(references)
        file = path.parent / "instances.json"
        instances = read_annotations(file, "a JSON file of COCO instances")
        self.folder, self.skipped = Path(images), Skipped()
        self._pictures = coco_pictures(instances, file, self.skipped)
        objects = {
            item["id"]: item for item in list_records(instances, file, "annotations") if is_any_id(item.get("id"))
        }
        self._references: list[dict[str, Any]] = []
        self._outlines: dict[int | str, RunLengths] = {}
        is_json = path.suffix == ".json"
        found = read_annotations(path, "a JSON file of references") if is_json else load_plain_pickle(path)
        missing = {id for id, item in self._pictures.items() if not os.path.isfile(self.folder / item["file_name"])}
        for reference in list_records(found, path):
            if is_text(reference.get("split")) and not in_split(reference["split"], split):
                continue
            why = (
                wrong_field(
                    reference,
                    ref_id=is_any_id,
                    ann_id=are_any_ids,
                    image_id=is_id,
                    split=is_text,
                    sentences=are_sentences,
                )
                or (not sentences(reference) and "no sentence")
                or (reference["image_id"] not in self._pictures and "an image that instances.json lacks")
                or (reference["image_id"] in missing and "a missing file")
                or wrong_field(self._pictures[reference["image_id"]], width=is_size, height=is_size)
                or self._add_outlines(reference, objects)
            )
            if why:
                self.skipped.append((f"reference {reference.get('ref_id')}", why))
            else:
                self._references.append(reference)
        require_samples(f"{path}, split {split!r}", self._references, self.skipped)

    def _add_outlines(self, reference: dict[str, Any], objects: dict[int | str, dict[str, Any]]) -> str:
        """Encode a reference's outlines. Returns the reason if one cannot be used, or an empty string."""
        picture = self._pictures[reference["image_id"]]
        for id in object_ids(reference):
            if id not in objects:
                return "an object that instances.json lacks"
            if objects[id].get("image_id") != reference["image_id"]:
                return "an object of another image"
            if id not in self._outlines:
                try:
                    outline = objects[id].get("segmentation")
                    self._outlines[id] = encode_outline(outline, picture["width"], picture["height"])
                except ValueError as error:
                    return str(error)
        return ""

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, index: int) -> tuple[Image.Image, Masks]:
        from pycocotools import mask

        reference = self._references[index]
        picture = self._pictures[reference["image_id"]]
        size = picture["width"], picture["height"]
        image = read_image(self.folder / picture["file_name"], turn=False, size=size)
        outlines = [self._outlines[id] for id in object_ids(reference)]
        absent = np.zeros((image.height, image.width), bool)
        union = mask.decode(mask.merge(outlines)).astype(bool) if outlines else absent
        return image, dict.fromkeys(sentences(reference), union)

    def name(self, index: int) -> str:
        reference = self._references[index]
        return f"{self._pictures[reference['image_id']]['file_name']}, reference {reference['ref_id']}"


def in_split(own: str, split: str) -> bool:
    """Whether a reference of the split `own`, such as testAB, is in `split`."""
    if split == "test":
        return own.startswith("test")
    if split in ("testA", "testB", "testC"):
        return own.startswith("test") and split[-1] in own
    return own == split


def is_any_id(value: Any) -> bool:
    """Whether a value of a file is an id of a reference or an object: a number, or text in RefClef."""
    return is_id(value) or is_text(value)


def are_any_ids(value: Any) -> bool:
    """Whether a value of a file is the id of an object, or a list of ids."""
    return is_any_id(value) or bool(value) and is_list_of(is_any_id)(value)


def are_sentences(value: Any) -> bool:
    """Whether a value of a file is a list of sentences: objects whose "sent" is text."""
    return is_list_of(lambda sentence: isinstance(sentence, dict) and is_text(sentence.get("sent")))(value)


def object_ids(reference: dict[str, Any]) -> list[int | str]:
    """Ids of the objects that a reference names: one in RefCOCO, any number in gRefCOCO."""
    ids = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
    return [id for id in ids if id != NO_TARGET]


def sentences(reference: dict[str, Any]) -> list[str]:
    """The expressions of a reference, in lower case."""
    said = (sentence["sent"].strip().lower() for sentence in reference["sentences"])
    return [sentence for sentence in said if sentence]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed")


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of lists, dictionaries, strings and numbers, also of Python 2. Others raise a ValueError."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a damaged pickle can raise any exception
            raise ValueError(
                f"{path}: {error}. Only pickles of lists, dictionaries, strings and numbers are read."
            ) from error
