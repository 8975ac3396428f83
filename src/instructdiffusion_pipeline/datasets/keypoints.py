"""People, animals and their joints: COCO's keypoint JSON (COCO, CrowdPose, ...) and MPII's own JSON.

Coordinates count pixels as they are stored; a file's EXIF orientation is ignored, as COCO's tools do.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    LARGEST_NUMBER,
    Skipped,
    coco_image_folder,
    coco_pictures,
    is_file_name,
    is_id,
    is_list_of,
    is_number,
    is_size,
    list_records,
    read_annotations,
    read_image,
    require_samples,
    wrong_field,
)
from instructdiffusion_pipeline.tasks.keypoints import BOX_PADDING, COCO_JOINTS
from instructdiffusion_pipeline.types import Joint, Joints

CROWDPOSE_JOINTS = (
    "left shoulder", "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist", "left hip",
    "right hip", "left knee", "right knee", "left ankle", "right ankle", "head top", "neck",
)  # fmt: skip
AIC_JOINTS = (
    "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist", "right hip",
    "right knee", "right ankle", "left hip", "left knee", "left ankle", "head top", "neck",
)  # fmt: skip
MPII_JOINTS = (
    "right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "pelvis", "thorax", "upper neck",
    "head top", "right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist",
)  # fmt: skip

# OKS sigmas: the standard deviation of annotations of a joint, relative to the square root of the person's area. Those
# of COCO and HumanArt are from pycocotools. Those of CrowdPose and AI Challenger (the same 14 joints) are from
# crowdposetools and from AI_Challenger_2017's keypoint_eval.py, which stores 2 * sigma. Those of AP-10K are from its
# authors' configs/_base_/datasets/ap10k.py (an early version of it in mmpose has COCO's order of joints).
COCO_SIGMAS: dict[str, float] = {
    "nose": 0.026, "left eye": 0.025, "right eye": 0.025, "left ear": 0.035, "right ear": 0.035,
    "left shoulder": 0.079, "right shoulder": 0.079, "left elbow": 0.072, "right elbow": 0.072, "left wrist": 0.062,
    "right wrist": 0.062, "left hip": 0.107, "right hip": 0.107, "left knee": 0.087, "right knee": 0.087,
    "left ankle": 0.089, "right ankle": 0.089,
}  # fmt: skip
CROWDPOSE_SIGMAS: dict[str, float] = {
    "left shoulder": 0.079, "right shoulder": 0.079, "left elbow": 0.072, "right elbow": 0.072, "left wrist": 0.062,
    "right wrist": 0.062, "left hip": 0.107, "right hip": 0.107, "left knee": 0.087, "right knee": 0.087,
    "left ankle": 0.089, "right ankle": 0.089, "head top": 0.079, "neck": 0.079,
}  # fmt: skip
AIC_SIGMAS: dict[str, float] = {
    "right shoulder": 0.01388152, "right elbow": 0.01515228, "right wrist": 0.01057665, "left shoulder": 0.01417709,
    "left elbow": 0.01497891, "left wrist": 0.01402144, "right hip": 0.03909642, "right knee": 0.03686941,
    "right ankle": 0.01981803, "left hip": 0.03843971, "left knee": 0.03412318, "left ankle": 0.02415081,
    "head top": 0.01291456, "neck": 0.01236173,
}  # fmt: skip
AP10K_SIGMAS: dict[str, float] = {
    "left eye": 0.025, "right eye": 0.025, "nose": 0.026, "neck": 0.035, "root of tail": 0.035, "left shoulder": 0.079,
    "left elbow": 0.072, "left front paw": 0.062, "right shoulder": 0.079, "right elbow": 0.072,
    "right front paw": 0.062, "left hip": 0.107, "left knee": 0.087, "left back paw": 0.089, "right hip": 0.107,
    "right knee": 0.087, "right back paw": 0.089,
}  # fmt: skip

UNIT = 200  # pixels per unit of `scale` in MPII and HRNet
CROWDPOSE_FILL = 0.53  # ratio of person area to box area in CrowdPose's evaluation; its JSON has no areas
AIC_FILL = 1.0  # the same ratio in AI Challenger's evaluation


@dataclass(frozen=True)
class Person:
    """One person in an image. Coordinates are in image pixels; (0, 0) is the center of the top-left pixel.

    The person lies in the square around `center` (x, y) whose width and height are `scale`, in units of 200 pixels.
    `area` is the area of the person's outline (None in MPII, which has no outlines). `image_id` and `id` are those of
    the JSON (in MPII the index of the entry).
    """

    joints: Joints
    center: tuple[float, float]
    scale: tuple[float, float]
    area: float | None
    image_id: int
    id: int


def center_and_scale(box: Sequence[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The square region, padded, around a box (left, top, width, height): what `Person` calls center and scale."""
    left, top, width, height = box
    side = max(width, height) / UNIT * BOX_PADDING
    return (left + width / 2, top + height / 2), (side, side)


