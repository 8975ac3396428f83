import json
import os
import pickle
import re

import numpy as np
import pytest
import tiny
from folders import reasons, same, save_image, write_broken, write_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.instances import CocoInstances, coco_instances
from instructdiffusion_pipeline.datasets.label_maps import CocoStuff, readable_name
from instructdiffusion_pipeline.datasets.outlines import encode_outline
from instructdiffusion_pipeline.datasets.referring_expressions import ReferringExpressions

LABELS = """0: unlabeled
1: person
18: dog
157: sky-other
171: wall-brick
172: wall-concrete
173: wall-other
"""
# The classes in COCO's list of 91 things that were never annotated, with their numbers in COCO-Stuff's labels.txt.
NEVER_DRAWN = """12: street sign
26: hat
29: shoe
30: eye glasses
45: plate
66: mirror
68: window
69: desk
71: door
83: blender
91: hair brush
"""


def write_stuff(root, name="1", values=((0, 170), (172, 255)), split="train2017"):
    label = np.kron(np.array(values, np.uint8), np.ones((15, 20), np.uint8))
    save_image(root / "images" / split / f"{name}.jpg", tiny.picture(40, 30))
    save_image(root / "annotations" / split / f"{name}.png", Image.fromarray(label))
    (root / "labels.txt").write_text(LABELS + NEVER_DRAWN)


def test_coco_stuff(tmp_path):
    write_stuff(tmp_path)
    image, masks = CocoStuff(tmp_path)[0]
    assert same(image, tiny.picture(40, 30))
    # An image may show a mirror without an annotation, so mirrors must not be called absent.
    assert set(masks) == {"person", "dog", "sky", "brick wall", "concrete wall", "wall"}
    quarters = {name: mask[::15, ::20].astype(int).tolist() for name, mask in masks.items()}
    assert quarters["person"] == [[1, 0], [0, 0]] and quarters["brick wall"] == [[0, 1], [0, 0]]
    assert quarters["wall"] == [[0, 1], [1, 0]]  # brick and other walls
    assert masks["dog"] is masks["sky"] and not masks["dog"].any()


def test_classes_have_readable_names():
    said = {"wall-brick": "brick wall", "sky-other": "sky", "door-stuff": "door", "traffic light": "traffic light"}
    said |= {"window-blind": "window blind", "playingfield": "playing field"}
    assert {label: readable_name(label) for label in said} == said


def test_missing_files_of_coco_stuff_are_reported(tmp_path):
    write_stuff(tmp_path)
    write_stuff(tmp_path, "2", values=((255, 255), (255, 255)))
    write_stuff(tmp_path, "3")
    write_broken(tmp_path / "images" / "train2017" / "3.jpg")
    write_stuff(tmp_path, "4")
    save_image(tmp_path / "annotations" / "train2017" / "4.png", tiny.picture(20, 30).convert("L"))
    write_stuff(tmp_path, "5")
    (tmp_path / "annotations" / "train2017" / "5.png").unlink()
    write_stuff(tmp_path, "6")
    (tmp_path / "images" / "train2017" / "6.jpg").unlink()
    write_stuff(tmp_path, "7")
    write_broken(tmp_path / "annotations" / "train2017" / "7.png")
    dataset = CocoStuff(tmp_path)
    assert dataset.skipped == [("5.jpg", "no label PNG"), ("6.png", "a missing file")]
    dataset[0]
    for index, cause in [
        (1, "2.png: no pixel is labeled"),
        (2, "3.jpg"),
        (3, r"4.png: is of \(20, 30\) pixels"),
        (4, "7.png"),
    ]:
        with pytest.raises(UnreadableSample, match=cause):
            dataset[index]
    with pytest.raises(ValueError, match="val2017: no samples found"):
        CocoStuff(tmp_path, "val2017")


