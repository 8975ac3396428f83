"""Segmentation of small objects: run the model on overlapping slices of an image as well, and combine the masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from instructdiffusion_pipeline.tasks.morphology import connected_parts, dilate
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation, without_traces
from instructdiffusion_pipeline.views import Response, View, view_margins

SLICE_OVERLAP = 0.6  # of neighboring slices, as a fraction of their side
SLICE_BATCH = 8  # slices per call of the pipeline
# An object that only slices show, or only the whole image, takes up these fractions of the sides of crops around it.
CLOSE_UPS = (0.3, 0.45, 0.6)
LONE_SIDE = 0.25  # maximum side of a checked mask that only the whole image shows, relative to the shorter side
CLOSE_UP_SIDE = 0.15  # minimum side of a crop, relative to the image's shorter side
MIN_REGION = 0.001  # of the image; smaller regions are dropped
MIN_SEEN = 0.3  # fraction of a region that the output for a crop must mark to confirm it
GRID = 128  # cells along the longer side of the grid in which connected regions are found


def segment_slices(
    run: Callable[[Sequence[View]], list[Response]],
    views: Sequence[View],
    margins: Mapping[str, np.ndarray],
    fraction: float,
    readout: UNet2DModel | None,
) -> tuple[dict[str, np.ndarray], bool]:
    """Combine the masks of an image with those of its slices.

    The slices of an image do not share calls of the pipeline with those of other images: the sizes and the noise of a
    call do not depend on the rest of the batch.

    Args:
        run: returns the output of the model for each of up to `SLICE_BATCH` views of one size.
        views: the whole image, with the prompt of each object.
        margins: the margin [height, width] of each object in the outputs for `views`.
        fraction: side of a slice as a fraction of the side of the image.
        readout: decodes the outputs; None: by color.

    Returns:
        The margins, and whether the safety checker replaced the output for a slice.
    """
    parts = [crop_view(view, box) for view in views for box in slice_boxes(view.image.size, fraction)]
    responses = []
    for start in range(0, len(parts), SLICE_BATCH):
        responses += run(parts[start : start + SLICE_BATCH])
    sliced = combine_slices(margins, list(zip(parts, responses, strict=True)), readout)
    combined: dict[str, np.ndarray] = {}
    for view in views:
        for name in cast(Segmentation, view.task).colors:
            whole = without_traces(margins[name])
            marked, margin = whole > 0, np.maximum(whole, sliced[name])
            unconfirmed, regions = new_regions(Mask.from_margin(margin).pixels, marked)
            margin = np.where(unconfirmed, np.minimum(margin, 0), margin)
            for region in [*regions, marked] if is_lone(marked, sliced[name] > 0) else regions:
                crops = run_close_ups(run, view, region)
                responses += [response for _, response in crops]
                confirming, shown = confirm_region(region, name, crops, readout)
                if region is not marked and confirming == len(crops):
                    margin = np.maximum(margin, shown)
                if region is marked and 2 * confirming <= len(crops):
                    margin = np.where(marked, np.minimum(margin, 0), margin)
            combined[name] = margin
    return combined, any(response.flag for response in responses)


def crop_view(view: View, box: tuple[int, int, int, int]) -> View:
    """The part of a view of the whole image in a box (left, top, right, bottom)."""
    return view._replace(image=view.image.crop(box), offset=box[:2])


def slice_boxes(size: tuple[int, int], fraction: float) -> list[tuple[int, int, int, int]]:
    """Overlapping slices of an image of (width, height): (left, top, right, bottom) of each."""
    count = math.ceil((1 / fraction - 1) / (1 - SLICE_OVERLAP)) + 1
    width, height = (max(1, round(fraction * side)) for side in size)
    # Rounding can make slices more elongated than the image; the pipeline accepts four to one.
    width, height = min(width, 4 * height), min(height, 4 * width)
    lefts = np.linspace(0, size[0] - width, count).round().astype(int).tolist()
    tops = np.linspace(0, size[1] - height, count).round().astype(int).tolist()
    return [(left, top, left + width, top + height) for top in tops for left in lefts]


def combine_slices(
    whole: Mapping[str, np.ndarray], sliced: Sequence[tuple[View, Response]], readout: UNet2DModel | None
) -> dict[str, np.ndarray]:
    """The margin [height, width] of each object, from the outputs for the slices of an image.

    A pixel belongs to an object if it is marked in at least half of the outputs for the slices that contain it. Pixels
    of a slice have a lower weight near its edges inside the image, because it may contain only a part of an object
    there. `whole` has the margins in the output for the whole image, of which only the names and sizes are used.
    """
    margins: dict[str, np.ndarray] = {}
    slices = [(view, view_margins(view, response, readout)) for view, response in sliced]
    for name, margin in whole.items():
        seen, votes, strength = (np.zeros_like(margin) for _ in range(3))
        for view, parts in slices:
            if name not in parts:
                continue
            painted = Mask.from_margin(parts[name]).pixels
            weight = centrality(view, margin.shape[::-1])
            window = window_of(view)
            seen[window] += weight
            votes[window] += weight * painted
            strength[window] += weight * np.where(painted, parts[name], 0)
        agreed = (votes > 0) & (2 * votes >= seen)
        margins[name] = np.where(agreed, strength / np.where(agreed, votes, 1), -0.5)
    return margins


def window_of(view: View) -> tuple[slice, slice]:
    """The rows and columns of the image that a view shows."""
    left, top = view.offset
    return np.s_[top : top + view.image.height, left : left + view.image.width]


def centrality(view: View, size: tuple[int, int]) -> np.ndarray:
    """Weights of a slice's pixels [height, width]: 1 in its center, 0.1 at edges that are not edges of the image."""
    lines = []
    for length, start, whole in zip(view.image.size, view.offset, size, strict=True):
        places = np.arange(length)
        before = places + 1 if start > 0 else np.full(length, np.inf)
        after = length - places if start + length < whole else np.full(length, np.inf)
        lines.append(np.minimum(before, after))
    inside = np.minimum(lines[1][:, None], lines[0][None, :])
    return np.clip(2 * inside / min(view.image.size), 0.1, 1).astype(np.float32)


