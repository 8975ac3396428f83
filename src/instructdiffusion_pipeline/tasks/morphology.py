"""Binary morphology of regions: float tensors [1, h, w] of zeros and ones. Neighbors may be diagonal."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def dilate(region: torch.Tensor, radius: int) -> torch.Tensor:
    """The pixels with a pixel of `region` in the square of 2 * radius + 1 pixels around them."""
    return F.max_pool2d(region[None], 2 * radius + 1, 1, radius)[0]


def erode(region: torch.Tensor, radius: int) -> torch.Tensor:
    """The pixels of whose square of 2 * radius + 1 pixels all that are in the image are in `region`."""
    return -dilate(-region, radius)


def grow(region: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The connected parts of `limit` that contain a pixel of `region`."""
    region = region * limit
    while True:
        grown = dilate(region, 1) * limit
        if torch.equal(grown, region):
            return region
        # A dilation alone would need one iteration per pixel of distance.
        region = _grow_along_rows(_grow_along_rows(grown, limit).mT, limit.mT).mT


def _grow_along_rows(region: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The runs of ones in the rows of `limit` that contain a pixel of `region`."""
    run = F.pad(1 - limit, (1, 0), value=1.0).long().flatten().cumsum(0)  # each zero begins the next run
    marked = region.new_zeros(len(run) + 1).scatter_reduce(0, run, F.pad(region, (1, 0)).flatten(), "amax")
    return marked[run].view(1, len(limit[0]), -1)[..., 1:] * limit


def connected_parts(region: torch.Tensor) -> Iterator[torch.Tensor]:
    """The connected parts of `region`."""
    left = region.clone()
    while left.any():
        seed = torch.zeros_like(left, memory_format=torch.contiguous_format)
        seed.view(-1)[left.argmax()] = 1
        part = grow(seed, left)
        left = left - part
        yield part


def fill_holes(region: torch.Tensor, radius: int) -> torch.Tensor:
    """Fill the parts that `region` encloses, except pixels more than about `radius` away from it."""
    border = F.pad(torch.zeros_like(region), (1, 1, 1, 1), value=1.0)
    surroundings = grow(border, F.pad(1 - region, (1, 1, 1, 1), value=1.0))[:, 1:-1, 1:-1]
    closed = erode(dilate(region, radius), radius)
    return torch.maximum(region, closed - surroundings)