@pytest.mark.parametrize("offset", [0, 1])
def test_labels_of_a_few_classes_are_recognized_by_the_numbers_in_labels_txt(offset, tmp_path):
    for number in range(1, 5):
        write_stuff(
            tmp_path, str(number), values=((number - offset, 1 - offset), (4 - offset, {0: 0, 1: 255}[offset]))
        )
    (tmp_path / "labels.txt").write_text("0: unlabeled\n1: apple\n2: bell\n3: carrot\n4: drum\n")
    dataset = CocoStuff(tmp_path)
    assert dataset.offset == offset and len(dataset) == 4
    for number, name in enumerate(("apple", "bell", "carrot", "drum")):
        assert dataset[number][1][name].any()


@pytest.mark.parametrize("offset", [0, 1])
def test_labels_that_contain_the_class_numbers_are_recognized(offset, tmp_path):
    """Number 67 is a dining table and 66 a mirror, which was never annotated; 157 is the sky, 18 a dog."""
    unlabeled = {0: 0, 1: 255}[offset]
    for name in "123":
        write_stuff(tmp_path, name, values=((18 - offset, 157 - offset), (67 - offset, unlabeled)))
    write_stuff(tmp_path, "4", values=((18 - offset, 157 - offset), (157 - offset, unlabeled)))
    write_stuff(tmp_path, "5", values=((18 - offset, 157 - offset), (200, unlabeled)))
    write_broken(tmp_path / "annotations" / "train2017" / "3.png")
    dataset = CocoStuff(tmp_path)
    assert dataset.offset == offset
    for index in (0, 1, 3):
        _, masks = dataset[index]
        assert masks["dog"][0, 0] and masks["sky"][0, -1] and not any(mask[-1, -1] for mask in masks.values())
        assert masks["sky"][-1, 0] == (index == 3)
    with pytest.raises(UnreadableSample, match="5.png: has values that belong to no class, such as 200"):
        dataset[4]


def test_palette_indices_of_a_label_map_are_read(tmp_path):
    write_stuff(tmp_path)
    path = tmp_path / "annotations" / "train2017" / "1.png"
    label = Image.open(path)
    _, expected = CocoStuff(tmp_path)[0]
    label.putpalette([(7 * value + 3) % 256 for value in range(768)])
    save_image(path, label)
    assert Image.open(path).mode == "P"
    _, masks = CocoStuff(tmp_path)[0]
    assert all((masks[name] == mask).all() for name, mask in expected.items())


@pytest.mark.parametrize("mode", ["1", "LA", "I;16", "RGB", "RGBA"])
def test_a_label_map_of_colors_is_unreadable(mode, tmp_path):
    write_stuff(tmp_path)
    save_image(tmp_path / "annotations" / "train2017" / "1.png", Image.new(mode, (40, 30)))
    with pytest.raises(UnreadableSample, match=rf"1.png: .*gray \(mode L\) or have a palette \(P\); got mode {mode}"):
        CocoStuff(tmp_path)[0]


def test_class_names_that_cannot_be_read_raise_errors(tmp_path):
    write_stuff(tmp_path)
    (tmp_path / "labels.txt").write_text("person: 1\n")
    with pytest.raises(ValueError, match='labels.txt must be lines like "171: wall-brick"; got ValueError.*person'):
        CocoStuff(tmp_path)
    (tmp_path / "labels.txt").write_text("0: unlabeled\n")
    with pytest.raises(ValueError, match='labels.txt must be lines like "171: wall-brick"; got ValueError'):
        CocoStuff(tmp_path)
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(ValueError, match='no file .*labels.txt; it must be lines like "171: wall-brick"'):
        CocoStuff(tmp_path)


SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]
OTHER = [15, 5, 30, 5, 30, 15, 15, 15]


def reference(ref_id, ann_id, *said, image_id=5, split="train"):
    sentences = [{"sent": text, "raw": text, "sent_id": number} for number, text in enumerate(said)]
    return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences}


