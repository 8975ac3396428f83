import json
import sys
from pathlib import Path

import numpy as np
import predict
import pytest
import tiny
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from instructdiffusion_pipeline import Editing, Segmentation, ask
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, most_visible_first


@pytest.fixture
def run_predict(pipe, tmp_path, monkeypatch):
    """Runs the script as the command line would, on a model of random weights and a folder of four pictures."""
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 64), (64, 96)]):
        tiny.picture(*size, seed=number).save(f"photos/{number}.png")

    def run(*options):
        argv = ["predict.py", "--model", "model", "--images", "photos", "--output", "out", "--steps", "1", *options]
        monkeypatch.setattr(sys, "argv", argv)
        run_script(predict.main)

    return run


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_masks_are_those_of_ask_and_a_coco_file(run_predict, pipe, tmp_path):
    run_predict("--task", "segmentation", "--objects", "cat, dog")
    data = COCO("out/coco.json")
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == ["cat", "dog"]
    assert [image["file_name"] for image in data.loadImgs(data.getImgIds())] == [f"photos/{n}.png" for n in range(4)]
    for number in range(4):
        image = Image.open(f"photos/{number}.png")
        task = Segmentation(dict(zip(("cat", "dog"), most_visible_first(image, MASK_COLORS), strict=False)))
        answer = ask(pipe, image, task, num_inference_steps=1, generator=predict.seeded(0, number))
        for category, (name, mask) in enumerate(answer.data.items(), 1):
            np.testing.assert_array_equal(np.asarray(Image.open(f"out/{number}-{name}.png")), mask.pixels)
            found = data.loadAnns(data.getAnnIds(imgIds=number + 1, catIds=category))
            assert len(found) == mask.pixels.any()
            for annotation in found:
                np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), mask.pixels)
                assert annotation["bbox"] == list(mask.box) and annotation["score"] == pytest.approx(mask.score)


def test_more_than_five_joints_are_asked_for_in_parts(run_predict):
    names = ["nose", "left eye", "right eye", "left ear", "right ear", "left wrist"]
    run_predict("--task", "keypoints", "--joints", ", ".join(names))
    content = json.loads(Path("out/coco.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "person", "keypoints": names}]
    assert [len(annotation["keypoints"]) for annotation in content["annotations"]] == [18] * 4


def test_edited_pictures_are_those_of_ask(run_predict, pipe):
    run_predict("--task", "editing", "--instruction", "make it night", "--batch_size", "1")
    image = Image.open("photos/1.png")
    answer = ask(pipe, image, Editing("make it night"), num_inference_steps=1, generator=predict.seeded(0, 1))
    np.testing.assert_array_equal(Image.open("out/1.png"), answer.data)


def test_a_run_continues_and_skips_what_cannot_be_read(run_predict, tmp_path, capsys):
    (tmp_path / "photos" / "4.png").write_bytes(b"no picture")
    options = ("--task", "segmentation", "--objects", "cat")
    run_predict(*options)
    captured = capsys.readouterr()
    assert "4 of 5 pictures answered" in captured.out and "4.png cannot be read" in captured.out + captured.err
    whole = contents(tmp_path / "out")
    # As after a kill: two pictures have no record, one of them not all files.
    for path in ("records/1.json", "records/3.json", "1-cat.png", "coco.json"):
        (tmp_path / "out" / path).unlink()
    run_predict(*options)
    assert contents(tmp_path / "out") == whole
    with pytest.raises(SystemExit):
        run_predict("--task", "segmentation", "--objects", "dog")
    assert "question was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--task segmentation", "--objects must be given"),
        ("--task segmentation --objects cat,cat", "different names, but is 'cat,cat'"),
        ("--task editing --instruction x --objects cat", "--objects has no effect with --task editing"),
        ("--task keypoints --joints nose --slices 0.5", "--slices must be"),
        ("--task segmentation --objects cat --images missing", "there is no file or folder missing"),
        ("--task segmentation --objects cat --images model", "the folder model has no pictures"),
    ],
)
def test_a_bad_argument_ends_with_one_line(options, told, run_predict, capsys):
    with pytest.raises(SystemExit) as exit:
        run_predict(*options.split())
    assert exit.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_batches_have_one_working_size_and_every_picture_once(pipe, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for number, path in enumerate(paths):
        Image.new("RGB", (64 + 64 * (number % 3), 64 + 32 * (number % 2))).save(path)
    found = list(predict.batches(pipe, paths, 2, predict.tqdm(disable=True)))
    sizes = [
        {pipe.working_size(*image.size, resize_mode="stretch").size for image in batch.values()} for batch in found
    ]
    assert all(len(size) == 1 for size in sizes) and all(len(batch) <= 2 for batch in found)
    assert sorted(path for batch in found for path in batch) == sorted(paths)
