"""Restoration and editing, whose outputs are images."""

import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from scenes import photograph

from instructdiffusion_pipeline import working_size
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.frames import Frame, paste_answer
from instructdiffusion_pipeline.tasks.restoration import TEMPLATES, Restoration, add_noise
from instructdiffusion_pipeline.types import Edit

PLAIN, NOISY = photograph(random.Random(1), 120, 90), photograph(random.Random(2), 120, 90)


@pytest.mark.parametrize(
    "task, annotation", [(Restoration("noise"), PLAIN), (Editing("make it winter"), Edit("make it winter", PLAIN))]
)
def test_decoding_returns_the_target_image(task, annotation):
    assert np.array_equal(task.read(NOISY, task.draw(NOISY, annotation)), PLAIN)


@pytest.mark.parametrize("task", [Restoration("blur"), Editing("make it winter")])
def test_outputs_for_a_large_image_are_decoded_at_the_right_pixels(task):
    clean = photograph(random.Random(3), 480, 270).resize((1920, 1080), Image.Resampling.LANCZOS)
    image = ImageOps.invert(clean)
    size, box = working_size(*image.size, 512)
    answer = ImageOps.fit(ImageOps.fit(clean, size, Image.Resampling.LANCZOS), image.size, Image.Resampling.LANCZOS)
    restored = task.read(image, answer, box)
    left, top, right, bottom = map(round, box)
    inside = np.s_[top + 4 : bottom - 4, left + 4 : right - 4]
    error = np.asarray(restored, float)[inside] - np.asarray(clean, float)[inside]
    assert np.sqrt((error**2).mean()) < 3  # the working size loses details; a shift by one pixel would lose far more
    outside = np.ones((1080, 1920), bool)
    outside[top:bottom, left:right] = False
    assert np.array_equal(np.asarray(restored)[outside], np.asarray(image)[outside])


def test_outputs_of_other_sizes_are_resized_to_the_input():
    assert Restoration("blur").read(NOISY, PLAIN.resize((64, 48))).size == NOISY.size


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 2), (2, 3), (7, 2)])
def test_very_small_images_can_be_decoded(size):
    image = Image.new("RGB", size, (10, 20, 30))
    assert Editing("make it winter").read(image, image, working_size(*size, 512).box).size == size


def test_the_overlay_is_half_input_and_half_result():
    shown = np.asarray(Restoration("noise").overlay(NOISY, PLAIN))
    assert np.array_equal(shown[:, :58], np.asarray(NOISY)[:, :58])
    assert np.array_equal(shown[:, 62:], np.asarray(PLAIN)[:, 62:])


@pytest.mark.parametrize("degradation", TEMPLATES)
def test_all_wordings_of_a_degradation_are_used(degradation):
    task = Restoration(degradation)
    assert {task.instruction(random.Random(seed)) for seed in range(300)} == set(TEMPLATES[degradation])
    assert task.instruction() == f"remove the {degradation}"


def test_invalid_tasks_raise_errors():
    with pytest.raises(ValueError, match="`degradation` must be one of noise, blur, watermark; got 'rain'"):
        Restoration("rain")
    for text in ("  ", None, 3):
        with pytest.raises(ValueError, match=f"`text` must say what to edit, .* got {text!r}"):
            Editing(text)


@pytest.mark.parametrize("sigma", [5.0, 25.0])
def test_noise_has_the_requested_deviation(sigma):
    gray = Image.new("RGB", (200, 200), (128, 128, 128))
    residue = np.asarray(add_noise(gray, sigma, np.random.default_rng(0))).astype(float) - 128
    assert abs(residue.mean()) < 0.2
    # rounding to whole levels adds a variance of 1/12
    assert residue.std() == pytest.approx((sigma**2 + 1 / 12) ** 0.5, rel=0.01)


def test_noisy_values_are_clipped():
    white = Image.new("RGB", (50, 50), (255, 255, 255))
    assert np.asarray(add_noise(white, 40.0, np.random.default_rng(0))).min() > 60


def test_a_frame_has_the_requested_short_side_and_maps_points():
    image, box = Image.new("RGB", (1000, 500)), (100.0, 30.0, 900.0, 430.0)
    frame = Frame.of(image, Image.new("RGB", (1000, 500)), box, shortest=256)
    assert frame.source.shape == frame.answer.shape == (256, 512, 3)
    assert frame.scale == (800 / 512, 400 / 256)
    assert frame.point(0, 0) == pytest.approx((100 + 0.5 * 800 / 512 - 0.5, 30 + 0.5 * 400 / 256 - 0.5))
    assert frame.point(511, 255) == pytest.approx((900 - 0.5 * 800 / 512 - 0.5, 430 - 0.5 * 400 / 256 - 0.5))


def test_an_output_is_pasted_with_subpixel_accuracy():
    ramp = np.broadcast_to(1.5 * np.arange(160)[None, :, None], (120, 160, 3)).astype(np.uint8)
    for axes, box in (((0, 1, 2), (10.5, 20.25, 90.5, 80.25)), ((1, 0, 2), (20.25, 10.5, 80.25, 90.5))):
        image, answer = Image.new("RGB", (101, 101)), Image.fromarray(np.ascontiguousarray(ramp.transpose(axes)))
        pasted = np.asarray(paste_answer(image, answer, box)).transpose(axes).astype(float)
        inside = slice(15, 85)
        expected = 1.5 * ((np.arange(101) + 0.5 - 10.5) * 2 - 0.5)[inside]
        assert np.abs(pasted[25:75, inside] - expected[None, :, None]).max() < 0.8
