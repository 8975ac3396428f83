"""Label maps of ADE20K, PASCAL-Context and PASCAL VOC; test_segmentation_datasets.py has those of COCO-Stuff."""

import numpy as np
import paper_data
import pytest
import tiny
from folders import same, save_image, write_broken
from paper_data import ADE_847, QUARTERS
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.label_maps import (
    CONTEXT_CLASSES,
    VOC_CLASSES,
    ade20k_150,
    ade20k_847,
    numbered_classes,
    pascal_context_59,
    pascal_context_459,
    voc,
)
from instructdiffusion_pipeline.evaluation.examples import Example
from instructdiffusion_pipeline.evaluation.scoring import measure, summarize
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation

# The classes of the quarters 1 to 3, and the number of all classes.
CASES = {
    ade20k_150: (["wall", "building", "water"], 3),
    ade20k_847: (["wall", "handbag", "cat"], 12),
    pascal_context_59: (["aeroplane", "person", "wood"], 59),
    pascal_context_459: (["potted plant", "person", None], 4),
    voc: (["aeroplane", None, "tv monitor"], 20),
}


def write(read, root):
    return getattr(paper_data, f"write_{read.__name__}")(root)


@pytest.fixture(params=CASES, ids=[read.__name__ for read in CASES])
def read(request):
    return request.param


def test_a_mask_is_where_the_label_map_has_the_value_of_its_class(read, tmp_path):
    write(read, tmp_path)
    names, count = CASES[read]
    dataset = read(tmp_path)
    image, masks = dataset[0]
    assert same(image, tiny.picture(40, 30)) and len(dataset) == 1 and not dataset.skipped
    assert len(masks) == count and dataset.name(0) == "1.jpg"
    for quarter, name in enumerate(names, start=1):
        assert name is None or (masks[name] == (quarter == QUARTERS)).all()
    labeled = np.any([quarter == QUARTERS for quarter, name in enumerate(names, start=1) if name], axis=0)
    assert np.array_equal(masks.labeled, labeled)
    absent = [mask for name, mask in masks.items() if name not in names]
    assert not any(mask.any() for mask in absent) and len({id(mask) for mask in absent}) <= 1


def test_classes_with_the_same_first_name_get_another_name():
    assert numbered_classes(ADE_847) == {
        "wall": {1},
        "bag": {115},
        "flowerpot": {131},
        "crt screen": {148},
        "silver screen": {154},
        "pot": {189},
        "traveling bag": {192},
        "instrument panel": {199},
        "control panel": {209},
        "handbag": {253},
        "cat": {501},
        "control board": {769},
    }
    assert numbered_classes("0: none\n1: cat\n2: cat\n3: , dog\n4: ,\n5:") == {"cat": {1, 2}, "dog": {3}}


def test_classes_without_a_file_of_names_are_numbered_alphabetically():
    for names, count in ((CONTEXT_CLASSES, 59), (VOC_CLASSES, 20)):
        assert list(names) == sorted(set(names)) and len(names) == count


def test_unreadable_files_are_reported(read, tmp_path):
    write(read, tmp_path)
    dataset = read(tmp_path)
    path = dataset.labels / f"1{dataset.suffix}"
    kind = np.uint8 if dataset.suffix == ".png" else np.uint16
    unlabeled = np.asarray(Image.open(path))[0, 0]
    for values, why in [
        (np.full((30, 40), unlabeled, kind), "no pixel is labeled"),
        (
            np.full((30, 40), 254 if kind is np.uint8 else 2000, kind),
            "has values that belong to no class, such as 2",
        ),
        (np.full((30, 20), unlabeled, kind), r"is of \(20, 30\) pixels, its image of \(40, 30\)"),
        (np.zeros((30, 40, 3), np.uint8), "mode RGB"),
    ]:
        Image.fromarray(values).save(path)
        with pytest.raises(UnreadableSample, match=rf"1\{dataset.suffix}: .*{why}"):
            dataset[0]
    write_broken(path)
    with pytest.raises(UnreadableSample, match=rf"1\{dataset.suffix}"):
        dataset[0]
    path.unlink()
    kind = dataset.suffix[1:].upper()
    with pytest.raises(ValueError, match=f"no usable samples; skipped 1 with no label {kind}"):
        read(tmp_path)


def test_the_images_of_voc_are_those_of_its_list(tmp_path):
    names = paper_data.write_voc(tmp_path)
    save_image(tmp_path / "JPEGImages" / "2.jpg")
    names.write_text("3\n1\n../SegmentationClass/1\n2\n")
    dataset = voc(tmp_path)
    assert len(dataset) == 1
    assert dataset.skipped == [
        ("'../SegmentationClass/1'", "a malformed name"),
        ("2.jpg", "no label PNG"),
        ("3.png", "a missing file"),
    ]
    with pytest.raises(ValueError, match="There is no file .*val.txt; it must be a list of images."):
        voc(tmp_path, "val")


def test_the_background_of_voc_is_labeled_and_its_void_rim_is_not(tmp_path):
    """Otherwise an output that paints the whole image would have a perfect score."""
    paper_data.write_voc(tmp_path)
    label = np.zeros((100, 100), np.uint8)
    label[38:62, 38:62] = 255
    label[40:60, 40:60] = 8  # cat
    Image.fromarray(label).save(tmp_path / "SegmentationClass" / "1.png")
    save_image(tmp_path / "JPEGImages" / "1.jpg", tiny.picture(100, 100))
    image, masks = voc(tmp_path)[0]
    assert np.array_equal(masks.labeled, label != 255) and np.array_equal(masks["cat"], label == 8)
    whole, nothing = Mask(np.ones_like(masks.labeled), 0.9), Mask(np.zeros_like(masks.labeled), 0.0)
    for name, found, iou, absent_found in (
        ("cat", whole, 400 / (100**2 - 24**2 + 20**2), None),
        ("cat", Mask(label > 0, 0.9), 1, None),
        ("dog", whole, 0, 0),
        ("dog", nothing, 1, 1),
    ):
        example = Example(image, [Segmentation({name: "red"})], masks)
        scores = summarize([measure(example, {name: found}, (0, 0, 100, 100))])
        assert scores["mIoU"] == pytest.approx(iou) and scores["N-acc"] == absent_found
    label[:] = 0
    Image.fromarray(label).save(tmp_path / "SegmentationClass" / "1.png")
    assert voc(tmp_path)[0][1].labeled.all(), "an image without objects"


@pytest.mark.parametrize("read", [ade20k_150, ade20k_847, pascal_context_459])
def test_lists_of_names_that_cannot_be_read_raise_errors(read, tmp_path):
    file = write(read, tmp_path)
    file.write_text("wall\nbuilding\n")
    with pytest.raises(ValueError, match=rf"{file.name} must be .*; got ValueError: no such line"):
        read(tmp_path)
