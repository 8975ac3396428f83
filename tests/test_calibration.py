"""Calibrated scores: the fit, its error, and the setting of the model that `ask` applies."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Segmentation, ask
from instructdiffusion_pipeline.calibration import (
    Platt,
    calibrate_answer,
    expected_calibration_error,
    fit_platt,
    reliability,
)
from instructdiffusion_pipeline.evaluation.calibrate import save_calibration
from instructdiffusion_pipeline.fingerprint import pipeline_fingerprint
from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint

QUICK = {"num_inference_steps": 1}


def answers(slope, intercept, count=4000, seed=0):
    """Scores, and whether each is right, with the probability sigmoid(slope * logit(score) + intercept)."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.05, 0.95, count)
    odds = slope * np.log(scores / (1 - scores)) + intercept
    return scores, rng.random(count) < 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize("slope, intercept", [(1, 0), (0.5, 1), (3, -2)])
def test_the_fit_agrees_with_gradient_descent_and_the_true_parameters(slope, intercept):
    scores, right = answers(slope, intercept)
    odds = torch.tensor(np.log(scores / (1 - scores)))
    positive, negative = right.sum(), (~right).sum()
    targets = torch.tensor(np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2)))
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(weights[0] * odds + weights[1], targets)
        value.backward()
        return value

    search.step(loss)
    fit = fit_platt(scores, right)
    assert fit == pytest.approx(weights.detach().tolist(), abs=1e-4)
    assert fit == pytest.approx((slope, intercept), abs=0.25)


def test_the_fit_reduces_the_calibration_error_on_other_scores():
    fit = fit_platt(*answers(3, -2))
    scores, right = answers(3, -2, seed=1)
    assert expected_calibration_error(scores, right) > 0.1
    assert expected_calibration_error([fit(score) for score in scores], right) < 0.03


def test_scores_that_separate_right_from_wrong_have_a_finite_fit():
    fit = fit_platt([0.0, 0.1, 0.9, 1.0], [False, False, True, True])
    assert math.isfinite(fit.slope) and fit(0.1) < 0.4 < 0.6 < fit(0.9)


@pytest.mark.parametrize(
    "scores, right, told",
    [
        ([0.3, 0.6], [True, True], "`right` must have right and wrong answers; 2 of 2 are right"),
        ([0.3, 0.6], [False, False], "0 of 2 are right"),
        ([], [], "0 of 0 are right"),
        ([0.9, 0.8, 0.1, 0.2], [False, False, True, True], "`scores` must be higher for right answers"),
    ],
)
def test_scores_that_cannot_be_fitted_raise_errors(scores, right, told):
    with pytest.raises(ValueError, match=told):
        fit_platt(scores, right)


