"""The scripts that calibrate scores: their options, and the calibration that they write to the model."""

import json
import sys

import calibrate
import calibration
import pytest
import tiny

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.calibration import Platt
from instructdiffusion_pipeline.cli import run_script


@pytest.fixture
def model(tmp_path):
    InstructDiffusionPipeline(**tiny.components()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def calls(monkeypatch):
    """The calls of `calibrate`, which is replaced because it needs a trained model."""
    made = []

    def replaced(pipeline, examples, held_out, folder, batch_size):
        for example in [*examples, *held_out]:
            example.open()
        used, of_test = ([example.source.transform for example in group] for group in (examples, held_out))
        assert all(transform == of_test[0] for transform in used), "answers to random crops have other scores"
        made.append([sorted({example.row for example in group}) for group in (examples, held_out)])
        folder.mkdir(parents=True)
        (folder / "reliability.md").write_text("| the table |\n")
        return {"keypoints": Platt(1.25, -0.3333333)}

    for script in (calibrate, calibration):
        monkeypatch.setattr(script, "calibrate", replaced)
    return made


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    run_script(script.main)


def test_the_calibration_is_written_to_the_model(monkeypatch, capsys, tmp_path, model, coco, calls):
    before = json.loads((model / "model_index.json").read_text())
    options = ("--model", model, "--data", f"coco={coco}", "--output_dir", tmp_path / "out" / "run")
    run(monkeypatch, calibrate, *options)
    assert calls == [[["coco train2017"], ["coco val2017"]]] and "| the table |" in capsys.readouterr().out
    after = json.loads((model / "model_index.json").read_text())
    assert after == before | {"score_calibration": {"keypoints": [1.25, -0.3333]}}
    loaded = InstructDiffusionPipeline.from_pretrained(model)
    assert loaded.config.score_calibration == {"keypoints": [1.25, -0.3333]}


def test_instructdiffusion_tiny_is_calibrated_on_its_world(
    monkeypatch, capsys, tmp_path, model, world_folder, tiny_recipe, calls
):
    sizes = ("--samples", 2, "--test_samples", 2)
    run(monkeypatch, calibration, "--model", model, "--world", world_folder, *sizes, "--output_dir", tmp_path / "out")
    styles = ["masks, another drawing style", "masks, styles of training"]
    assert calls == [[["joints", "masks, training scenes"], ["joints", *styles]]]
    assert "| the table |" in capsys.readouterr().out
    assert json.loads((model / "model_index.json").read_text())["score_calibration"] == {"keypoints": [1.25, -0.3333]}


def test_images_have_the_larger_resolution_of_both_tasks(monkeypatch, tmp_path, coco, calls):
    sizes, replaced = [], calibrate.calibrate
    settings = {"segmentation": {"resolution": 48}}
    InstructDiffusionPipeline(**tiny.components(), task_settings=settings).save_pretrained(tmp_path / "model")

    def record(pipeline, examples, *args):
        sizes.extend(example.open().image.size for example in examples)
        return replaced(pipeline, examples, *args)

    monkeypatch.setattr(calibrate, "calibrate", record)
    data = ("--data", f"coco={coco}")
    run(monkeypatch, calibrate, "--model", tmp_path / "model", *data, "--output_dir", tmp_path / "out")
    assert sizes == [(48, 48)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data", "gopro=."], "--data gopro: there are scores for datasets of masks or joints only: mpii, coco, "),
        (["--data", "nothing=."], "--data must be NAME=FOLDER, such as"),
        (["--data", "coco=missing"], "--data coco: there is no folder missing"),
        (["--data", "coco=.", "--model", "missing"], "--model: must be the folder of a pipeline"),
        (["--data", "coco=.", "--samples", "0"], "--samples: must be at least 1"),
    ],
)
def test_bad_arguments_have_status_2(monkeypatch, capsys, tmp_path, model, options, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, calibrate, "--model", model, "--output_dir", "out", *options)
    assert exit.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
