"""Tiny versions of the datasets that the paper only evaluates on, in the layouts of published loaders."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from folders import save_image, write_json
from PIL import Image

AP10K_NAMES = [
    "left_eye", "right_eye", "nose", "neck", "root_of_tail", "left_shoulder", "left_elbow", "left_front_paw",
    "right_shoulder", "right_elbow", "right_front_paw", "left_hip", "left_knee", "left_back_paw", "right_hip",
    "right_knee", "right_back_paw",
]  # fmt: skip
ADE_150 = """Idx\tRatio\tTrain\tVal\tName
1\t0.1576\t11664\t1172\twall
2\t0.1072\t6046\t612\tbuilding, edifice
22 \t0.0074\t709\t75\twater
"""
# Lines of OpenSeg's ade20k_847.txt, including the classes whose first name other classes also have.
ADE_847 = """0:invalid_class_id
1:wall
115:bag
131:pot,flowerpot
148:screen,crt screen
154:screen,silver screen,projection screen
189:pot
192:bag,traveling bag,travelling bag,grip,suitcase
199:instrument panel
209:control panel
253:bag,handbag,pocketbook,purse
501:cat
769:control panel,instrument panel,control board,board,panel
"""
CONTEXT_459 = "1: accordion\n2: aeroplane\n284: person\n308: pottedplant\n431: unknown\n"

# Of a label map: unlabeled top left, then three classes.
QUARTERS = np.kron([[0, 1], [2, 3]], np.ones((15, 20), int))


def write_label(pictures: Path, labels: Path, values: list[int], kind: type = np.uint8, name: str = "1") -> Path:
    """An image and its label map, with the pixel values of `QUARTERS`."""
    save_image(pictures / f"{name}.jpg", tiny.picture(40, 30))
    path = labels / f"{name}{'.png' if kind is np.uint8 else '.tif'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, kind)[QUARTERS]).save(path)
    return path


def write_ade20k_150(root: Path, split: str = "training") -> Path:
    write_label(root / "images" / split, root / "annotations" / split, [0, 1, 2, 22])
    (root / "objectInfo150.txt").write_text(ADE_150)
    return root / "objectInfo150.txt"


def write_ade20k_847(root: Path, split: str = "training") -> Path:
    folders = [root / f"{kind}_detectron2" / split for kind in ("images", "annotations")]
    write_label(*folders, [65535, 0, 252, 500], np.uint16)
    (root / "labels.txt").write_text(ADE_847)
    return root / "labels.txt"


def write_pascal_context_59(root: Path, split: str = "training") -> Path:
    return write_label(root / "images" / split, root / "annotations_ctx59" / split, [255, 0, 36, 58])


def write_pascal_context_459(root: Path, split: str = "training") -> Path:
    write_label(root / "images" / split, root / "annotations_ctx459" / split, [65535, 307, 283, 430], np.uint16)
    (root / "labels.txt").write_text(CONTEXT_459)
    return root / "labels.txt"


def write_voc(root: Path, split: str = "train") -> Path:
    path = write_label(root / "JPEGImages", root / "SegmentationClass", [255, 1, 255, 20])
    label = Image.open(path)
    label.putpalette([(7 * value + 3) % 256 for value in range(768)])
    label.save(path)
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text("1\n")
    return names


def joints(id: int, image_id: int = 1, **changes: Any) -> dict[str, Any]:
    """An annotation with 17 joints inside its box; the last is not labeled."""
    places = [(6 + (5 * joint + 3 * id) % 20, 4 + (7 * joint + id) % 20) for joint in range(16)]
    keypoints = [value for x, y in places for value in (x, y, 2)] + [0, 0, 0]
    item = {"id": id, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": [4, 2, 24, 24], "area": 500}
    return item | {"keypoints": keypoints, "num_keypoints": 16} | changes


def write_humanart(root: Path, split: str = "training") -> Path:
    name = "HumanArt/images/2D_virtual_human/cartoon/000000000000.jpg"
    save_image(root.parent / name)
    extra = {"keypoints_21": [5, 6, 2] * 21, "num_keypoints_21": 21, "self_contact": [], "annotator": 3}
    content = {
        "images": [{"id": 1, "file_name": name, "width": 40, "height": 30, "category": "cartoon"}],
        "annotations": [joints(id) | extra for id in range(1, 4)],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }
    return write_json(root / "annotations" / f"{split}_humanart.json", content)


def write_ap10k(root: Path, split: str = "train-split1") -> Path:
    save_image(root / "data" / "000000000001.jpg")
    content = {
        "images": [{"id": 1, "file_name": "000000000001.jpg", "width": 40, "height": 30, "background": 5}],
        "annotations": [joints(id, category_id=2 - id % 2) for id in range(1, 4)],
        "categories": [
            {"id": id, "name": name, "supercategory": "Bovidae", "keypoints": AP10K_NAMES}
            for id, name in [(1, "antelope"), (2, "argali sheep")]
        ],
    }
    return write_json(root / "annotations" / f"ap10k-{split}.json", content)


def write_references(root: Path, folder: str, file: str, pictures: str, splits: list[str]) -> None:
    """One reference with two expressions in each split, each with another image."""
    items, images, objects = [], [], []
    for number, split in enumerate(splits, start=1):
        save_image(root / "images" / pictures / f"{number}.jpg", tiny.picture(40, 30, number))
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 40, "height": 30})
        square = [10 + number, 5, 20, 5, 20, 15, 10 + number, 15]
        objects.append({"id": number, "image_id": number, "segmentation": [square]})
        sentences = [{"sent": f"{side} cat {number}", "sent_id": number} for side in ("left", "right")]
        items.append({"ref_id": number, "ann_id": number, "image_id": number, "split": split, "sentences": sentences})
    write_json(root / folder / "instances.json", {"images": images, "annotations": objects})
    content = json.dumps(items).encode() if file.endswith(".json") else pickle.dumps(items, protocol=2)
    (root / folder / file).write_bytes(content)


def write_pairs(root: Path, degraded: str, clean: str) -> None:
    for path in (degraded, clean):
        save_image(root / path, tiny.picture(80, 64))


def write_paper_data(root: Path) -> None:
    """The datasets of all tables of the paper except COCO, COCO-Stuff and CLWD."""
    write_humanart(root / "HumanArt", "validation")
    write_ap10k(root / "ap-10k", "test-split1")
    write_ade20k_150(root / "ADEChallengeData2016", "validation")
    write_ade20k_847(root / "ADE20K_2021_17_01", "validation")
    write_pascal_context_59(root / "pascal_ctx_d2", "validation")
    write_pascal_context_459(root / "pascal_ctx_d2", "validation")
    write_voc(root / "VOCdevkit" / "VOC2012", "val")
    references = root / "coco_2014"
    for folder, file, splits in [
        ("grefcoco", "grefs(unc).json", ["val"]),
        ("refcoco", "refs(unc).p", ["val", "testA", "testB"]),
        ("refcoco+", "refs(unc).p", ["val", "testA", "testB"]),
        ("refcocog", "refs(google).p", ["val"]),
        ("refcocog", "refs(umd).p", ["val", "test"]),
    ]:
        write_references(references, folder, file, "train2014", splits)
    write_references(references, "refclef", "refs(unc).p", "saiapr_tc-12", ["val", "testA", "testBC"])
    write_pairs(root / "GoPro" / "test" / "clip", "blur/1.png", "sharp/1.png")
    write_pairs(root / "SIDD" / "val", "input/1.png", "gt/1.png")
