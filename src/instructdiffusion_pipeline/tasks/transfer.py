"""Apply the changes by a model to its input at the input's own resolution.

A model works at a small size, and its VAE loses details. The difference between its output and the VAE's
reconstruction of the input shows what the model changed. These functions apply that difference to the input:

- where nothing changed, the input's pixels are kept;
- where colors changed smoothly, the change is a local affine function of the input's colors (He and Sun, "Fast
  Guided Filter", arXiv 1505.00996), which is evaluated at full resolution;
- where the content changed, the output is enlarged and blended in along the edges of the input.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, upright_rgb
from instructdiffusion_pipeline.tasks.frames import inner_box
from instructdiffusion_pipeline.tasks.morphology import dilate, erode, fill_holes, grow

FIT_SIDE = 64  # pixels along the short side at which the color transform is fitted
FIT_RADIUS = 24  # radius of the fit's window, in pixels at this size
FIT_ITERATIONS = 6
FIT_RIDGE = 50.0  # squared levels, added to the variance of the colors in a window, to regularize the fit
HOLES = 6  # working pixels; holes in a changed region are filled up to twice this width
# How a changed region is aligned with the input's edges; lengths in working pixels.
EDGE_RADIUS = 10  # of the fit's window
EDGE_RIDGE = 4.0  # squared levels
EDGE_BAND = (1, 2)  # outside and inside of the border; there it is uncertain whether a pixel has changed
BAND_WEIGHT = 0.2  # of these pixels in the fit
# Fractions of the region's variance that colors explain: from FULL_FIT on, the fit is used without the region itself.
# It is used less if the output's colors explain more than the input's, as with an added object; not at all if they
# explain MAX_EXCESS more.
FULL_FIT, MAX_EXCESS = 0.4, 0.3
EDGE_STEEPNESS = 3.0  # of the blend at half of the fit, because the fit blurs edges
REACH = 1  # how far the blend may extend a region
CORE = 3  # a region is eroded by this radius; what remains is replaced completely
# How the loss of details in a denoised output is estimated.
LOSS_RADIUS = 3  # of the windows, in working pixels
MIN_VARIANCE = 0.5  # squared levels; windows with a smaller difference, such as black borders, are left out
FEW_DETAILS, MANY_DETAILS = 0.4, 0.9  # quantiles of the windows, by their details
LOSS_QUANTILE = 0.25
STRIP_ROWS = 128  # of the input, computed at a time to limit the memory

# A region has changed if its change is above the lower threshold, and above the upper one at some pixel. Thresholds
# are fractions of the strongest change, with a minimum in levels (Euclidean distance of colors); weaker differences
# are noise of the model.
CONTENT_SHARES, CONTENT_LEVELS = (0.2, 0.4), (30.0, 45.0)
COLOR_SHARES, COLOR_LEVELS = (0.125, 0.25), (5.0, 9.0)


Transfer = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def transfer_in_box(
    transfer: Transfer,
    image: Image.Image,
    reconstruction: Image.Image,
    answer: Image.Image,
    box: Box | None = None,
) -> Image.Image:
    """Run one of the functions below on the whole pixels in the `box` of `image` that `answer` shows (None: all).

    Pixels outside the box are copied from `image`. `reconstruction` and `answer` have the same size.
    """
    image = upright_rgb(image)
    left, top, right, bottom = box or (0.0, 0.0, float(image.width), float(image.height))
    whole = inner_box((left, top, right, bottom))
    x, y = answer.width / (right - left), answer.height / (bottom - top)
    region = ((whole[0] - left) * x, (whole[1] - top) * y, (whole[2] - left) * x, (whole[3] - top) * y)
    shown = [
        np.asarray(picture.resize(picture.size, Image.Resampling.LANCZOS, region))
        for picture in (reconstruction, answer)
    ]
    result = transfer(np.asarray(image.crop(whole)), *shown)
    image.paste(Image.fromarray(result), whole[:2])
    return image


def transfer_change(image: np.ndarray, reconstruction: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Apply an edit to the input at full resolution.

    Args:
        image: the input [H, W, 3], 8-bit RGB.
        reconstruction: the VAE's reconstruction of the input at working size [h, w, 3], 8-bit RGB.
        answer: the model's output at working size, like `reconstruction`.

    Returns:
        The edited image [H, W, 3], 8-bit RGB. Pixels are exactly those of `image` from a distance of two working
        pixels (2 * H / h input pixels) outside of the regions that changed.
    """
    copy, target = _planes(reconstruction), _planes(answer)
    change = target - copy
    amount = change.norm(dim=0, keepdim=True)
    strongest = float(_mean(amount, 1).quantile(0.995))

    # Smooth changes of color. In each window: change = matrix @ color + offset.
    matrix, offset = fit_color_transform(copy, change, outlier=max(15.0, 0.1 * strongest))
    explained = torch.einsum("ijhw,jhw->ihw", _enlarge(matrix.flatten(0, 1), copy).unflatten(0, (3, 3)), copy)
    explained = explained + _enlarge(offset, copy)
    # An unchanged part in a window whose other colors changed is explained badly, but has not changed.
    color_change = _mean(explained.norm(dim=0, keepdim=True), 2).minimum(_mean(amount, 2))
    color_region = changed_region(color_change, strongest, COLOR_SHARES, COLOR_LEVELS)

    # Changed content: changes that no such transform explains.
    content_change = (change - explained).norm(dim=0, keepdim=True).minimum(amount)
    content = changed_region(content_change, strongest, CONTENT_SHARES, CONTENT_LEVELS)
    content = (_mean(content, 1) > 0.5).float()
    content = fill_holes(content, HOLES)

    result = image.copy()
    for rows, (matrix_rows, offset_rows, region_rows) in _strips(
        image.shape[:2], color_region, matrix.flatten(0, 1), offset, color_region
    ):
        source = _planes(image[rows])
        shift = torch.einsum("ijhw,jhw->ihw", matrix_rows.unflatten(0, (3, 3)), source) + offset_rows
        result[rows] = _levels(source + (2 * region_rows).clamp(max=1) * shift)
    if not content.any():
        return result

    small = np.asarray(Image.fromarray(image).resize(answer.shape[1::-1], Image.Resampling.BOX))
    enlarged = np.asarray(Image.fromarray(answer).resize(image.shape[1::-1], Image.Resampling.LANCZOS))
    reach = dilate(content, REACH)
    for rows, (slope_rows, intercept_rows, reach_rows, core_rows) in _strips(
        image.shape[:2], reach, *fit_edges(_planes(small), target, content), reach, erode(content, CORE)
    ):
        source, shown, background = _planes(image[rows]), _planes(enlarged[rows]), _planes(result[rows])
        edge = (slope_rows * source).sum(0, keepdim=True) + intercept_rows
        blend = (EDGE_STEEPNESS * (edge - 0.5) + 0.5).clamp(0, 1)
        blend = blend.minimum((2 * reach_rows).clamp(max=1)).maximum(core_rows)
        result[rows] = _levels(background + blend * (shown - background))
    return result