def run_close_ups(
    run: Callable[[Sequence[View]], list[Response]], view: View, region: np.ndarray
) -> list[tuple[View, Response]]:
    """Crops of a view of the whole image around a region [height, width], with the outputs of the model for them."""
    crops = [crop_view(view, close_up(region, fraction)) for fraction in CLOSE_UPS]
    return list(zip(crops, run(crops), strict=True))


def confirm_region(
    region: np.ndarray, name: str, crops: Sequence[tuple[View, Response]], readout: UNet2DModel | None
) -> tuple[int, np.ndarray]:
    """How many of the `crops` around a region [height, width] show the object `name` there.

    Also returns the margin [height, width] of the object: positive for pixels that are marked in most of the crops.
    """
    votes, strength = np.zeros(region.shape, np.float32), np.zeros(region.shape, np.float32)
    confirmed = 0
    for view, response in crops:
        if response.flag:  # a black image
            continue
        part = view_margins(view, response, readout)[name]
        painted, window = Mask.from_margin(part).pixels, window_of(view)
        votes[window] += painted
        strength[window] += np.where(painted, part, 0)
        confirmed += int((painted & region[window]).sum() >= MIN_SEEN * region.sum())
    margin = np.where(2 * votes > len(crops), strength / votes.clip(min=1), -0.5)
    return confirmed, margin


def close_up(region: np.ndarray, fraction: float) -> tuple[int, int, int, int]:
    """A square around a region [height, width], of whose side the region takes up `fraction` if the image permits."""
    top, bottom, left, right = bounds(region)
    shortest = min(region.shape)
    extent = max(bottom - top, right - left)
    side = min(shortest, max(round(CLOSE_UP_SIDE * shortest), round(extent / fraction)))
    top, left = (
        min(max(0, round((start + end - side) / 2)), length - side)
        for start, end, length in zip((top, left), (bottom, right), region.shape, strict=True)
    )
    return left, top, left + side, top + side


def bounds(region: np.ndarray) -> tuple[int, int, int, int]:
    """The first row of a region [height, width], the one after the last, and likewise the columns."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def new_regions(pixels: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The `pixels` (bool, [height, width]) that are not next to `known` ones, and their connected parts.

    Parts smaller than `MIN_REGION` are left out.
    """
    left = _cells(pixels) * (1 - dilate(_cells(known), 1))
    regions = (_pixels(part, pixels) for part in connected_parts(left))
    return _pixels(left, pixels), [region for region in regions if region.mean() >= MIN_REGION]


def is_lone(pixels: np.ndarray, others: np.ndarray) -> bool:
    """Whether `pixels` (bool, [height, width]) are a small part of the image, and none of them is in `others`.

    Slices and crops do not show all of a larger object, so they cannot refute it.
    """
    if not pixels.any() or (pixels & others).any():
        return False
    top, bottom, left, right = bounds(pixels)
    return max(bottom - top, right - left) <= LONE_SIDE * min(pixels.shape)


def _cells(pixels: np.ndarray) -> torch.Tensor:
    """The cells [1, h, w] of a grid that contain some of the `pixels`."""
    step = math.ceil(max(pixels.shape) / GRID)
    return F.max_pool2d(torch.from_numpy(pixels).float()[None], step, ceil_mode=True)


def _pixels(cells: torch.Tensor, pixels: np.ndarray) -> np.ndarray:
    """The `pixels` that are in the `cells` of the grid."""
    step = math.ceil(max(pixels.shape) / GRID)
    large = cells[0].numpy().repeat(step, 0).repeat(step, 1)[: pixels.shape[0], : pixels.shape[1]]
    return (large > 0) & pixels