def write_references(root, references, name="refs(unc).p", images=True):
    rle = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))
    crowd = {"size": [30, 40], "counts": [0, 30, 30 * 39]}  # the first column, run lengths not compressed
    outlines = [[SQUARE], [OTHER, SQUARE], crowd, {"size": rle["size"], "counts": rle["counts"].decode()}, []]
    instances = {
        "images": [{"id": id, "file_name": f"{id}.jpg", "width": 40, "height": 30} for id in (5, 6, 7)],
        "annotations": [{"id": id, "image_id": 5, "segmentation": item} for id, item in enumerate(outlines, 1)],
    }
    instances["annotations"].append({"id": 6, "image_id": 7, "segmentation": [SQUARE]})
    write_json(root / "instances.json", instances)
    save_image(root / "images" / "5.jpg", tiny.picture(40, 30))
    write_broken(root / "images" / "7.jpg")
    path = root / name
    path.write_bytes(pickle.dumps(references, protocol=2)) if path.suffix == ".p" else write_json(path, references)
    return path, root / "images"


def rectangle(left, right, top=5, bottom=15):
    mask = np.zeros((30, 40), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("name", ["refs(unc).p", "refs(umd).p", "refs(google).p", "grefs(unc).json"])
def test_referring_expressions(name, tmp_path):
    items = [
        reference(1, 1, "Left Cat ", "orange one"),
        reference(2, 2, "the long box"),
        reference(3, 3, "a crowd"),
        reference(4, 4, "a line"),
        reference(9, 1, "cat", split="testA"),
    ]
    dataset = ReferringExpressions(*write_references(tmp_path, items, name))
    assert len(dataset) == 4 and dataset.name(0) == "5.jpg, reference 1" and not dataset.skipped
    image, masks = dataset[0]
    assert same(image, tiny.picture(40, 30)) and list(masks) == ["left cat", "orange one"]
    assert (masks["left cat"] == rectangle(10, 20)).all() and masks["left cat"] is masks["orange one"]
    # two polygons that overlap: their union
    assert (dataset[1][1]["the long box"] == rectangle(10, 30)).all()
    assert (dataset[2][1]["a crowd"] == rectangle(0, 1, 0, 30)).all()
    assert (dataset[3][1]["a line"] == np.eye(30, 40, dtype=bool)).all()
    assert len(ReferringExpressions(*write_references(tmp_path, items, name), split="testA")) == 1


def test_grefcoco_has_expressions_for_several_objects_or_none(tmp_path):
    items = [reference(1, [1, 3], "both"), reference(2, [-1], "the zebra")]
    dataset = ReferringExpressions(*write_references(tmp_path, items, "grefs(unc).json"))
    assert (dataset[0][1]["both"] == rectangle(10, 20) | rectangle(0, 1, 0, 30)).all()
    absent = dataset[1][1]["the zebra"]
    assert absent.shape == (30, 40) and not absent.any()


def test_unusable_references_are_skipped_with_a_reason(tmp_path):
    items = [
        reference(1, 6, "cat", image_id=7),
        reference(2, 1, "cat", image_id=6),
        reference(3, 1, "cat", image_id=8),
        reference(4, 5, "an empty outline"),
        reference(5, 99, "an unknown object"),
        reference(6, 1, " "),
        reference(7, None, "cat"),
        {key: value for key, value in reference(8, 1, "cat").items() if key != "sentences"},
        reference(9, 6, "cat"),
    ]
    dataset = ReferringExpressions(*write_references(tmp_path, items))
    assert ("reference 2", "a missing file") in dataset.skipped
    assert reasons(dataset) == [
        "a missing file",
        "an image that instances.json lacks",
        "an object of another image",
        "an object that instances.json lacks",
        "no 'ann_id'",
        "no 'sentences'",
        "no outline",
        "no sentence",
    ]
    with pytest.raises(UnreadableSample, match="7.jpg"):
        dataset[0]
    with pytest.raises(ValueError, match=r"refs\(unc\).p, split 'val': no samples found"):
        ReferringExpressions(*write_references(tmp_path, items), split="val")


def test_an_image_of_another_size_than_its_outlines_is_unreadable(tmp_path):
    path, images = write_references(tmp_path, [reference(1, 1, "cat")])
    save_image(images / "5.jpg", tiny.picture(80, 60))
    with pytest.raises(
        UnreadableSample, match=r"5.jpg: is of \(80, 60\) pixels, but of \(40, 30\) in its annotations"
    ):
        ReferringExpressions(path, images)[0]


@pytest.mark.parametrize("name, what", [("instances.json", "COCO instances"), ("grefs(unc).json", "references")])
def test_references_that_cannot_be_read_raise_errors(name, what, tmp_path):
    path, images = write_references(tmp_path, [reference(1, 1, "cat")], "grefs(unc).json")
    (tmp_path / name).write_text("[")
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a JSON file of {what}; got JSONDecodeError")):
        ReferringExpressions(path, images)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{name}; it must be a JSON file of {what}.")):
        ReferringExpressions(path, images)


@pytest.mark.parametrize("name, under", [("instances.json", " under 'images'"), ("grefs(unc).json", "")])
def test_references_of_a_wrong_structure_raise_errors(name, under, tmp_path):
    path, images = write_references(tmp_path, [reference(1, 1, "cat")], "grefs(unc).json")
    write_json(tmp_path / name, {"refs": []})
    message = f"{name} must contain a list of objects{under}; got {{'refs': []}}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ReferringExpressions(path, images)


def test_an_outline_without_an_image_size_is_skipped(tmp_path):
    path, images = write_references(tmp_path, [reference(1, 1, "cat")])
    instances = json.loads((tmp_path / "instances.json").read_text())
    del instances["images"][0]["height"], instances["annotations"][1]["segmentation"]
    write_json(tmp_path / "instances.json", instances)
    with pytest.raises(ValueError, match="skipped 1 with no 'height'"):
        ReferringExpressions(path, images)


OUTLINES = {
    "no outline": [[], [[]], [[1, 2, 3, 4]]],
    "a malformed outline": [
        [SQUARE, {"size": [30, 40], "counts": [600, 600]}],
        None, "[[1, 2]]", 7, SQUARE, [SQUARE, None], [SQUARE, 5], [[*SQUARE, 3]], [[*SQUARE[:-1], None]],
        [[*SQUARE[:-1], float("nan")]], [[*SQUARE[:-1], float("inf")]], [[*SQUARE[:-1], 1e8]], [[*SQUARE[:-1], "5"]],
        [[*SQUARE[:-1], [5]]], [[*SQUARE[:-1], True]], [[*SQUARE[:-1], 10**400]],
    ],
    "an outline far outside its image": [[[-50, 5, 20, 5, 20, 15]], [[10, 5, 20, 61, 20, 15]]],
    "an outline that covers no pixel": [[[3.2, 3.2, 3.3, 3.2, 3.3, 3.3]], {"size": [30, 40], "counts": [1200]}],
    "malformed run lengths": [
        {}, {"size": [30, 40]}, {"counts": None, "size": [30, 40]}, {"size": [30, 40], "counts": []},
        {"size": [30, 40], "counts": [1300, -100]}, {"size": [30, 40], "counts": [600.0, 600]},
        {"size": [30, 40], "counts": ["600", 600]}, {"size": [30, 40], "counts": "\u3042"},
        {"size": [30, 40], "counts": "P"}, {"size": [30, 40], "counts": "o" * 40}, {"size": [30, 40], "counts": ""},
        {"size": [30, 40], "counts": " "}, [{"x": 1}], [{"size": [30, 40], "counts": [600, 600]}, {}],
    ],
    "run lengths of another size than their image": [
        {"counts": [600, 600]}, {"counts": [600, 600], "size": [40, 30]}, {"counts": [600, 600], "size": "30, 40"},
        {"counts": [600, 5], "size": [30, 40]}, {"counts": [600, 601], "size": [30, 40]},
        {"counts": [0, 2**40], "size": [30, 40]}, {"counts": "0", "size": [30, 40]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("why, outline", [(why, outline) for why, some in OUTLINES.items() for outline in some])
def test_a_malformed_outline_is_skipped_when_the_dataset_is_opened(why, outline, tmp_path):
    path, images = write_references(tmp_path, [reference(1, 7, "cat"), reference(2, 1, "cat")])
    instances = json.loads((tmp_path / "instances.json").read_text())
    instances["annotations"].append({"id": 7, "image_id": 5, "segmentation": outline})
    write_json(tmp_path / "instances.json", instances)
    dataset = ReferringExpressions(path, images)
    assert dataset.skipped == [("reference 1", why)] and len(dataset) == 1


@given(width=st.integers(1, 40), height=st.integers(1, 30), seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_run_lengths_are_read_as_written_by_pycocotools(width, height, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[0, 0] = True
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=False))
    plain = np.diff(changes, prepend=0, append=mask.size).tolist()
    for counts in (compressed["counts"].decode(), plain):
        encoded = encode_outline({"size": [height, width], "counts": counts}, width, height)
        assert (coco_mask.decode(encoded) == mask).all()


@pytest.mark.parametrize(
    "sentences", ["cat", ["cat"], [{}], [{"sent": None}], [{"sent": 5}], [{"sent": "\ud800"}], {"sent": "cat"}, [None]]
)
def test_sentences_without_text_are_skipped(sentences, tmp_path):
    items = [reference(1, 1, "cat") | {"sentences": sentences}, reference(2, 1, "cat")]
    dataset = ReferringExpressions(*write_references(tmp_path, items, "grefs(unc).json"))
    assert dataset.skipped == [("reference 1", "a malformed 'sentences'")] and len(dataset) == 1


def test_splits_are_those_of_the_official_reader(tmp_path):
    splits = ["train", "val", "testA", "testB", "testC", "testAB", "testBC", "test"]
    items = [reference(number, 1, "cat", split=split) for number, split in enumerate(splits)]
    path, images = write_references(tmp_path, items)
    sizes = {split: len(ReferringExpressions(path, images, split)) for split in splits}
    expected = {"train": 1, "val": 1, "testA": 2, "testB": 3, "testC": 2, "testAB": 1, "testBC": 1, "test": 6}
    assert sizes == expected


def test_refclef_has_text_ids_and_lists_of_run_lengths(tmp_path):
    path, images = write_references(tmp_path, [reference("1_2", "5_1", "two boxes", split="testAB")])
    instances = json.loads((tmp_path / "instances.json").read_text())
    boxes = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in (rectangle(2, 9), rectangle(20, 30))]
    outline = [box | {"counts": box["counts"].decode()} for box in boxes]
    instances["annotations"] = [{"id": "5_1", "image_id": 5, "segmentation": outline}]
    write_json(tmp_path / "instances.json", instances)
    dataset = ReferringExpressions(path, images, "testB")
    assert (dataset[0][1]["two boxes"] == (rectangle(2, 9) | rectangle(20, 30))).all()
    assert dataset.name(0) == "5.jpg, reference 1_2"
    instances["annotations"][0]["segmentation"][1]["size"] = [40, 30]
    write_json(tmp_path / "instances.json", instances)
    with pytest.raises(ValueError, match="1 with run lengths of another size than their image"):
        ReferringExpressions(path, images, "testB")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_raises_an_error(tmp_path):
    victim = tmp_path / "made by a pickle"
    path, images = write_references(tmp_path, [reference(1, 1, "cat") | {"extra": Malicious(victim)}])
    with pytest.raises(
        ValueError, match=r"refs\(unc\).p: it contains \w+.mkdir, which is not allowed. Only pickles of lists"
    ):
        ReferringExpressions(path, images)
    assert not victim.exists()
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"refs\(unc\).p"):
        ReferringExpressions(path, images)


def test_a_pickle_of_python_2_is_read(tmp_path):
    path, images = write_references(tmp_path, [reference(1, 1, "cat")])
    text = "(lp0\n(dp1\nS'ref_id'\nI1\nsS'ann_id'\nI1\nsS'image_id'\nL5L\nsS'split'\nS'train'\nsS'sentences'\n"
    path.write_text(text + "(lp2\n(dp3\nS'sent'\nS'the cat'\nsasa.")
    assert list(ReferringExpressions(path, images)[0][1]) == ["the cat"]


def instance(id, image_id, category_id, segmentation, **others):
    return {"id": id, "image_id": image_id, "category_id": category_id, "segmentation": segmentation} | others


def listed(id, file_name):
    return {"id": id, "file_name": file_name, "width": 40, "height": 30}


def write_coco_instances(root, *annotations, sizes=((40, 30), (30, 40))):
    """Images 1, 2 ... of COCO 2017 and their instances."""
    images = []
    for number, (width, height) in enumerate(sizes, 1):
        save_image(root / "train2017" / f"{number}.jpg", tiny.picture(width, height, number))
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
    categories = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "zebra "}]
    content = {"images": images, "annotations": list(annotations), "categories": categories}
    return write_json(root / "annotations" / "instances_train2017.json", content)


