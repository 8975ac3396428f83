"""The working size, the box that an output shows, and resizing to it and back."""

import json
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageOps

from instructdiffusion_pipeline import InstructDiffusionPipeline, working_size
from instructdiffusion_pipeline.pipeline_instruct_diffusion import center_crop

sides = st.integers(1, 5000)
resolutions = st.integers(16, 1024)


def test_sizes_match_the_original_except_for_its_rounding_errors(golden: Path) -> None:
    table = json.loads((golden / "inference" / "resize_table.json").read_text())
    refused, astray, astray_to_zero = 0, 0, 0
    for width, height, resolution, cli_width, cli_height, _, _ in table["rows"]:
        try:
            differs = working_size(width, height, resolution).size != (cli_width, cli_height)
        except ValueError as error:
            refused += 1
            differs = f"would become {cli_width} x {cli_height}, " not in str(error)
        astray += differs
        astray_to_zero += 0 in (cli_width, cli_height)
    assert (len(table["rows"]), refused, astray, astray_to_zero) == (2000, 48, 124, 16)


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(71, 82, (448, 512)), (197, 1576, (64, 512)), (1, 1, (512, 512))]
)
def test_sizes_at_multiples_of_64(width: int, height: int, expected: tuple[int, int]) -> None:
    assert working_size(width, height, 512).size == expected


def test_the_box_for_a_full_hd_image() -> None:
    size, box = working_size(1920, 1080, 512)
    assert size == (512, 320)
    assert box == pytest.approx((96, 54, 1824, 1026))


@given(sides, sides, resolutions)
def test_the_box_is_centered_and_has_the_aspect_ratio_of_the_image(width: int, height: int, resolution: int) -> None:
    try:
        size, (left, top, right, bottom) = working_size(width, height, resolution)
    except ValueError:
        assert 4 * max(width, height) > 4 * min(width, height)  # never square
        return
    assert all(side > 0 and side % 64 == 0 for side in size)
    assert max(size) <= 4 * resolution
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    assert (left + right, top + bottom) == pytest.approx((width, height))
    assert (right - left) * height == pytest.approx((bottom - top) * width)


@given(sides, sides, resolutions)
def test_a_transposed_image_has_the_transposed_size_and_box(width: int, height: int, resolution: int) -> None:
    try:
        size, box = working_size(width, height, resolution)
    except ValueError:
        with pytest.raises(ValueError, match="elongated"):
            working_size(height, width, resolution)
        return
    turned = working_size(height, width, resolution)
    assert turned.size == size[::-1]
    assert turned.box == pytest.approx((box[1], box[0], box[3], box[2]))


@given(sides, sides, st.sampled_from([2, 4, 8]))
def test_at_its_own_size_nothing_is_cropped(width: int, height: int, factor: int) -> None:
    size, box = working_size(width, height, 0, factor)
    assert box == (0, 0, width, height)
    for worked, given_side in zip(size, (width, height), strict=True):
        assert worked % factor == 0
        assert given_side - factor < worked <= max(given_side, factor)


