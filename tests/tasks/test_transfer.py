"""The functions of `transfer`, with the VAE's reconstruction of the true target as the output of a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from skimage.transform import SimilarityTransform, warp

from instructdiffusion_pipeline.tasks.transfer import (
    BAND_WEIGHT,
    EDGE_RIDGE,
    FULL_FIT,
    guided_fit,
    transfer_change,
    transfer_denoised,
    transfer_in_box,
    transfer_sharpened,
)

WORKING_SIDE = 64
MODEL = Path(__file__).parents[2] / "examples" / "instructdiffusion-tiny"


@pytest.fixture(scope="module")
def reconstruct():
    """Resize an image to working size, and encode and decode it with the VAE of `instructdiffusion-tiny`."""
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", dtype=torch.float32)

    @torch.no_grad()
    def through_vae(pixels):
        side = WORKING_SIDE
        small = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), np.float32)
        planes = torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]
        decoded = vae.decode(vae.encode(planes).latent_dist.mode()).sample[0]
        return ((decoded.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8)

    return through_vae


def photograph(name, side):
    image = Image.fromarray(getattr(data, name)())
    square = min(image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, (0, 0, square, square)))


def ellipse(side, box):
    """A mask [side, side]; `box` is in fractions of the side."""
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).ellipse([side * edge for edge in box], 1)
    return np.array(canvas)


def night(pixels):
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    mixed = 0.5 * pixels + 0.5 * gray[..., None]
    return (mixed * (0.3, 0.38, 0.6) + (0, 0, 12)).round().clip(0, 255).astype(np.uint8)


def sepia(pixels):
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    return (gray[..., None] * (1.1, 0.88, 0.65)).round().clip(0, 255).astype(np.uint8)


def pasted(pixels, box, color=(250, 210, 30)):
    """A ball with a shaded rim over the image."""
    side = len(pixels)
    result = pixels.copy()
    result[ellipse(side, box)] = np.array(color) // 2
    left, top, right, bottom = box
    result[ellipse(side, (left + 0.02, top + 0.02, right - 0.02, bottom - 0.02))] = color
    return result


def tinted(pixels, box):
    mask = ellipse(len(pixels), box)
    result = pixels.copy()
    result[mask] = (0.5 * pixels[mask] + 0.5 * np.array([0, 0, 255])).astype(np.uint8)
    return result


def shifted(pixels):
    moved = warp(pixels, SimilarityTransform(translation=(0.05 * len(pixels),) * 2), mode="edge", preserve_range=True)
    return moved.round().astype(np.uint8)


BALL, DISC = (0.25, 0.3, 0.65, 0.7), (0.7, 0.1, 0.78, 0.18)
LOCAL = {
    "inserted": lambda pixels: (pixels, pasted(pixels, BALL)),
    "removed": lambda pixels: (pasted(pixels, BALL), pixels),
    "tint": lambda pixels: (pixels, tinted(pixels, BALL)),
    "disc": lambda pixels: (pixels, pasted(pixels, DISC, (255, 0, 0))),
    "disc removed": lambda pixels: (pasted(pixels, DISC, (255, 0, 0)), pixels),
}
GLOBAL = {"night": lambda pixels: (pixels, night(pixels)), "sepia": lambda pixels: (pixels, sepia(pixels))}


def enlarged(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def grow(mask, radius):
    planes = torch.from_numpy(mask).float()[None, None]
    return torch.nn.functional.max_pool2d(planes, 2 * radius + 1, 1, radius)[0, 0].numpy() > 0


def psnr(truth, pixels, mask=None):
    mask = np.ones(truth.shape[:2], bool) if mask is None else mask
    return peak_signal_noise_ratio(truth[mask], pixels[mask])


def case(reconstruct, make, name, factor):
    """The input, the truth, the transferred image, and the enlarged output."""
    image, truth = make(photograph(name, factor * WORKING_SIDE))
    answer = reconstruct(truth)
    return image, truth, transfer_change(image, reconstruct(image), answer), enlarged(answer, len(image))


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_change_keeps_the_other_pixels_exactly(reconstruct, kind, factor):
    for name in PHOTOGRAPHS:
        image, truth, result, plain = case(reconstruct, LOCAL[kind], name, factor)
        changed = (image != truth).any(-1)
        # The VAE mixes a change with up to five working pixels around it.
        far = ~grow(changed, 5 * factor)
        assert np.array_equal(result[far], image[far])
        assert psnr(truth, result) > psnr(truth, plain) + 5
        assert psnr(truth, result, changed) > psnr(truth, plain, changed) - 2


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize("kind", GLOBAL)
def test_a_change_of_colors_keeps_the_details_of_the_input(reconstruct, kind, factor):
    for name in PHOTOGRAPHS:
        image, truth, result, plain = case(reconstruct, GLOBAL[kind], name, factor)
        assert psnr(truth, result) > max(33, psnr(truth, plain) + 7)


@pytest.mark.parametrize("factor", [4, 8])
def test_a_warp_of_the_whole_image_is_transferred(reconstruct, factor):
    for name in PHOTOGRAPHS:
        image, truth, result, plain = case(reconstruct, lambda pixels: (pixels, shifted(pixels)), name, factor)
        assert psnr(truth, result) > psnr(truth, image) + 0.5 * (psnr(truth, plain) - psnr(truth, image))


@pytest.mark.parametrize("kind", LOCAL)
def test_there_is_no_seam_around_a_change(reconstruct, kind):
    """At the outer border of the changed region, no step is steeper than in the truth."""
    for name in PHOTOGRAPHS:
        image, truth, result, _ = case(reconstruct, LOCAL[kind], name, 4)
        changed = (image != truth).any(-1)
        ring = grow(changed, 12) & ~grow(changed, 2)

        def steepness(pixels, ring=ring):
            down, across = np.gradient(pixels.astype(float), axis=(0, 1))
            return np.quantile(np.hypot(down, across).max(-1)[ring], 0.99)

        assert steepness(result) <= 1.1 * steepness(truth) + 5


@pytest.mark.parametrize("factor", [4, 8])
def test_the_surroundings_of_a_removed_object_are_kept_if_the_output_blurs_them(reconstruct, factor):
    """Models often change a wide margin around a removed object. The border is found in the input instead."""
    for name in PHOTOGRAPHS:
        image, truth = LOCAL["removed"](photograph(name, factor * WORKING_SIDE))
        margin = grow((image != truth).any(-1), 3 * factor)
        blurred = truth.copy()
        blurred[margin] = enlarged(enlarged(truth, 16), len(truth))[margin]
        answer = reconstruct(blurred)
        result, plain = transfer_change(image, reconstruct(image), answer), enlarged(answer, len(image))
        changed = (image != truth).any(-1)
        surroundings = margin & ~changed
        assert psnr(truth, result, surroundings) > psnr(truth, plain, surroundings) + 6
        assert psnr(truth, result, changed) > psnr(truth, plain, changed) - 2


def test_guided_fit_is_a_weighted_ridge_regression():
    """In an image smaller than the window, all pixels have the same fit, that of the closed form in NumPy."""
    rng = np.random.default_rng(0)
    region = np.zeros((11, 9), np.float32)
    region[3:9, 2:7] = 1
    guide = (60 * region + rng.normal(100, 20, (3, 11, 9))).astype(np.float32)
    slope, intercept, explained = guided_fit(torch.from_numpy(guide), torch.from_numpy(region)[None])
    # Pixels next to the border: one outside, two inside.
    certain = np.ones((11, 9), bool)
    certain[2:10, 1:8] = False
    certain[5:7, 4] = True
    weights = np.where(certain, 1, BAND_WEIGHT).ravel()
    moments = np.cov(np.vstack([guide.reshape(3, -1), region.reshape(1, -1)]), aweights=weights, bias=True)
    expected = np.linalg.solve(moments[:3, :3] + EDGE_RIDGE * np.eye(3), moments[:3, 3])
    fraction = expected @ moments[:3, 3] / moments[3, 3]
    expected = expected / max(fraction, FULL_FIT)
    means = np.average(guide.reshape(3, -1), axis=1, weights=weights)
    constant = np.average(region.ravel(), weights=weights) - expected @ means
    assert np.allclose(slope.numpy(), expected[:, None, None], rtol=1e-3)
    assert np.allclose(intercept.numpy(), constant, rtol=1e-3)
    assert np.allclose(explained.numpy(), fraction, rtol=1e-3)


def test_the_core_and_holes_of_a_changed_region_are_replaced_and_pixels_far_outside_are_kept():
    """Also where the colors of the input suggest the opposite."""
    rng = np.random.default_rng(0)

    def background():
        coarse = rng.integers(60, 140, (32, 32, 3)).repeat(4, 0).repeat(4, 1)
        return (coarse + rng.integers(-10, 10, coarse.shape)).astype(np.uint8)

    image = background()
    object_ = np.zeros((128, 128), bool)
    object_[32:96, 32:96] = True
    object_[56:72, 56:72] = False  # a part with the colors of the background
    object_[60:68, 96:] = True  # a stripe of the object's color that the output keeps
    image[object_] = (200, 40, 40)
    copy = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX))
    answer = copy.copy()
    removed = np.asarray(Image.fromarray(background()).resize((32, 32), Image.Resampling.BOX))
    answer[8:24, 8:24] = removed[8:24, 8:24]
    answer[19:21, 14:18] = copy[19:21, 14:18]  # a hole
    result = transfer_change(image, copy, answer)
    outside = np.ones((128, 128), bool)
    outside[24:104, 24:104] = False  # two working pixels around the region
    assert np.array_equal(result[outside], image[outside])
    core = np.s_[50:86, 50:80]
    assert np.array_equal(result[core], enlarged(answer, 128)[core])


@pytest.mark.parametrize("levels", [6, -6])
def test_a_faint_change_of_all_colors_is_applied(levels):
    image = photograph("coffee", 384).clip(10, 245)
    copy = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BOX))
    result = transfer_change(image, copy, (copy.astype(int) + levels).astype(np.uint8))
    assert np.abs(result.astype(int) - image - levels).max() <= 1


def stripes(rows, columns):
    return (rows + columns) // 12 % 2 == 0


@pytest.mark.parametrize(
    "kept",
    [
        lambda rows, columns: columns >= 67,
        lambda rows, columns: (abs(rows - 48) < 12) & (abs(columns - 48) < 12),
        stripes,
    ],
    ids=["a third", "the center", "stripes"],
)
@pytest.mark.parametrize("change", ["blue", "darker", "gray"])
def test_unchanged_parts_between_large_changes_are_kept_exactly(kept, change):
    image = photograph("astronaut", 384)
    copy = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BOX))
    changed = {"blue": 0 * copy, "darker": (0.4 * copy).astype(np.uint8), "gray": copy.mean(-1, keepdims=True)}[change]
    if change == "blue":
        changed[..., 2] = 255
    mask = kept(*np.mgrid[:96, :96])
    answer = np.where(mask[..., None], copy, changed).astype(np.uint8)
    result = transfer_change(image, copy, answer)
    far = ~grow(~mask, 3).repeat(4, 0).repeat(4, 1)
    assert far.any() and np.array_equal(result[far], image[far])


def test_an_unchanged_output_returns_the_input(reconstruct):
    image = photograph("coffee", 300)
    copy = reconstruct(image)
    assert np.array_equal(transfer_change(image, copy, copy), image)


def test_images_of_other_aspect_ratios_and_smaller_than_a_window():
    image = np.random.default_rng(0).integers(0, 256, (37, 90, 3), np.uint8)
    copy, answer = np.zeros((1, 3, 3), np.uint8), np.full((1, 3, 3), 200, np.uint8)
    for transfer in (transfer_change, transfer_denoised, transfer_sharpened):
        assert transfer(image, copy, answer).shape == image.shape


def test_denoising_keeps_details_finer_than_the_working_size(reconstruct):
    clean = photograph("astronaut", 384)
    noisy = (clean + np.random.default_rng(0).normal(0, 15, clean.shape)).round().clip(0, 255).astype(np.uint8)
    answer = np.asarray(Image.fromarray(clean).resize((64, 64), Image.Resampling.LANCZOS))
    result = transfer_denoised(noisy, answer, answer)
    assert psnr(clean, result) > max(psnr(clean, noisy), psnr(clean, enlarged(answer, 384))) + 1


def uniform(clean, rng):
    return rng.normal(0, 25, clean.shape)


def weak(clean, rng):
    return rng.normal(0, 10, clean.shape)


def on_one_half(clean, rng):
    noise = uniform(clean, rng)
    noise[:, : len(clean) // 2] = 0
    return noise


def of_a_camera(clean, rng):
    """Its variance is proportional to the brightness."""
    return rng.normal(0, 1, clean.shape) * np.sqrt(1 + 5.0 * clean)


def correlated(clean, rng):
    blurred = gaussian_filter(uniform(clean, rng), (1, 1, 0))
    return 25 * blurred / blurred.std()


def salt_and_pepper(clean, rng):
    marked = rng.random(clean.shape[:2]) < 0.1
    noise = np.zeros(clean.shape)
    noise[marked] = 255 * rng.integers(0, 2, (marked.sum(), 1)) - clean[marked].astype(float)
    return noise


def between_black_borders(clean, rng):
    return uniform(clean, rng) * (clean.max(-1, keepdims=True) > 0)


NOISES = (uniform, weak, on_one_half, of_a_camera, correlated, salt_and_pepper, between_black_borders)


@pytest.mark.parametrize("noise", NOISES)
def test_denoising_is_not_worse_than_the_output(reconstruct, noise):
    """The output is the VAE's copy of the clean image: without noise, but blurred."""
    for name in PHOTOGRAPHS:
        clean = photograph(name, WORKING_SIDE).copy()
        if noise is between_black_borders:
            clean[:16] = clean[-16:] = 0
        noisy = (clean + noise(clean, np.random.default_rng(0))).round().clip(0, 255).astype(np.uint8)
        answer = reconstruct(clean)
        result = psnr(clean, transfer_denoised(noisy, answer, answer))
        assert result > psnr(clean, answer) - 0.05
        if noise is weak:
            assert result > psnr(clean, answer) + 0.1