def test_categories_that_differ_in_case_only_are_one(tmp_path):
    """The tokenizer ignores case, so that one prompt would have two answers."""
    file = write_coco_instances(tmp_path, instance(1, 1, 1, [SQUARE]), instance(2, 2, 7, [SQUARE]))
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = "Cat"
    write_json(file, content)
    dataset = coco_instances(tmp_path)
    assert [list(dataset[index][1]) for index in range(2)] == [["cat"], ["cat"]]
    assert all(dataset[index][1]["cat"].any() for index in range(2))


def test_masks_of_coco_instances_are_those_of_its_own_api(tmp_path):
    rle = coco_mask.encode(np.asfortranarray(np.eye(40, 30, dtype=np.uint8)))
    rle["counts"] = rle["counts"].decode()
    file = write_coco_instances(
        tmp_path,
        instance(1, 1, 1, [SQUARE]),
        instance(2, 1, 1, [OTHER, SQUARE]),
        instance(3, 1, 7, {"size": [30, 40], "counts": [0, 30, 30 * 39]}, iscrowd=1),
        instance(4, 2, 7, rle),
        instance(5, 2, 9, [SQUARE]),
    )
    api, dataset = COCO(file), coco_instances(tmp_path)
    assert len(dataset) == 2 and not dataset.skipped
    for index, id in enumerate(api.getImgIds()):
        image, masks = dataset[index]
        assert same(image, Image.open(tmp_path / "train2017" / dataset.name(index)))
        assert list(masks) == ["cat", "dog", "zebra"]
        for category in api.loadCats(api.getCatIds()):
            found = api.loadAnns(api.getAnnIds(id, category["id"]))
            expected = sum((api.annToMask(item) for item in found), np.zeros((image.height, image.width), int)) > 0
            assert (masks[category["name"].strip()] == expected).all()