def transfer_denoised(image: np.ndarray, reconstruction: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Combine a denoised output with the noisy input. Arguments as in `transfer_change`.

    The output has lost details, the input has noise. Their mean with the smallest expected error gives the output the
    weight noise / (noise + loss), both as local variances; see `estimate_loss`. Details that the working size cannot
    show are taken from the input, attenuated by a local Wiener filter, whose noise level is estimated from the finest
    details (Donoho and Johnstone, 1994).
    """
    height, width = image.shape[:2]
    resized = Image.fromarray(image).resize(answer.shape[1::-1], Image.Resampling.LANCZOS)
    small, denoised = _planes(np.asarray(resized)), _planes(answer)
    change = denoised - small
    variance = _mean(change.square().mean(0, keepdim=True), LOSS_RADIUS)  # noise + loss
    weight = 1 - estimate_loss(denoised, variance) / variance.clamp(min=1e-6)
    combined = Image.fromarray(_levels(small + weight.clamp(0, 1) * change))

    coarse, enlarged = (
        np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in (resized, combined)
    )
    detail = _planes(image) - _planes(coarse)
    power = _mean(detail.square().mean(0, keepdim=True), 3)
    noise = (detail[:, ::4, ::4].abs().median() / 0.6745) ** 2  # a sixteenth of the pixels is enough
    gain = ((power - noise) / power.clamp(min=1e-6)).clamp(min=0)
    return _levels(_planes(enlarged) + gain * detail)


def estimate_loss(denoised: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Estimate the variance of the details that a denoised output has lost around each pixel.

    It is proportional to the variance of the details that the output still has. The factor is measured where the
    output has most details, after subtracting the noise, which is measured where it has few. The lower quartile is
    used, because an overestimated loss would leave noise. So the noise may have any distribution, and may differ
    between parts of the image.

    Args:
        denoised: the output, [3, h, w], in levels.
        variance: local mean square of the difference between output and noisy input, [1, h, w].

    Returns:
        [1, h, w], in squared levels.
    """
    details = _mean((denoised - _mean(denoised, 1)).square().mean(0, keepdim=True), LOSS_RADIUS)
    changed = variance > MIN_VARIANCE
    if not changed.any():
        return torch.zeros_like(variance)
    few, many = (details[changed].quantile(share) for share in (FEW_DETAILS, MANY_DETAILS))
    noise = variance[changed & (details <= few)].median()
    rich = changed & (details >= many)
    factor = ((variance[rich] - noise).clamp(min=0) / details[rich].clamp(min=1e-3)).quantile(LOSS_QUANTILE)
    return factor * details


def transfer_sharpened(image: np.ndarray, reconstruction: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Add the change to the blurred input. Arguments as in `transfer_change`."""
    change = _planes(answer) - _planes(reconstruction)
    result = image.copy()
    for rows, (change_rows,) in _strips(image.shape[:2], torch.ones_like(change[:1]), change):
        result[rows] = _levels(_planes(image[rows]) + change_rows)
    return result


def fit_color_transform(copy: torch.Tensor, change: torch.Tensor, outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit change = matrix @ color + offset in a window around each pixel, and ignore pixels that no fit explains.

    The fit is a guided filter that is repeated with the weights of Geman and McClure (1987). If the colors in a window
    are too similar to determine the matrix, `FIT_RIDGE` makes it zero, so that only the offset changes.

    Args:
        copy, change: [3, h, w], in levels of 0 to 255.
        outlier: residual in levels from which a pixel is mostly ignored.

    Returns:
        matrix [3, 3, h', w'] and offset [3, h', w'] with a short side of at most `FIT_SIDE`.
    """
    shrink = FIT_SIDE / max(FIT_SIDE, min(copy.shape[1:]))
    size = [round(shrink * side) for side in copy.shape[1:]]
    copy, change = (F.interpolate(plane[None], size, mode="area")[0] for plane in (copy, change))
    weight = torch.ones_like(copy[:1])
    for _ in range(FIT_ITERATIONS):
        total, mean_copy, mean_change, _, matrix = _regress(copy, change, weight, FIT_RADIUS, FIT_RIDGE)
        offset = mean_change - torch.einsum("ijhw,jhw->ihw", matrix.unflatten(0, (3, 3)), mean_copy)
        # Each pixel is in many windows, whose fits are averaged with their weights.
        matrix, offset = (_mean(total * plane, FIT_RADIUS) / _mean(total, FIT_RADIUS) for plane in (matrix, offset))
        matrix = matrix.unflatten(0, (3, 3))
        residual = change - torch.einsum("ijhw,jhw->ihw", matrix, copy) - offset
        weight = 1 / (1 + _mean(residual.square().sum(0, keepdim=True), 1) / outlier**2) ** 2
    return matrix, offset


def fit_edges(source: torch.Tensor, target: torch.Tensor, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit region = slope . color + intercept around each pixel, so that the region follows the edges of the input.

    Where the input's colors do not explain the region, for example that of an added object, the blurred region itself
    is used.

    Args:
        source, target: input and output, [3, h, w], in levels of 0 to 255.
        region: the changed region, [1, h, w], 0 or 1.

    Returns:
        slope [3, h, w] and intercept [1, h, w], for the input's colors.
    """
    slope, intercept, explained = guided_fit(source, region)
    *_, explained_by_target = guided_fit(target, region)
    excess = (explained_by_target - explained).clamp(min=0)
    share = (explained / FULL_FIT).clamp(0, 1) * (1 - excess / MAX_EXCESS).clamp(min=0)
    slope, intercept, share = (_mean(plane, EDGE_RADIUS) for plane in (share * slope, share * intercept, share))
    return slope, intercept + (1 - share) * _mean(region, 1)


def guided_fit(guide: torch.Tensor, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit region = slope . guide + intercept around each pixel (He et al., "Guided Image Filtering", 2013).

    Pixels near the border of the region have a small weight, as the output does not show precisely where it is.

    Returns:
        slope [3, h, w], divided by the explained fraction of the region's variance, intercept [1, h, w], and this
        fraction [1, h, w].
    """
    outside, inside = EDGE_BAND
    certain = erode(region, inside) + 1 - dilate(region, outside)
    weight = BAND_WEIGHT + (1 - BAND_WEIGHT) * certain
    _, mean_guide, mean_region, shared, slope = _regress(guide, region, weight, EDGE_RADIUS, EDGE_RIDGE)
    variance = (mean_region * (1 - mean_region)).clamp(min=1e-3)
    explained = (slope * shared).sum(0, keepdim=True) / variance
    # The means of the fit inside and outside of the region differ by the explained fraction only. Without this
    # division, a small region would be replaced only partly.
    slope = slope / explained.clamp(min=FULL_FIT)
    return slope, mean_region - (slope * mean_guide).sum(0, keepdim=True), explained


def changed_region(
    strength: torch.Tensor, strongest: float, shares: tuple[float, float], levels: tuple[float, float]
) -> torch.Tensor:
    """The regions [1, h, w] of ones where `strength` is above a lower threshold, and at some pixel above an upper."""
    lower, upper = (max(share * strongest, level) for share, level in zip(shares, levels, strict=True))
    return grow((strength > upper).float(), (strength > lower).float())


def _planes(pixels: np.ndarray) -> torch.Tensor:
    """Convert 8-bit pixels [h, w, 3] to float32 [3, h, w]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()


def _levels(planes: torch.Tensor) -> np.ndarray:
    """Convert [3, h, w] in levels to 8-bit pixels [h, w, 3]."""
    return planes.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def _mean(planes: torch.Tensor, radius: int) -> torch.Tensor:
    """Means over squares of 2 * radius + 1 pixels, clipped to the image."""
    for _ in range(2):  # first along columns, which become rows, because pooling along rows is faster
        planes = F.avg_pool2d(planes.mT[None], (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)[0]
    return planes


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The products of all pairs of channels."""
    return (left[:, None] * right[None]).flatten(0, 1)


def _regress(
    guide: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, radius: int, ridge: float
) -> tuple[torch.Tensor, ...]:
    """Weighted ridge regression of values [n, h, w] on guide [C, h, w] in a window around each pixel.

    Returns the total weight, the means of guide and values, their covariance and the slope (both [n * C, h, w]).
    """
    total = _mean(weight, radius).clamp(min=1e-4)
    mean_guide, mean_values = (_mean(weight * planes, radius) / total for planes in (guide, values))
    spread = _mean(weight * _products(guide, guide), radius) / total - _products(mean_guide, mean_guide)
    shared = _mean(weight * _products(values, guide), radius) / total - _products(mean_values, mean_guide)
    return total, mean_guide, mean_values, shared, _solve(spread, shared, ridge)


def _solve(spread: torch.Tensor, shared: torch.Tensor, ridge: float) -> torch.Tensor:
    """X with X (spread + ridge) = shared at each pixel; `spread` is [C * C, h, w], `shared` and X [n * C, h, w]."""
    channels = math.isqrt(len(spread))
    matrices = spread.unflatten(0, (channels, channels)).permute(2, 3, 0, 1)
    matrices = matrices + ridge * torch.eye(channels, dtype=spread.dtype, device=spread.device)
    rows = shared.unflatten(0, (-1, channels)).permute(2, 3, 1, 0)
    return torch.linalg.solve(matrices, rows).permute(3, 2, 0, 1).flatten(0, 1)


def _enlarge(planes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(planes[None], like.shape[1:], mode="bilinear")[0]


def _strips(
    size: tuple[int, int], region: torch.Tensor, *planes: torch.Tensor
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Enlarge planes [C, h, w] bilinearly to `size` (height, width), strip by strip.

    Strips in which `region` [1, h, w] is zero are skipped.
    """
    height, width = size
    for top in range(0, height, STRIP_ROWS):
        rows = torch.arange(top, min(top + STRIP_ROWS, height), device="cpu")
        if _rows(region, rows, height).any():
            strips = [_rows(plane, rows, height) for plane in planes]
            yield (
                slice(top, top + len(rows)),
                [F.interpolate(strip[None], (len(rows), width), mode="bilinear")[0] for strip in strips],
            )


def _rows(planes: torch.Tensor, rows: torch.Tensor, height: int) -> torch.Tensor:
    """The given `rows` of planes [C, h, w] that are enlarged bilinearly to `height`; [C, len(rows), w]."""
    place = ((rows.float() + 0.5) * planes.shape[1] / height - 0.5).clamp(0, planes.shape[1] - 1)
    upper = place.floor().long()
    lower = (upper + 1).clamp(max=planes.shape[1] - 1)
    share = (place - upper)[:, None]
    return planes[:, upper] * (1 - share) + planes[:, lower] * share