class CocoKeypoints:
    """People of a COCO keypoint JSON, one sample per person.

    Args:
        annotations: the JSON file.
        images: the folder of the images.
        joints: names of the joints, in the order of the JSON's `keypoints`.
        box_fill: ratio of person area to box area, used for people without an area in the JSON.
        category: the category to read; None: all.

    A joint of visibility 0 is None; occluded joints (1) are included.
    """

    def __init__(
        self,
        annotations: str | PathLike[str],
        images: str | PathLike[str],
        joints: tuple[str, ...] = COCO_JOINTS,
        box_fill: float = CROWDPOSE_FILL,
        category: str | None = "person",
    ):
        content = read_annotations(Path(annotations), "a JSON file of COCO keypoints")
        self.folder, self.joints, self.skipped = Path(images), joints, Skipped()
        categories = list_records(content, annotations, "categories")
        read = [item.get("id") for item in categories if category is None or item.get("name") == category]
        pictures = coco_pictures(content, annotations, self.skipped)
        missing = {id for id, item in pictures.items() if not os.path.isfile(self.folder / item["file_name"])}
        kept = []
        for item in list_records(content, annotations, "annotations"):
            why = (
                wrong_field(item, id=is_id, image_id=is_id, category_id=is_id)
                or (item["category_id"] not in read and f"another category than {category or 'those listed'}")
                or (item.get("iscrowd") and "a crowd")
                or wrong_field(item, keypoints=is_list_of(is_number))
                or (not any(item["keypoints"][2::3]) and "no labeled joint")
                or (len(item["keypoints"]) != 3 * len(joints) and f"another number of joints than {len(joints)}")
                or (item["image_id"] not in pictures and "an image that the JSON lacks")
                or (item["image_id"] in missing and "a missing file")
                or wrong_field(pictures[item["image_id"]], width=is_size, height=is_size)
                or wrong_field(item, bbox=is_list_of(is_number, length=4))
                or (item.get("area") is not None and wrong_field(item, area=is_area))
                or (clean_box(item, pictures[item["image_id"]]) is None and "an empty box")
            )
            if why:
                picture = pictures.get(item["image_id"]) if is_id(item.get("image_id")) else None
                name = picture["file_name"] if picture else f"image {item.get('image_id')}"
                self.skipped.append((f"{name}, annotation {item.get('id')}", why))
            else:
                kept.append(item)
        require_samples(annotations, kept, self.skipped)
        # Arrays need less memory than lists; AI Challenger has 380,000 people.
        self._files = [pictures[item["image_id"]]["file_name"] for item in kept]
        self._sizes = np.array([[pictures[item["image_id"]][side] for side in ("width", "height")] for item in kept])
        self._ids = np.array([(item["image_id"], item["id"]) for item in kept])
        self._keypoints = np.array([item["keypoints"] for item in kept], np.float32).reshape(len(kept), -1, 3)
        self._boxes = np.array([clean_box(item, pictures[item["image_id"]]) for item in kept], np.float32)
        self._areas = np.array([area(item, box_fill) for item in kept], np.float32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Person]:
        width, height = self._sizes[index].tolist()
        image = read_image(self.folder / self._files[index], turn=False, size=(width, height))
        center, scale = center_and_scale(self._boxes[index].tolist())
        joints = named_joints(self.joints, self._keypoints[index].tolist())
        return image, Person(joints, center, scale, float(self._areas[index]), *map(int, self._ids[index]))

    def name(self, index: int) -> str:
        return f"{self._files[index]}, annotation {self._ids[index][1]}"


def is_area(value: Any) -> bool:
    """Whether a value of a file can be an area in square pixels."""
    return is_number(value, LARGEST_NUMBER**2)


