"""Calibration on the outputs of a model, which are replaced here with known masks and joints."""

import json
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import tiny
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Segmentation
from instructdiffusion_pipeline.evaluation import Example, LazyExample
from instructdiffusion_pipeline.evaluation.calibrate import calibrate, save_calibration
from instructdiffusion_pipeline.evaluation.scoring import judged, measure, summarize
from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint
from instructdiffusion_pipeline.views import Response

ask_module = import_module("instructdiffusion_pipeline.ask")  # the package has a function of this name
SQUARE = np.zeros((64, 64), bool)
SQUARE[16:48, 16:48] = True
BOX = (0, 0, 64, 64)


@pytest.fixture
def painter(monkeypatch):
    """A pipeline that paints all requested objects in the center; those called "clear" have the highest scores."""

    def run_views(pipeline, views, *args, **settings):
        responses = []
        for view in views:
            (name,) = view.task.colors
            what = {name: SQUARE} if isinstance(view.task, Segmentation) else {name: Joint(32, 32)}
            drawn = view.task.draw(view.image, what)
            shown = Image.blend(view.image, drawn, 1.0 if "clear" in name else 0.8)
            responses.append(Response(shown, None, BOX, False))
        return responses

    monkeypatch.setattr(ask_module, "run_views", run_views)
    pipe = InstructDiffusionPipeline(**tiny.components(), score_calibration={"segmentation": [9, 9]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def examples(row, seed):
    """9 of 10 of the clear outputs are right, and 1 of 10 of the others."""
    image, found = tiny.picture(64, 64, seed), []
    for number in range(10):
        for name in ("clear", "faint"):
            there = (number > 0) == (name == "clear")
            mask = SQUARE if there else np.zeros_like(SQUARE)
            joint = Joint(33, 33) if there else None
            for kind, task, truth in (
                ("masks", Segmentation({name: "blue"}), {name: mask}),
                ("joints", Keypoints({name: "red"}), {name: joint}),
            ):
                label = f"{row} {kind}"
                found.append(LazyExample(f"{label} {name} {number}", label, partial(Example, image, [task], truth)))
    return found


def test_calibrated_scores_are_the_fraction_of_right_answers(painter, tmp_path):
    run = (painter, examples("train", 1), examples("test", 2), tmp_path / "run")
    with pytest.warns(UserWarning, match="segmentation were calibrated with 20 masks only") as caught:
        fits = calibrate(*run)
    assert sum("keypoints were calibrated with 20 joints only" in str(each.message) for each in caught) == 1
    assert painter.config.score_calibration == {family: list(fit) for family, fit in fits.items()}
    assert fits.keys() == {"segmentation", "keypoints"}
    records = [json.loads(line) for line in (tmp_path / "run" / "held-out" / "records.jsonl").read_text().splitlines()]
    for record in records:
        ((score, right),) = judged(record["measures"]["model"])
        # The targets of the fit are not exactly 0 and 1, so scores are a little closer to 0.5.
        assert score == pytest.approx(0.9 if "clear" in record["name"] else 0.1, abs=0.08), record["name"]
        assert right == (("clear" in record["name"]) != record["name"].endswith(" 0"))
    table = (tmp_path / "run" / "reliability.md").read_text().splitlines()
    assert sum(line.startswith("| test masks | 10 |") for line in table) == 2
    assert sum("ECE 0.0" in line for line in table) == 2
    results = json.loads((tmp_path / "run" / "held-out" / "results.json").read_text())
    raw = json.loads((tmp_path / "run" / "answers" / "results.json").read_text())
    for before, after in zip(raw["rows"], results["rows"], strict=True):
        assert after["scores"]["ECE"]["model"] < 0.08 < 0.2 < before["scores"]["ECE"]["model"]
    assert calibrate(*run) == fits, "a finished run is not run again"


def test_enough_answers_cause_no_warning(painter, tmp_path, recwarn):
    many = [example for seed in range(5) for example in examples(f"train {seed}", seed)]
    calibrate(painter, many, examples("test", 9), tmp_path / "run")
    assert not [each for each in recwarn if "calibrated with" in str(each.message)]


def test_a_family_without_examples_keeps_its_calibration(painter, tmp_path):
    joints = [example for example in examples("train", 1) if "joints" in example.row]
    assert 0 < len(joints) < len(examples("train", 1))
    fits = calibrate(painter, joints, joints, tmp_path / "run")
    assert fits.keys() == {"keypoints"}
    assert painter.config.score_calibration == {"segmentation": [9, 9], "keypoints": list(fits["keypoints"])}
    painter.register_to_config(score_calibration={"segmentation": [9, 9]})
    painter.save_pretrained(tmp_path / "model")
    save_calibration(fits, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "model_index.json").read_text())["score_calibration"]
    assert saved["segmentation"] == [9, 9] and saved["keypoints"] == pytest.approx(fits["keypoints"], abs=1e-4)


def test_outputs_that_cannot_be_calibrated_raise_errors(painter, tmp_path):
    few = [example for example in examples("train", 1) if "clear" in example.name and not example.name.endswith(" 0")]
    with pytest.raises(ValueError, match="the scores of segmentation cannot be calibrated: `right` must have"):
        calibrate(painter, few, few, tmp_path / "run")
    assert painter.config.score_calibration == {"segmentation": [9, 9]}, "as before"


def test_right_and_wrong_masks_and_joints():
    image = Image.new("RGB", (64, 64))
    half = SQUARE.copy()
    half[:, :33] = False  # IoU 15/32
    most = SQUARE.copy()
    most[:, :31] = False  # IoU 17/32
    masks = {
        "most": most,
        "half": half,
        "absent": SQUARE,
        "stray": np.zeros_like(SQUARE),
        "empty": np.zeros_like(SQUARE),
    }
    masks["stray"][0, 0] = True
    truth = {"most": SQUARE, "half": SQUARE, "empty": SQUARE}
    task = Segmentation(dict(zip(masks, ("red", "blue", "green", "yellow", "white"), strict=True)))
    reading = {name: Mask(pixels, 0.5 + index / 10) for index, (name, pixels) in enumerate(masks.items())}
    found = measure(Example(image, [task], truth), reading, BOX)
    assert judged(found) == [(0.5, True), (0.6, False), (0.7, False), (0.8, False)]
    assert summarize([found])["ECE"] == pytest.approx((0.5 + 0.6 + 0.7 + 0.8) / 4)

    joints = {"near": Joint(10, 10, 0.9), "far": Joint(10, 10, 0.8), "absent": Joint(1, 1, 0.7), "missed": None}
    truth = {"near": Joint(13, 10), "far": Joint(14, 10), "absent": None, "missed": Joint(5, 5)}
    task = Keypoints(dict(zip(joints, ("red", "blue", "green", "yellow"), strict=True)))
    found = measure(Example(image, [task], truth), joints, BOX)
    assert judged(found) == [(0.9, True), (0.8, False), (0.7, False)]
