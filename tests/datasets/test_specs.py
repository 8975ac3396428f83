import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_keypoints_datasets
import test_segmentation_datasets
import tiny
from folders import save_image, write_json
from numpy.lib.stride_tricks import sliding_window_view

from instructdiffusion_pipeline.datasets.keypoints import COCO_SIGMAS
from instructdiffusion_pipeline.datasets.specs import (
    DATASETS,
    load_sources,
    load_test_sources,
    original_mixture,
    parse_entries,
)
from instructdiffusion_pipeline.datasets.transforms import PersonCrop


def write_all(root):
    """A few sources of each family, each with one or two samples."""
    content = test_keypoints_datasets.people(test_keypoints_datasets.annotation(7, area=300))
    write_json(root / "coco" / "annotations" / "person_keypoints_train2017.json", content)
    save_image(root / "coco" / "images" / "train2017" / "000000000001.jpg")
    test_segmentation_datasets.write_stuff(root / "coco-stuff")
    references = [test_segmentation_datasets.reference(1, 1, "left cat")]
    path, images = test_segmentation_datasets.write_references(root / "coco_2014" / "refcoco", references)
    images.rename(root / "coco_2014" / "images")
    (root / "coco_2014" / "images" / "train2014").mkdir()
    (root / "coco_2014" / "images" / "5.jpg").rename(root / "coco_2014" / "images" / "train2014" / "5.jpg")
    for side in ("NOISY", "GT"):
        save_image(root / "SIDD" / "Data" / "0001" / f"0001_{side}_SRGB_010.PNG", tiny.picture(300, 280))
    summaries = {"expert_summary": ["dim", "dark"], "amateur_summary": []}
    items = [{"input": "a.jpg", "output": "b.jpg"} | summaries, {"input": "b.jpg", "output": "a.jpg"} | summaries]
    write_json(root / "GIER_editing_data" / "GIER.json", items)
    for name in "ab":
        save_image(root / "GIER_editing_data" / "images" / f"{name}.jpg")


def test_a_part_of_the_mixture_of_the_original_code(tmp_path):
    write_all(tmp_path)
    mixed = original_mixture(tmp_path, ["coco", "coco-stuff", "refcoco", "sidd", "gier"], seed=3)
    # SIDD has a weight of 20; a pair of GIER has a weight of 2, with any number of instructions
    assert len(mixed) == 1 + 1 + 1 + 20 + 2
    for sample in (mixed[position] for position in range(len(mixed))):
        assert sample.image.size == sample.target.size == (256, 256) and sample.instruction
    pickle.dumps(mixed)


def test_noisy_images_are_cropped_without_resizing(tmp_path):
    write_all(tmp_path)
    sample = original_mixture(tmp_path, ["sidd"])[0]
    crops = sliding_window_view(np.asarray(tiny.picture(300, 280)), (256, 256, 3))
    image = np.asarray(sample.image)
    assert any((crops == cut).all((-3, -2, -1)).any() for cut in (image, image[:, ::-1]))


def test_only_coco_has_half_bodies_in_three_of_ten_samples():
    halves = {
        name: spec.transform.half_body for name, spec in DATASETS.items() if isinstance(spec.transform, PersonCrop)
    }
    assert halves.pop("coco") == 0.3 and set(halves.values()) == {0}


def test_unknown_names_raise_an_error(tmp_path):
    with pytest.raises(ValueError, match="`names` must be from mpii, coco, .*; got COCO, table"):
        original_mixture(tmp_path, ["coco", "COCO", "table"])


def test_weights_are_those_of_the_original_code():
    weights = {name: spec.weight for name, spec in DATASETS.items() if spec.weight != 1}
    expected = {"aic": 0.1, "gopro": 2, "reds": 0.2, "sidd": 20, "clwd": 0.2, "instructpix2pix": 0.2, "gier": 2}
    assert weights == expected and sum(spec.folder is not None for spec in DATASETS.values()) == 26


def test_training_and_evaluation_use_different_splits():
    same = {name for name, spec in DATASETS.items() if spec.train_split == spec.test_split}
    assert same == {"table"}, "a table is a folder of the user's own, which has one split"