@given(
    slope=st.floats(0.01, 20),
    intercept=st.floats(-20, 20),
    scores=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_calibration_keeps_the_order_the_range_and_zero(slope, intercept, scores):
    low, high = map(Platt(slope, intercept), scores)
    assert 0 <= low <= high <= 1
    assert Platt(slope, intercept)(0) == 0


def test_the_reliability_curve_and_its_error():
    scores, right = [0.11, 0.13, 0.95, 1.0, 0.95, 0.95], [False, True, True, True, True, False]
    low, high = reliability(scores, right)
    assert low == pytest.approx((2, 0.12, 0.5)) and high == pytest.approx((4, 0.9625, 0.75))
    assert expected_calibration_error(scores, right) == pytest.approx((2 * 0.38 + 4 * 0.2125) / 6)
    assert expected_calibration_error([], []) is None and reliability([], []) == []


def test_absent_masks_and_joints_have_the_score_zero():
    pixels = np.ones((4, 4), bool)
    masks = {"cat": Mask(pixels, 0.8), "dog": Mask(~pixels, 0.25)}
    found = calibrate_answer(masks, Platt(1, 1))
    assert found["cat"].score == pytest.approx(1 / (1 + math.exp(-(math.log(4) + 1))))
    assert found["dog"].score == 0 and found["cat"].pixels is pixels
    joints = calibrate_answer({"nose": Joint(1, 2, 0.5), "left ear": None}, Platt(1, 1))
    assert joints == {"nose": pytest.approx((1, 2, 1 / (1 + math.exp(-1)))), "left ear": None}


def test_ask_applies_the_calibration_of_the_model_which_is_saved(monkeypatch, tmp_path):
    pipe = InstructDiffusionPipeline(**tiny.components())
    fits = {"segmentation": Platt(1.5, -0.5), "keypoints": Platt(0.7, 0.25)}
    assert pipe.config.score_calibration == {}
    pipe.save_pretrained(tmp_path / "model")
    save_calibration(fits, tmp_path / "model")
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["score_calibration"] == {"segmentation": [1.5, -0.5], "keypoints": [0.7, 0.25]}
    again = InstructDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert again.config.score_calibration == index["score_calibration"]
    assert pipeline_fingerprint(again) != pipeline_fingerprint(pipe)

    def margins(task, image, *_):
        (name,) = task.colors
        return {name: np.full((image.height, image.width), {"cat": 0.3, "dog": 0.1, "bird": -0.2}[name])}

    def masks(pipe):
        pipe.set_progress_bar_config(disable=True)
        return [ask(pipe, tiny.picture(64, 64), Segmentation({name: "blue"}), **QUICK).data[name] for name in names]

    monkeypatch.setattr(Segmentation, "margins", margins)
    names = ("cat", "dog", "bird")
    assert [mask.score for mask in masks(pipe)] == pytest.approx([0.6, 0, 0])
    assert [mask.score for mask in masks(again)] == [pytest.approx(fits["segmentation"](0.6)), 0, 0]


def test_scores_of_another_decoding_are_not_calibrated(monkeypatch):
    pipe = InstructDiffusionPipeline(**tiny.components(), score_calibration={"keypoints": [2, 1]})
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(Keypoints, "read", lambda *_: {"nose": Joint(1, 2, 0.5), "left ear": None})

    def ask_joints(**options):
        task = Keypoints({"nose": "red", "left ear": "blue"})
        return ask(pipe, tiny.picture(64, 64), task, **options, **QUICK).data

    assert ask_joints() == {"nose": Joint(1, 2, Platt(2, 1)(0.5)), "left ear": None}
    assert ask_joints(use_readout=False) == ask_joints(), "there is no other decoding"
    pipe.register_modules(
        readout=UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    )
    assert ask_joints(use_readout=False)["nose"].score == 0.5


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        "keypoints",
        {"editing": [1, 0]},
        {"keypoints": [1]},
        {"keypoints": [1, 0, 0]},
        {"keypoints": [0, 1]},
        {"keypoints": [-1, 1]},
        {"keypoints": [1, math.nan]},
        {"keypoints": [math.inf, 0]},
        {"keypoints": ["1", 0]},
        {"keypoints": "10"},
        {"keypoints": None},
        {"keypoints": 1.0},
        {1: [1, 0]},
    ],
)
def test_invalid_settings_raise_errors(value):
    with pytest.raises(ValueError, match="`score_calibration` must be a mapping of"):
        InstructDiffusionPipeline(**tiny.components(), score_calibration=value)


def test_the_fingerprint_of_a_model_has_the_scale_of_its_lora(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    found = set()
    for weight in (1.0, 0.5):
        pipe.set_adapters(["style"], [weight])
        found.add(pipeline_fingerprint(pipe))
    pipe.disable_lora()
    found.add(pipeline_fingerprint(pipe))
    assert len(found) == 3
    pipe.enable_lora()
    assert pipeline_fingerprint(pipe) in found
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "light")
    for adapters in (["style"], ["light"], ["style", "light"]):
        pipe.set_adapters(adapters)
        found.add(pipeline_fingerprint(pipe))
    assert len(found) == 6


def test_the_fingerprint_of_a_model_has_its_configuration_but_not_its_path(tmp_path):
    pipe = InstructDiffusionPipeline(**tiny.components())
    whole = pipeline_fingerprint(pipe)
    pipe.save_pretrained(tmp_path / "model")
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.tokenizer("a cat", padding="max_length", truncation=True)
    assert pipeline_fingerprint(loaded) == whole
    scale = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=0.5 * scale)
    assert pipeline_fingerprint(pipe) != whole
    pipe.vae.register_to_config(scaling_factor=scale)
    assert pipeline_fingerprint(pipe) == whole
    pipe.text_encoder.config.hidden_act = "gelu"
    assert pipeline_fingerprint(pipe) != whole