@pytest.mark.parametrize("noise", [uniform, weak, of_a_camera, correlated])
def test_denoising_of_a_large_image_is_better_than_the_output(reconstruct, noise):
    for name in PHOTOGRAPHS:
        clean = photograph(name, 4 * WORKING_SIDE)
        noisy = (clean + noise(clean, np.random.default_rng(0))).round().clip(0, 255).astype(np.uint8)
        answer = reconstruct(clean)
        assert psnr(clean, transfer_denoised(noisy, answer, answer)) > psnr(clean, enlarged(answer, len(clean))) + 0.4


def test_denoising_keeps_details_of_a_clean_image(reconstruct):
    flat = np.full((64, 64, 3), 100, np.uint8)
    assert np.array_equal(transfer_denoised(flat, flat, flat), flat)
    for name in PHOTOGRAPHS:
        clean = photograph(name, WORKING_SIDE)
        answer = reconstruct(clean)
        assert psnr(clean, transfer_denoised(clean, answer, answer)) > psnr(clean, answer) + 0.5


def test_sharpening_adds_the_change():
    image = np.full((8, 8, 3), 100, np.uint8)
    copy, answer = np.full((4, 4, 3), 90, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    assert (transfer_sharpened(image, copy, answer) == 120).all()


def test_a_crop_changes_its_box_only():
    image, small = Image.new("RGB", (100, 60), (10, 20, 30)), Image.new("RGB", (16, 16), (10, 20, 30))
    box = (20.4, 0.0, 80.4, 60.0)
    result = np.asarray(
        transfer_in_box(transfer_sharpened, image, small, Image.new("RGB", (16, 16), (50, 60, 70)), box)
    )
    assert (result[:, 21:80] == (50, 60, 70)).all()
    assert (result[:, :21] == (10, 20, 30)).all() and (result[:, 80:] == (10, 20, 30)).all()