def clean_box(item: dict[str, Any], picture: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """The annotation's box (left, top, width, height), clipped to the image as in the original code; None if empty."""
    left, top, width, height = item["bbox"]
    left, top = max(0, left), max(0, top)
    right = min(picture["width"] - 1, left + max(0, width - 1))
    bottom = min(picture["height"] - 1, top + max(0, height - 1))
    flat = item.get("area") is not None and item["area"] <= 0
    empty = flat or right < left or bottom < top or (right, bottom) == (left, top)
    return None if empty else (left, top, right - left, bottom - top)


def area(item: dict[str, Any], box_fill: float) -> float:
    """The person's area in square pixels from the JSON; `box_fill` times the box area if it has none."""
    return item["area"] if item.get("area") is not None else box_fill * item["bbox"][2] * item["bbox"][3]


def named_joints(names: tuple[str, ...], keypoints: list[list[float]]) -> dict[str, Joint | None]:
    """Joints by name from rows of (x, y, visibility)."""
    return {name: Joint(x, y) if seen > 0 else None for name, (x, y, seen) in zip(names, keypoints, strict=True)}


class MpiiKeypoints:
    """People of an MPII JSON as HRNet and Simple Baselines use it: train.json, valid.json; one sample per person.

    `annotations` is a list of {image, center, scale, joints [16][2], joints_vis [16]}, with coordinates from 1 as in
    Matlab. The region is moved down by 15 pixels per unit of scale and enlarged by 1.25, so that it contains all
    limbs.
    """

    def __init__(self, annotations: str | PathLike[str], images: str | PathLike[str]):
        self.folder, self.skipped = Path(images), Skipped()
        self._items: list[tuple[int, dict[str, Any]]] = []
        content = read_annotations(Path(annotations), "a JSON file of MPII people")
        for place, item in enumerate(list_records(content, annotations)):
            why = (
                wrong_field(
                    item,
                    image=is_file_name,
                    center=is_list_of(is_number, length=2),
                    scale=is_number,
                    joints=is_list_of(is_list_of(is_number, length=2), length=len(MPII_JOINTS)),
                    joints_vis=is_list_of(is_number, length=len(MPII_JOINTS)),
                )
                or (item["center"][0] < 0 and "no center")
                or (item["scale"] < 1 / UNIT and "no scale")
                or (not any(item["joints_vis"]) and "no labeled joint")
                or (not os.path.isfile(self.folder / item["image"]) and "a missing file")
            )
            if why:
                self.skipped.append((f"{item.get('image')}, annotation {place}", why))
            else:
                self._items.append((place, item))
        require_samples(annotations, self._items, self.skipped)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Image.Image, Person]:
        place, item = self._items[index]
        image = read_image(self.folder / item["image"], turn=False)
        x, y = item["center"]
        center = (x - 1, y + 15 * item["scale"] - 1)
        scale = (item["scale"] * BOX_PADDING,) * 2
        rows = [[x - 1, y - 1, seen] for (x, y), seen in zip(item["joints"], item["joints_vis"], strict=True)]
        return image, Person(named_joints(MPII_JOINTS, rows), center, scale, None, place, place)

    def name(self, index: int) -> str:
        place, item = self._items[index]
        return f"{item['image']}, annotation {place}"


def coco(root: str | PathLike[str], split: str = "train2017") -> CocoKeypoints:
    """COCO: annotations/person_keypoints_{split}.json, and images in {split}/ or images/{split}/."""
    root = Path(root)
    return CocoKeypoints(root / "annotations" / f"person_keypoints_{split}.json", coco_image_folder(root, split))


def crowdpose(root: str | PathLike[str], split: str = "train") -> CocoKeypoints:
    """CrowdPose: json/crowdpose_{split}.json and images/; splits train, val, trainval, test.

    Also mmpose's annotations/mmpose_crowdpose_{split}.json.
    """
    root = Path(root)
    file = first_file(
        root / "json" / f"crowdpose_{split}.json", root / "annotations" / f"mmpose_crowdpose_{split}.json"
    )
    return CocoKeypoints(file, root / "images", CROWDPOSE_JOINTS)


def aic(root: str | PathLike[str], split: str = "train") -> CocoKeypoints:
    """AI Challenger: annotations/aic_{split}.json and the images as published; splits train, val."""
    root = Path(root)
    folders = {
        "train": "ai_challenger_keypoint_train_20170902/keypoint_train_images_20170902",
        "val": "ai_challenger_keypoint_validation_20170911/keypoint_validation_images_20170911",
    }
    if split not in folders:
        raise ValueError(f"`split` must be one of {', '.join(folders)}; got {split!r}.")
    return CocoKeypoints(root / "annotations" / f"aic_{split}.json", root / folders[split], AIC_JOINTS, AIC_FILL)


def humanart(root: str | PathLike[str], split: str = "training") -> CocoKeypoints:
    """HumanArt: annotations/{split}_humanart.json and images/; splits training, validation.

    COCO's 17 joints are read. File names in the JSON start with HumanArt/images/, so `root` must be named HumanArt.
    """
    root = Path(os.path.abspath(root))
    return CocoKeypoints(root / "annotations" / f"{split}_humanart.json", root.parent)


def ap10k(root: str | PathLike[str], split: str = "train-split1") -> CocoKeypoints:
    """AP-10K, animals: annotations/ap10k-{split}.json and data/.

    Splits train-split1, val-split1, test-split1, and the same of split2 and split3.
    """
    root = Path(root)
    file = root / "annotations" / f"ap10k-{split}.json"
    return CocoKeypoints(file, root / "data", tuple(AP10K_SIGMAS), category=None)


def mpii(root: str | PathLike[str], split: str = "train") -> MpiiKeypoints:
    """MPII: annot/{split}.json and images/; splits train, valid, trainval.

    Also mmpose's annotations/mpii_{split}.json, in which the split valid is called val.
    """
    root = Path(root)
    mmpose = root / "annotations" / f"mpii_{'val' if split == 'valid' else split}.json"
    return MpiiKeypoints(first_file(root / "annot" / f"{split}.json", mmpose), root / "images")


def first_file(*files: Path) -> Path:
    """The first of the `files` that exists; the first one if none does."""
    return next((file for file in files if file.is_file()), files[0])
