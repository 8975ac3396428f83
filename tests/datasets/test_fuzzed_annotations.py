"""Randomly damaged annotation files: each is read, or entries are skipped, or an error names the file."""

import copy
import json
import pickle
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import test_segmentation_datasets
from folders import save_image, write_json
from paper_data import (
    write_ade20k_150,
    write_ade20k_847,
    write_ap10k,
    write_humanart,
    write_pascal_context_59,
    write_pascal_context_459,
    write_voc,
)
from PIL import Image
from test_editing_datasets import gier_item, pair, prompt, write_scenes, write_shard
from test_keypoints_datasets import annotation, people
from test_segmentation_datasets import LABELS, OTHER, SQUARE, instance, reference, write_references

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.captions import coco_captions
from instructdiffusion_pipeline.datasets.editing import InstructPix2Pix, gier, gqa_inpaint, magicbrush
from instructdiffusion_pipeline.datasets.instances import coco_instances
from instructdiffusion_pipeline.datasets.keypoints import ap10k, coco, humanart, mpii
from instructdiffusion_pipeline.datasets.label_maps import (
    CocoStuff,
    ade20k_150,
    ade20k_847,
    pascal_context_59,
    pascal_context_459,
    voc,
)
from instructdiffusion_pipeline.datasets.preferences import load_preferences
from instructdiffusion_pipeline.datasets.referring_expressions import ReferringExpressions
from instructdiffusion_pipeline.datasets.transforms import PersonCrop, Resize, SquareCrop

VALUES = [
    None, True, False, 0, 1, -1, 2, 5, 7, 40, 30, 10**8, -(10**8), 10**30, 10**400, 0.5, -0.5, 1e8, 1e300, 1e-300,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "5", "..", "../../etc/passwd", "/dev/zero", "a" * 5000,
    "\0", "\ud800", "\N{SNOWMAN}", [], {}, [[]], [None], [1], [[1, 2, 3]], {"a": 1}, [{}],
    {"counts": [1], "size": [1, 1]}, {"size": [30, 40], "counts": "PPYo1"}, {"size": [30, 40], "counts": [600, 600]},
    [[1e300] * 6], [[0, 0, 40, 0, 40, 30]],
]  # fmt: skip


def nodes(content, path=()):
    """The paths of all values in JSON content."""
    yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from nodes(value, (*path, key))


def damage(content, rng):
    """A copy of JSON content with a few values replaced, removed, repeated or moved."""
    content = [copy.deepcopy(content)]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        *path, key = (0, *rng.choice(list(nodes(content[0]))))
        parent = content
        for step in path:
            parent = parent[step]
        how = rng.random()
        if how < 0.7:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.8 and parent is not content:
            del parent[key]
        elif how < 0.9 and isinstance(parent[key], list):
            parent[key] = parent[key] * 2
        else:
            parent[key] = [parent[key]]
    return content[0]


