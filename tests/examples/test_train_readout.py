"""The script that trains a readout, with datasets in files and a model of random weights."""

import json
import sys

import numpy as np
import pytest
import tiny
import train_readout
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script

SPLITS = ("train2017", "val2017")


@pytest.fixture
def model(tmp_path):
    settings = {"segmentation": {"num_inference_steps": 1}, "keypoints": {"num_inference_steps": 1}}
    InstructDiffusionPipeline(**tiny.components(), task_settings=settings).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def coco_stuff(tmp_path):
    root = tmp_path / "stuff"
    for part in ("images", "annotations"):
        for split in SPLITS:
            (root / part / split).mkdir(parents=True)
    (root / "labels.txt").write_text("0: unlabeled\n1: person\n2: bicycle\n")
    for index in range(4):
        split = SPLITS[index % 2]
        tiny.picture(64, 48, index).save(root / "images" / split / f"{index}.jpg")
        label = np.full((48, 64), 255, np.uint8)
        label[10:40, 10:60] = 1
        Image.fromarray(label).save(root / "annotations" / split / f"{index}.png")
    return root


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_readout.py", *map(str, arguments)])
    run_script(train_readout.main)


def test_masks_and_joints_may_have_different_resolutions(monkeypatch, tmp_path, coco_stuff, coco):
    settings = {"segmentation": {"num_inference_steps": 1, "resolution": 48}, "keypoints": {"num_inference_steps": 1}}
    InstructDiffusionPipeline(**tiny.components(), task_settings=settings).save_pretrained(tmp_path / "model")
    data = ["--data", f"coco-stuff={coco_stuff}", f"coco={coco}", "--max_train_steps", 2]
    run(monkeypatch, "--model", tmp_path / "model", *data, "--output_dir", tmp_path / "out")
    assert InstructDiffusionPipeline.from_pretrained(tmp_path / "model").readout.config.sample_size == 48


def test_a_readout_for_masks_and_joints_is_saved_in_the_model_folder(
    monkeypatch, capsys, tmp_path, model, coco_stuff, coco
):
    output = tmp_path / "out" / "readout"
    data = ["--data", f"coco-stuff={coco_stuff}", f"coco={coco}", "--max_train_steps", 2]
    run(monkeypatch, "--model", model, *data, "--output_dir", output)
    loaded = InstructDiffusionPipeline.from_pretrained(model)
    assert loaded.readout.config.sample_size == loaded.default_resolution == 32
    asked = json.loads((output / "answers" / "results.json").read_text())
    assert {row["row"]: row["samples"] for row in asked["rows"]} == {"coco-stuff": 2, "coco": 1}
    table = (output / "held-out" / "table.md").read_text()
    assert "| coco-stuff val2017 | mcIoU" in table and "| coco val2017 | PCK" in table and "decoding by color" in table
    assert table in capsys.readouterr().out

    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--model", model, *data, "--output_dir", output)
    assert exit.value.code == 2 and "has a readout; --overwrite replaces it" in capsys.readouterr().err
    weights = (model / "readout" / "diffusion_pytorch_model.safetensors").read_bytes()
    run(monkeypatch, "--model", model, *data, "--output_dir", output, "--overwrite")
    assert (model / "readout" / "diffusion_pytorch_model.safetensors").read_bytes() == weights, "the run continued"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data", "gopro=."], "--data gopro: a readout is for datasets of masks or joints: mpii, coco, "),
        (["--data", "nothing=."], "--data must be NAME=FOLDER, such as"),
        (["--data", "coco=missing"], "--data coco: there is no folder missing"),
        (["--data", "coco=.", "--model", "missing"], "--model: must be the folder of a pipeline"),
        (["--data", "coco=.", "--size", "8"], "--size: must be at least 16"),
    ],
)
def test_bad_arguments_have_status_2(monkeypatch, capsys, tmp_path, model, options, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--model", model, "--output_dir", "out", *options)
    assert exit.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (model / "readout").exists()
