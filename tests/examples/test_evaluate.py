"""The command line of the evaluation on datasets in files, with a model of random weights."""

import importlib.util
import json
import re
import shutil
import sys

import numpy as np
import pytest
import tiny
from diffusers import UNet2DConditionModel
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError

# Imported by path, because other tests may have put other folders first in sys.path.
spec = importlib.util.spec_from_file_location("evaluate_data_sets", tiny.ROOT / "examples" / "evaluate.py")
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)

SETTINGS = {"restoration": {"num_inference_steps": 9, "guidance_scale": 0.75, "image_guidance_scale": 0.75}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    InstructDiffusionPipeline(**tiny.components(), task_settings=SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture
def coco_stuff(tmp_path):
    root = tmp_path / "stuff"
    for part in ("images", "annotations"):
        (root / part / "val2017").mkdir(parents=True)
    (root / "labels.txt").write_text("0: unlabeled\n1: person\n2: bicycle\n")
    for index in range(3):
        tiny.picture(64, 48, index).save(root / "images" / "val2017" / f"{index}.jpg")
        label = np.full((48, 64), 255, np.uint8)
        label[10:30, 10:40] = 1
        Image.fromarray(label).save(root / "annotations" / "val2017" / f"{index}.png")
    return root


@pytest.fixture
def gopro(tmp_path):
    root = tmp_path / "gopro"
    for part in ("blur", "sharp"):
        (root / "test" / "clip" / part).mkdir(parents=True)
        for index in range(4):
            tiny.picture(80, 64, index).save(root / "test" / "clip" / part / f"{index}.png")
    (root / "test" / "clip" / "blur" / "2.png").write_bytes(b"not a picture")
    return root


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_each_task_is_evaluated_at_its_own_resolution(monkeypatch, tmp_path, coco_stuff):
    settings = {"segmentation": {"num_inference_steps": 1, "resolution": 64}}
    InstructDiffusionPipeline(**tiny.components(), task_settings=settings).save_pretrained(tmp_path / "model")
    sides = []
    predict, score = UNet2DConditionModel.forward, evaluate.evaluate

    def record(unet, sample, *args, **kwargs):
        sides.append(min(sample.shape[-2:]))
        return predict(unet, sample, *args, **kwargs)

    def only_record_the_evaluation(*args, **kwargs):
        sides.clear()  # of a trial run after loading
        return score(*args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    monkeypatch.setattr(evaluate, "evaluate", only_record_the_evaluation)
    options = ("--model", tmp_path / "model", "--data", f"coco-stuff={coco_stuff}", "--samples", 1)
    for given, side in ((), 64), (("--resolution", 32), 32):
        call(monkeypatch, *options, *given, "--output", tmp_path / f"out-{side}")
        factor = InstructDiffusionPipeline.from_pretrained(tmp_path / "model").vae_scale_factor
        assert set(sides) == {side // factor}


def test_datasets_are_rows_of_one_table(monkeypatch, capsys, tmp_path, model, coco, coco_stuff, gopro):
    data = [f"--data={name}={root}" for name, root in [("coco", coco), ("coco-stuff", coco_stuff), ("gopro", gopro)]]
    output = tmp_path / "output"
    call(monkeypatch, "--model", model, *data, "--steps", 1, "--output", output, "--samples", 4)
    rows = {row["row"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    assert {name: row["samples"] for name, row in rows.items()} == {
        "coco val2017": 1,
        "coco-stuff val2017": 3,
        "gopro test": 3,
    }
    assert "AP" in rows["coco val2017"]["scores"] and "mcIoU" in rows["coco-stuff val2017"]["scores"]
    assert rows["gopro test"]["scores"]["PSNR"]["input"] == 100, "blurred and sharp images are the same here"
    (failure,) = rows["gopro test"]["failed"]
    assert failure["name"] == "gopro test 2: clip/blur/2.png" and "UnreadableSample" in failure["error"]
    assert (output / "table.md").read_text() in capsys.readouterr().out
    assert {path.name for path in output.glob("*.png")} == {
        "coco-val2017.png",
        "coco-stuff-val2017.png",
        "gopro-test.png",
    }


def test_a_table_of_image_pairs_is_scored(monkeypatch, tmp_path, model):
    folder, rows = tmp_path / "mine", []
    folder.mkdir()
    for number in range(2):
        for name in ("before", "after"):
            tiny.picture(48, 40, number).save(folder / f"{name}{number}.png")
        columns = ("original_image_file_name", f"before{number}.png"), ("edited_image_file_name", f"after{number}.png")
        rows.append(dict(columns) | {"edit_prompt": "leave it"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call(monkeypatch, "--model", model, f"--data=table={folder}", "--steps", 1, "--output", tmp_path / "output")
    (row,) = json.loads((tmp_path / "output" / "results.json").read_text())["rows"]
    assert (row["row"], row["samples"], row["scores"]["PSNR"]["input"]) == ("table train", 2, 100)


def test_settings_come_from_the_model_and_steps_from_the_command_line(monkeypatch, tmp_path, model, gopro):
    def steps(folder, *arguments):
        seen = []
        original = InstructDiffusionPipeline.prepare_timesteps

        def prepare_timesteps(self, num_inference_steps, *rest):
            seen.append((num_inference_steps, self.guidance_scale))
            return original(self, num_inference_steps, *rest)

        monkeypatch.setattr(InstructDiffusionPipeline, "prepare_timesteps", prepare_timesteps)
        call(monkeypatch, "--model", model, f"--data=gopro={gopro}", "--samples", 1, "--output", folder, *arguments)
        return set(seen) - {(20, 0.5)}  # from the step that checks the model

    assert steps(tmp_path / "own") == {(9, 0.75)}
    assert steps(tmp_path / "fewer", "--steps", 2) == {(2, 0.75)}


def test_two_folders_of_one_dataset_are_two_rows(monkeypatch, tmp_path, model, gopro):
    other = tmp_path / "other"
    shutil.copytree(gopro, other)
    data = [f"--data=gopro={folder}" for folder in (gopro, other)]
    call(monkeypatch, "--model", model, *data, "--samples", 1, "--steps", 1, "--output", tmp_path / "output")
    rows = [row["row"] for row in json.loads((tmp_path / "output" / "results.json").read_text())["rows"]]
    assert rows == ["gopro:gopro test", "gopro:other test"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gopr=/x", "--data must be NAME=FOLDER, such as table=my-pictures; got 'gopr=/x'. NAME is one of"),
        ("gopro=/nowhere", "--data gopro: there is no folder /nowhere"),
        ("gopro=/tmp", "/tmp/test: no samples found"),
        ("coco=/tmp", "There is no file .*person_keypoints_val2017.json; it must be a JSON file of COCO keypoints"),
        ("captions=/tmp", "this dataset is for training only"),
    ],
)
def test_data_that_cannot_be_read_is_reported(monkeypatch, tmp_path, model, data, message):
    with pytest.raises(ValueError) as caught:
        call(monkeypatch, "--model", model, "--data", data, "--output", tmp_path / "output")
    assert re.search(message, str(caught.value)), caught.value
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table", "--clip: no CLIP model could be loaded from .*/clip "),
        ("gopro", "--clip: has an effect on editing only; --data has no dataset of edits."),
    ],
)
def test_an_unusable_clip_model_raises_an_error(monkeypatch, tmp_path, model, gopro, name, message):
    folder = {"gopro": gopro, "table": tmp_path / "table"}[name]
    (tmp_path / "table").mkdir()
    tiny.picture(64, 64).save(tmp_path / "table" / "0.png")
    columns = {"original_image_file_name": "0.png", "edited_image_file_name": "0.png", "edit_prompt": "leave it"}
    (tmp_path / "table" / "metadata.jsonl").write_text(json.dumps(columns))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match=message):
        call(monkeypatch, "--model", model, f"--data={name}={folder}", "--clip", tmp_path / "clip")


def test_columns_without_a_table_and_negative_seeds_are_errors(monkeypatch, model, gopro, tmp_path, capsys):
    options = ("--model", model, "--data", f"gopro={gopro}", "--output", tmp_path / "out")
    with pytest.raises(UsageError, match=r"--\*_column: has an effect on tables only; --data has none"):
        call(monkeypatch, *options, "--instruction_column", "text")
    with pytest.raises(SystemExit):
        call(monkeypatch, *options, "--seed", -1)
    assert "--seed: must be at least 0; got -1" in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("a,b\n")
    (tmp_path / "bad.parquet").write_text("ab")
    with pytest.raises(UsageError, match="bad.parquet cannot be read as a table: .*Parquet"):
        call(monkeypatch, *options[:2], f"--data=table={tmp_path}/bad.parquet", *options[4:])
    with pytest.raises(UsageError, match="must be a folder, a parquet file or a Hub id; got the file .*pairs.csv"):
        call(monkeypatch, *options[:2], f"--data=table={tmp_path}/pairs.csv", *options[4:])


def test_sidd_is_not_scored_on_its_training_data(monkeypatch, tmp_path, model):
    (tmp_path / "Data").mkdir()
    with pytest.raises(ValueError, match="`split` is 'val', but .*Data is the split 'train'"):
        call(monkeypatch, "--model", model, f"--data=sidd={tmp_path}", "--output", tmp_path / "output")