def test_images_of_coco_instances_can_be_in_a_folder_images(tmp_path):
    write_coco_instances(tmp_path, instance(1, 1, 1, [SQUARE]))
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert len(coco_instances(tmp_path)) == 2


def test_a_category_without_objects_is_not_used(tmp_path):
    write_coco_instances(tmp_path, instance(1, 1, 1, [SQUARE]))
    dataset = coco_instances(tmp_path)
    (_, first), (_, second) = dataset
    assert list(first) == list(second) == ["cat"] and first["cat"].any() and not second["cat"].any()
    assert dataset.skipped == [("category dog", "no object"), ("category zebra", "no object")]


def test_a_category_with_an_unknown_mask_is_left_out_of_the_image(tmp_path):
    write_coco_instances(
        tmp_path,
        instance(1, 1, 1, [SQUARE]),
        instance(2, 1, 1, []),
        instance(3, 1, 7, [OTHER]),
        instance(4, 2, 7, [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8]]),
        instance(5, 2, 1, [SQUARE]),
    )
    dataset = coco_instances(tmp_path)
    (_, first), (_, second) = dataset
    assert list(first) == ["dog"] and list(second) == ["cat"]
    assert dict(dataset.skipped) == {
        "annotation 2 of 1.jpg": "no outline",
        "annotation 4 of 2.jpg": "an outline in relative coordinates instead of pixels",
        "category zebra": "no object",
    }