def damage_bytes(content, rng):
    """Bytes of which a few are changed or removed."""
    content = bytearray(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])
    for _ in range(rng.randint(1, 8) if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def write_coco(root):
    save_image(root / "train2017" / "000000000001.jpg")
    content = people(annotation(1, area=300), annotation(2), annotation(3, image_id=2), annotation(4))
    return write_json(root / "annotations" / "person_keypoints_train2017.json", content)


def write_mpii(root):
    save_image(root / "images" / "a.jpg")
    person = {
        "image": "a.jpg",
        "center": [21.0, 11.0],
        "scale": 0.1,
        "joints": [[9.0, 4.0]] * 16,
        "joints_vis": [1] * 16,
    }
    return write_json(root / "annot" / "train.json", [person] * 3)


def write_captions(root):
    save_image(root / "train2017" / "9.jpg")
    captions = [{"image_id": 9, "caption": text} for text in ("a cat", "a dog")]
    images = [{"id": 9, "file_name": "9.jpg"}, {"id": 8, "file_name": "9.jpg"}]
    return write_json(root / "annotations" / "captions_train2017.json", {"images": images, "annotations": captions})


def write_instances(root):
    write_references(root, [reference(number, number, "Left Cat", "cat") for number in range(1, 5)])
    return root / "instances.json"


def write_coco_instances(root):
    crowd = {"size": [30, 40], "counts": [0, 30, 30 * 39]}
    found = [instance(1, 1, 1, [SQUARE]), instance(2, 1, 7, [OTHER, SQUARE]), instance(3, 1, 9, crowd)]
    return test_segmentation_datasets.write_coco_instances(root, *found)


def write_grefs(root):
    items = [reference(1, [1, 3], "both", "two"), reference(2, [-1], "the zebra"), reference(3, 2, "cat")]
    return write_references(root, items, "grefs(unc).json")[0]


def write_pickle(root):
    return write_references(root, [reference(number, number, "Left Cat", "cat") for number in range(1, 5)])[0]


def write_gier(root):
    for name in ("a_0", "b_0", "a_1", "b_1"):
        save_image(root / "images" / f"{name}.jpg")
    return write_json(root / "GIER.json", [gier_item(0), gier_item(1)])


def write_magicbrush(root, name="edit_turns.json"):
    turn = {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "add a cat"}
    for picture in ("input", "output1"):
        save_image(root / "train" / "images" / "7" / f"7-{picture}.png")
    return write_json(root / "train" / name, [turn, turn] if name == "edit_turns.json" else {"7": [turn, turn]})


def write_sessions(root):
    return write_magicbrush(root, "edit_sessions.json")


def write_gqa(root):
    return write_scenes(
        root, {"10": [("1", "cat", "to the left"), ("2", "cat", "to the right"), ("3", "dog", "to the left")]}
    )


def write_seeds(root):
    write_shard(root / "shard-00.zip", prompt("000"), *pair("000", 1), prompt("001"), *pair("001", 3), *pair("001", 4))
    return write_json(root / "seeds.json", [["001", ["3", "4"]], ["000", ["1"]]])


def write_zip(root):
    write_seeds(root).unlink()
    return root / "shard-00.zip"


def write_picks(root):
    save_image(root / "inputs" / "0.png")
    save_image(root / "picks" / "0_1.png")
    lines = [json.dumps({"id": "0", "instruction": "make it winter"}), json.dumps({"id": "1", "instruction": "x"})]
    (root / "samples.jsonl").write_text("\n".join(lines))
    return root / "samples.jsonl"


def write_labels(root):
    save_image(root / "images" / "train2017" / "1.jpg")
    label = Image.fromarray(np.kron([[0, 156], [170, 255]], np.ones((15, 20))).astype(np.uint8))
    save_image(root / "annotations" / "train2017" / "1.png", label)
    (root / "labels.txt").write_text(LABELS)
    return root / "labels.txt"


def write_label_picture(root):
    write_labels(root)
    return root / "annotations" / "train2017" / "1.png"


READERS = {
    "coco": (write_coco, coco, PersonCrop(64)),
    "mpii": (write_mpii, mpii, PersonCrop(64)),
    "humanart": (
        lambda root: write_humanart(root / "HumanArt"),
        lambda root: humanart(root / "HumanArt"),
        PersonCrop(64),
    ),
    "ap10k": (write_ap10k, ap10k, PersonCrop(64)),
    "coco captions": (write_captions, coco_captions, SquareCrop(32)),
    "instances": (
        write_instances,
        lambda root: ReferringExpressions(root / "refs(unc).p", root / "images"),
        SquareCrop(32),
    ),
    "coco-instances": (write_coco_instances, coco_instances, SquareCrop(32)),
    "grefs": (
        write_grefs,
        lambda root: ReferringExpressions(root / "grefs(unc).json", root / "images"),
        SquareCrop(32),
    ),
    "refs": (write_pickle, lambda root: ReferringExpressions(root / "refs(unc).p", root / "images"), SquareCrop(32)),
    "gier": (write_gier, gier, Resize(32)),
    "magicbrush": (write_magicbrush, magicbrush, Resize(32)),
    "magicbrush sessions": (write_sessions, magicbrush, Resize(32)),
    "gqa-inpaint": (write_gqa, gqa_inpaint, Resize(32)),
    "instructpix2pix seeds": (write_seeds, InstructPix2Pix, Resize(32)),
    "instructpix2pix": (write_zip, InstructPix2Pix, Resize(32)),
    "preferences": (write_picks, load_preferences, Resize(32)),
    "coco-stuff": (write_labels, CocoStuff, SquareCrop(32)),
    "coco-stuff label": (write_label_picture, CocoStuff, SquareCrop(32)),
    "ade20k-150": (write_ade20k_150, ade20k_150, SquareCrop(32)),
    "ade20k-847": (write_ade20k_847, ade20k_847, SquareCrop(32)),
    "pascal-context-59 label": (write_pascal_context_59, pascal_context_59, SquareCrop(32)),
    "pascal-context-459": (write_pascal_context_459, pascal_context_459, SquareCrop(32)),
    "voc": (write_voc, voc, SquareCrop(32)),
}


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_annotation_file_is_read_or_skipped_or_raises(name, count, tmp_path):
    write, read, transform = READERS[name]
    file = write(tmp_path)
    assert len(read(tmp_path)) > 0
    original = file.read_bytes()
    content = {".json": json.loads, ".p": pickle.loads}.get(file.suffix)
    content = content and content(original)
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        rng = random.Random(seed)
        if content is None or rng.random() < 0.2:
            file.write_bytes(damage_bytes(original, rng))
        elif file.suffix == ".p":
            file.write_bytes(pickle.dumps(damage(content, rng)))
        else:
            file.write_text(json.dumps(damage(content, rng)))
        with warnings.catch_warnings(action="ignore"):  # warnings of Pillow
            outcomes[try_to_read(read, tmp_path, transform, seed)] += 1
    print(f"{name}: {dict(outcomes)}")
    assert len(outcomes) > 1


def try_to_read(read, root, transform, seed):
    """Read a dataset and all its items, and describe the result. Exceptions that name no file are raised."""
    try:
        dataset = read(root)
    except ValueError as error:
        assert str(root) in str(error), "the message must name the file"
        return "refused"
    assert all(isinstance(what, str) and why for what, why in dataset.skipped)
    outcome = "skipped" if dataset.skipped else "read"
    for index in range(len(dataset)):
        try:
            assert isinstance(dataset.name(index), str)
            image, annotation = transform(*dataset[index], random.Random(seed))
            assert image.mode == "RGB" and annotation is not None
        except UnreadableSample:
            outcome = "skipped"
    return outcome