def test_evaluation_has_the_test_split_no_flips_and_the_sigmas(tmp_path):
    content = test_keypoints_datasets.people(test_keypoints_datasets.annotation(7, area=300))
    for split in ("train2017", "val2017"):
        write_json(tmp_path / "annotations" / f"person_keypoints_{split}.json", content)
    save_image(tmp_path / "images" / "val2017" / "000000000001.jpg")
    (source,) = load_test_sources([f"coco={tmp_path}"], 96)
    assert source.name == "coco val2017"
    reads = [source.read(0, random.Random(seed)) for seed in range(8)]
    assert {image.tobytes() for image, _ in reads} == {reads[0][0].tobytes()} and reads[0][0].size == (96, 96)
    assert reads[0][1].sigmas == COCO_SIGMAS and reads[0][1].area > 0
    with pytest.raises(ValueError, match="no usable samples"):
        load_sources([f"coco={tmp_path}"], 96)  # only val2017 has images


def test_restored_images_are_scored_at_their_own_size_if_it_is_below_the_resolution(tmp_path):
    noisy, clean = tiny.picture(64, 64, 1), tiny.picture(64, 64, 2)
    folders = {"sidd": ("val/input", "val/gt"), "clwd": ("test/Watermarked_image", "test/Watermark_free_image")}
    for key, (image, truth) in folders.items():
        save_image(tmp_path / key / image / "0.png", noisy)
        save_image(tmp_path / key / truth / "0.png", clean)
        (source,) = load_test_sources([f"{key}={tmp_path / key}"], 512)
        read = source.read(0, random.Random(0))
        assert [picture.tobytes() for picture in read] == [noisy.tobytes(), clean.tobytes()]


@pytest.mark.parametrize("key", ["captions", "coco-captions", "preferences"])
def test_datasets_for_training_only_cannot_be_evaluated(tmp_path, key):
    with pytest.raises(ValueError, match=f"--data {key}: this dataset is for training only"):
        load_test_sources([f"{key}={tmp_path}"], 64, "train")


def names(*entries):
    return [entry.name for entry in parse_entries(entries)]


def test_folders_of_one_dataset_have_different_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("cats", "dogs, and more=less", "old/cats", "gopro"):
        (tmp_path / folder).mkdir(parents=True)
    assert names("table=cats", "gopro=gopro") == ["table", "gopro"]
    assert names("table=cats", "table=dogs, and more=less", "gopro=gopro") == [
        "table:cats",
        "table:dogs, and more=less",
        "gopro",
    ]
    assert names("table=cats", "table=old/cats", "table=gopro") == ["table:cats", "table:old/cats", "table:gopro"]
    assert names("table=owner/cats", "table=someone/dogs") == ["table:cats", "table:dogs"], "Hub ids"
    assert parse_entries(["magicbrush=osunlp/MagicBrush"])[0].folder == Path("osunlp/MagicBrush")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_entries(["table=~/cats"])[0].folder == tmp_path / "cats"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["photos=cats"], "--data must be NAME=FOLDER, .*; got 'photos=cats'. NAME is one of mpii, "),
        (["cats"], "--data must be NAME=FOLDER, .*; got 'cats'"),
        (["table="], "--data must be NAME=FOLDER, .*; got 'table='"),
        (["gopro=owner/name"], "--data gopro: there is no folder owner/name"),
        (["table=/nowhere/at/all"], "--data table: there is no folder /nowhere/at/all"),
        (["table=cats", "gopro=cats", "table=./cats/"], "--data table=./cats/ is given twice"),
    ],
)
def test_invalid_entries_raise_errors(tmp_path, monkeypatch, entries, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=message):
        parse_entries(entries)


def test_a_file_instead_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="--data coco: must be a folder; got the file .*images.zip"):
        parse_entries([f"coco={tmp_path / 'images.zip'}"])


def test_a_table_has_the_given_columns(tmp_path):
    save_image(tmp_path / "a.png", tiny.picture(32, 32, 1))
    save_image(tmp_path / "b.png", tiny.picture(32, 32, 2))
    row = {"input_file_name": "a.png", "words": "turn it", "output_file_name": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    ((source, weight),) = load_sources(
        [f"table={tmp_path}"], 32, {"image": "input", "instruction": "words", "edited": "output"}
    )
    image, edit = source.read(0, random.Random(0))
    assert (weight, edit.instruction) == (1, "turn it")
    np.testing.assert_array_equal(image, tiny.picture(32, 32, 1))
    np.testing.assert_array_equal(edit.edited, tiny.picture(32, 32, 2))


def test_the_table_of_datasets_imports_no_optional_package():
    blocked = "import sys; sys.modules |= dict.fromkeys(('pycocotools', 'skimage', 'datasets'))\n"
    subprocess.run(
        [sys.executable, "-c", blocked + "import instructdiffusion_pipeline.datasets.specs"], check=True, timeout=300
    )