@pytest.mark.parametrize("category", [8, "1", None, 1.0])
def test_an_image_with_an_object_of_an_unknown_category_is_skipped(tmp_path, category):
    write_coco_instances(tmp_path, instance(1, 1, category, [SQUARE]), instance(2, 2, 1, [SQUARE]))
    dataset = coco_instances(tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == ["2.jpg"]
    assert ("1.jpg", "an object of an unknown category") in dataset.skipped


def test_images_and_instances_that_cannot_be_used_are_listed(tmp_path):
    sizes = [(40, 30)] * 5
    file = write_coco_instances(tmp_path, *(instance(id, id, 1, [SQUARE]) for id in range(1, 6)), sizes=sizes)
    content = json.loads(file.read_text())
    del content["images"][4]["width"]
    content["images"].pop(2)
    write_json(file, content)
    (tmp_path / "train2017" / "4.jpg").unlink()
    dataset = coco_instances(tmp_path)
    assert [dataset.name(index) for index in range(len(dataset))] == ["1.jpg", "2.jpg"]
    assert dataset.skipped[:3] == [
        ("4.jpg", "a missing file"),
        ("5.jpg", "no 'width'"),
        ("annotation 3 of image 3", "an image that the JSON lacks"),
    ]
    write_broken(tmp_path / "train2017" / "1.jpg")
    with pytest.raises(UnreadableSample, match="1.jpg"):
        dataset[0]
    save_image(tmp_path / "train2017" / "2.jpg", tiny.picture(30, 30))
    with pytest.raises(UnreadableSample, match=r"2.jpg: is of \(30, 30\) pixels, but of \(40, 30\)"):
        dataset[1]


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
def test_an_image_with_an_exif_orientation_is_unreadable(tmp_path, orientation):
    write_coco_instances(tmp_path, instance(1, 1, 1, [SQUARE]), sizes=[(30, 30)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    tiny.picture(30, 30).save(tmp_path / "train2017" / "1.jpg", exif=exif)
    dataset = coco_instances(tmp_path)
    if orientation == 1:
        assert dataset[0][1]["cat"].any()
    else:
        with pytest.raises(UnreadableSample, match="1.jpg: has an EXIF orientation; save it without one"):
            dataset[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": [{"id": 1, "name": " "}]}, "the category .* has a malformed 'name'"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "has an id that another one has"),
        ({"categories": []}, "no usable samples; skipped 1 with an object of an unknown category; the first one is 1"),
        ({"images": [listed(1, "1.jpg"), listed(1, "2.jpg")]}, "1.jpg and 2.jpg have the id 1"),
        ({"images": [listed(1, "1.jpg"), listed(2, "1.jpg")]}, "several images have the file name 1.jpg"),
        ({"annotations": [instance(1, "1", 1, [SQUARE])]}, "annotation 1 has a malformed 'image_id', so any image"),
        ({"annotations": [instance(1, 1, 1, [])]}, "no usable samples; skipped 2 with no object, 1 with no outline"),
        ({"annotations": []}, "no usable samples; skipped 3 with no object"),
    ],
)
def test_a_malformed_json_of_instances_raises_an_error(tmp_path, changes, message):
    file = write_coco_instances(tmp_path, instance(1, 1, 1, [SQUARE]))
    write_json(file, json.loads(file.read_text()) | changes)
    with pytest.raises(ValueError, match=f"instances_train2017.json: .*{message}"):
        CocoInstances(file, tmp_path / "train2017")
