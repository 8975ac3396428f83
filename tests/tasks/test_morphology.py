"""Binary morphology, compared with SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from instructdiffusion_pipeline.tasks.morphology import connected_parts, dilate, erode, fill_holes, grow

SQUARE = np.ones((3, 3))  # neighbors may be diagonal
SIZES = [(1, 1), (1, 40), (40, 1), (7, 64), (50, 33)]


def region(size: tuple[int, int], share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < share


def tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask).float()[None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [1, 3])
def test_dilation_and_erosion(size, radius):
    mask, window = region(size, 0.5), np.ones((2 * radius + 1,) * 2)
    assert torch.equal(dilate(tensor(mask), radius), tensor(ndimage.binary_dilation(mask, window)))
    assert torch.equal(erode(tensor(mask), radius), tensor(ndimage.binary_erosion(mask, window, border_value=1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.4, 0.5, 1.0])
def test_a_region_grows_to_the_connected_parts_of_its_limit(size, share):
    for seed in range(5):
        limit, start = region(size, share, seed), region(size, 0.03, seed + 100)
        expected = ndimage.binary_propagation(start & limit, SQUARE, limit)
        assert torch.equal(grow(tensor(start), tensor(limit)), tensor(expected))


def test_a_region_grows_through_a_spiral():
    limit = np.zeros((41, 41), bool)
    for ring in range(0, 20, 2):
        limit[ring : 41 - ring, ring : 41 - ring] = True
        limit[ring + 1 : 40 - ring, ring + 1 : 40 - ring] = False
        limit[ring + 1, ring + 1 : ring + 3] = True  # to the next ring
    start = np.zeros_like(limit)
    start[0, 40] = True
    expected = ndimage.binary_propagation(start, SQUARE, limit)
    assert expected[20, 18:23].any(), "the limit is connected"
    assert torch.equal(grow(tensor(start), tensor(limit)), tensor(expected))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_connected_parts(share):
    mask = region((30, 40), share)
    labels, count = ndimage.label(mask, SQUARE)
    parts = list(connected_parts(tensor(mask)))
    assert len(parts) == count
    expected = {(labels == number).tobytes() for number in range(1, count + 1)}
    assert {(part[0].numpy() > 0).tobytes() for part in parts} == expected


def test_narrow_holes_are_filled():
    mask = np.zeros((40, 60), bool)
    mask[5:35, 5:55] = True
    mask[15:20, 15:20] = False  # narrow
    mask[10:30, 30:50] = False  # wide
    filled = fill_holes(tensor(mask), radius=4)[0].numpy() > 0
    assert filled[15:20, 15:20].all() and not filled[17:23, 37:43].any()
    assert not (filled & ~ndimage.binary_fill_holes(mask)).any() and (filled >= mask).all()