@pytest.mark.parametrize("size", [(1920, 1080), (100, 150), (97, 130)])
def test_the_box_is_the_part_that_remains_after_both_crops(size: tuple[int, int]) -> None:
    """Two ramps show for each pixel its position in the input."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    worked, box = working_size(*size, 512)
    for ramp, low, high, axis in ((x, box[0], box[2], 0), (y, box[1], box[3], 1)):
        picture = PIL.Image.fromarray(ramp.astype(np.float32))
        there = ImageOps.fit(picture, worked, PIL.Image.Resampling.LANCZOS)
        back = np.asarray(ImageOps.fit(there, size, PIL.Image.Resampling.LANCZOS)).mean(axis=axis)
        middle = back[len(back) // 2 - 5 : len(back) // 2 + 6]
        scale = (high - low) / len(back)
        expected = low + (np.arange(len(back) // 2 - 5, len(back) // 2 + 6) + 0.5) * scale
        assert middle == pytest.approx(expected, abs=0.1)


def test_center_crop_keeps_the_largest_box() -> None:
    assert center_crop((100, 50), (10, 10)) == (25, 0, 75, 50)
    assert center_crop((50, 100), (10, 10)) == (0, 25, 50, 75)
    assert center_crop((30, 20), (300, 200)) == (0, 0, 30, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 512), "`image` must be at least 1 x 1 pixel; got 0 x 5"),
        ((5, 5, 15), "`resolution` must be 0 .* at least 16 .* got 15"),
        ((5, 5, 512.0), "`resolution` .* got 512.0"),
        ((2000, 30, 512), "`image` of 2000 x 30 pixels is too elongated"),
    ],
)
def test_invalid_sizes_raise_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        working_size(*arguments)


@pytest.mark.parametrize("mode", ["crop", "stretch"])
def test_sides_of_exactly_four_to_one_are_accepted(mode: str) -> None:
    assert working_size(400, 100, 64, resize_mode=mode).size == (256, 64)
    assert working_size(100, 400, 64, resize_mode=mode).size == (64, 256)
    with pytest.raises(ValueError, match="too elongated"):
        working_size(500, 100, 64, resize_mode=mode)


def test_defaults_are_the_multiples_of_stable_diffusion() -> None:
    assert working_size(23, 31, 0).size == (16, 24)
    assert working_size(600, 400, 96).size == (64, 64) and working_size(600, 400, 96, size_multiple=16).size == (
        96,
        64,
    )
    assert working_size(100, 100, 100, resize_mode="stretch") == ((128, 128), (0, 0, 100, 100))
    assert working_size(100, 100, 16, resize_mode="stretch").size == (64, 64), "at least one multiple"


@pytest.mark.parametrize("resolution", [0, 64])
@pytest.mark.parametrize("size", [(33, 50), (64, 64), (1, 1), (70, 30)])
def test_pil_outputs_have_the_input_size_and_arrays_the_working_size(
    pipe: InstructDiffusionPipeline, size: tuple[int, int], resolution: int
) -> None:
    call = tiny.inputs(image=tiny.picture(*size), num_inference_steps=1, resolution=resolution)
    (answer,) = pipe(**call | {"output_type": "pil"}).images
    array = pipe(**call | {"output_type": "np"}).images
    tensor = pipe(**call | {"output_type": "pt"}).images
    latent = pipe(**call | {"output_type": "latent"}).images
    width, height = working_size(*size, resolution, pipe.vae_scale_factor).size
    assert answer.size == size
    assert answer.mode == "RGB"
    assert array.shape == (1, height, width, 3)
    assert tensor.shape == (1, 3, height, width)
    assert latent.shape == (1, 4, height // 2, width // 2)


def test_a_crop_warns_how_much_it_cuts_off(pipe: InstructDiffusionPipeline) -> None:
    wide = tiny.picture(160, 100)
    with pytest.warns(
        UserWarning,
        match='`resize_mode="crop"` cuts off 38% of the image, 61% with PIL output; "stretch" uses all of it',
    ):
        pipe(**tiny.inputs(image=wide, num_inference_steps=1, resolution=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for settings in ({"resize_mode": "stretch", "resolution": 64}, {"resolution": 0}):
            pipe(**tiny.inputs(image=wide, num_inference_steps=1) | settings)
        pipe(**tiny.inputs(image=tiny.picture(100, 100), num_inference_steps=1, resolution=64))


def test_pil_outputs_are_truncated_to_8_bits_and_fitted_back(pipe: InstructDiffusionPipeline) -> None:
    call = tiny.inputs(image=tiny.picture(60, 40), resolution=64)
    array = pipe(**call | {"generator": tiny.generator()}).images[0]
    (answer,) = pipe(**call | {"generator": tiny.generator(), "output_type": "pil"}).images
    cut = PIL.Image.fromarray((array * 255).astype(np.uint8))
    assert array.shape == (64, 64, 3)
    assert np.array_equal(np.asarray(answer), np.asarray(ImageOps.fit(cut, (60, 40), PIL.Image.Resampling.LANCZOS)))


def test_images_of_one_call_must_have_one_working_size(pipe: InstructDiffusionPipeline) -> None:
    pictures = [tiny.picture(60, 40), tiny.picture(64, 60), tiny.picture(66, 57)]
    answers = pipe(**tiny.inputs(image=pictures, resolution=64, output_type="pil")).images
    assert [answer.size for answer in answers] == [(60, 40), (64, 60), (66, 57)]
    with pytest.raises(
        ValueError, match=r"`image` .* 60 x 40, 64 x 60, 66 x 57 pixels .* 60 x 40, 64 x 60, 66 x 56\."
    ):
        pipe(**tiny.inputs(image=pictures))
