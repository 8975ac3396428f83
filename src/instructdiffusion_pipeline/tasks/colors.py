"""The colors in instructions (Geng et al., CVPR 2024, section 3.1): painting them, and finding painted pixels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import upright_rgb

RGB = tuple[int, int, int]

MASK_COLORS: dict[str, RGB] = {
    "red": (255, 0, 0),
    "purple": (128, 0, 128),
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
KEYPOINT_COLORS: dict[str, RGB] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "gray": (128, 128, 128),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
VISIBLE_DISTANCE = 96  # minimum RGB distance (Euclidean, 8-bit levels) at which a color counts as visible


REACHES = (32, 16, 8, 4, 2, 1, 0)  # radii of the windows in pixels
SHARE_STEP = 0.15  # standard deviation of the coverage change between two window sizes, relative to the opacity
NOISE_REACH = 4  # radius in pixels of the window in which the noise is measured
ROUNDING_NOISE = 0.3  # squared levels: variance of truncation to integers, 1/12 for each of 3 channels, rounded up
NEIGHBOURS_ALIKE = 4  # number of neighboring pixels with correlated errors (JPEG, VAE); a factor of the noise variance


def visible_colors(image: Image.Image, mask: np.ndarray, colors: Mapping[str, RGB]) -> list[str]:
    """Names of the colors that are visible on the RGB `image` under `mask` (bool, height x width).

    A color is visible if nine tenths of the pixels are at least `VISIBLE_DISTANCE` away from it. If no color is
    visible, the one that is visible on most pixels is returned. For an empty mask, all colors are returned.
    """
    if not mask.any():
        return list(colors)
    pixels = np.asarray(upright_rgb(image))[mask].astype(np.float32)
    shown = {name: (np.linalg.norm(pixels - rgb, axis=-1) >= VISIBLE_DISTANCE).mean() for name, rgb in colors.items()}
    return [name for name, share in shown.items() if share >= 0.9] or [max(shown, key=lambda name: shown[name])]


def most_visible_first(image: Image.Image, colors: Mapping[str, RGB]) -> list[str]:
    """All names in `colors`, with those that are visible on the RGB `image` first (see `visible_colors`)."""
    image = upright_rgb(image)
    visible = visible_colors(image, np.ones((image.height, image.width), bool), colors)
    return sorted(colors, key=lambda name: name not in visible)


def assign_colors(image: Image.Image, names: Sequence[str], colors: Mapping[str, RGB]) -> dict[str, str]:
    """Choose a color for each name, preferably one that is visible on the image (see `visible_colors`).

    Raises a ValueError if there are no names, more names than colors, or equal names.
    """
    if not 0 < len(set(names)) == len(names) <= len(colors):
        raise ValueError(f"`names` must be 1 to {len(colors)} different names; got {', '.join(names) or 'none'}.")
    return dict(zip(names, most_visible_first(image, colors), strict=False))


class NamedColors(dict[str, str]):
    """Ordered mapping from names to color names; immutable and hashable, so that the task dataclasses are hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type, tuple[dict[str, str]]]:
        return type(self), (dict(self),)

    def _raise_immutable(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the colors of a task cannot be changed; make a new task")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _raise_immutable  # type: ignore[assignment]


def check_colors(asked: Mapping[str, str], known: Mapping[str, RGB], argument: str = "colors") -> None:
    """Raise a ValueError unless `asked` maps one or more names to different `known` colors."""
    pairs = list(asked.items()) if isinstance(asked, Mapping) else []
    named = [(name, color) for name, color in pairs if isinstance(name, str) and name.strip()]
    used = {color for _, color in named if isinstance(color, str) and color in known}
    if not pairs or len(used) < len(pairs):
        raise ValueError(
            f"`{argument}` must map one or more names, which are not blank, to different colors from"
            f" {', '.join(known)}; got {asked!r}."
        )


def paint(pixels: np.ndarray, mask: np.ndarray, color: RGB, opacity: float) -> None:
    """Mix `color` into 8-bit `pixels` [height, width, 3] in place where `mask` is set.

    Results are truncated to integers. Raises a ValueError unless `mask` is boolean with the height and width of
    `pixels`.
    """
    if mask.dtype != bool or mask.shape != pixels.shape[:2]:  # an integer mask would index rows
        raise ValueError(
            f"`mask` must be of type bool and shape {pixels.shape[:2]}; it is of {mask.dtype} and {mask.shape}."
        )
    mixed = (1 - opacity) * pixels[mask].astype(np.float32) + opacity * np.array(color, np.float32)
    pixels[mask] = mixed.astype(np.uint8)


def coverage(
    image: np.ndarray, answer: np.ndarray, colors: Iterable[RGB], opacity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate how much each pixel of `image` was painted with each of `colors` in `answer`.

    For a painted pixel, answer = image + opacity * (color - image). The coverage is the least-squares solution for
    opacity, divided by `opacity`: 0 for an unchanged pixel, 1 for a painted pixel.

    A pixel that already has the requested color changes little, so an estimate per pixel is noisy. The coverage is
    therefore estimated for windows of decreasing size, and each estimate updates the previous one (Kalman filter; the
    precision of a window is the sum of |color - image|^2 / noise). The noise variance is the local mean of the squared
    residual.

    If several colors are given, only the color that fits best keeps its coverage in a pixel. The coverage by the other
    colors is clamped to at most 0.

    Args:
        image, answer: [height, width, 3], levels of 0 to 255.
        colors: N colors.

    Returns:
        The coverage, and the distance |color - image| of each pixel in levels; both [N, height, width].
    """
    source, target = (torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in (image, answer))
    toward = torch.from_numpy(np.array(list(colors), np.float32))[:, None, None] - source  # [N, H, W, 3]
    moved = target - source
    dot, norm = (moved * toward).sum(-1), (toward**2).sum(-1)  # [N, H, W]

    fitted = (dot / norm.clamp(min=1)).clamp(0, 1)
    unexplained = ((moved - fitted[..., None] * toward) ** 2).sum(-1).amin(0, keepdim=True)
    around = F.avg_pool2d(unexplained, 2 * NOISE_REACH + 1, 1, NOISE_REACH, count_include_pad=False)
    noise = ROUNDING_NOISE + NEIGHBOURS_ALIKE * (around - 1).clamp(min=0)

    shares = torch.zeros_like(dot)
    trust = 1 / (SHARE_STEP * opacity) ** 2
    dots, norms = (Integral(plane, REACHES[0]) for plane in (dot, norm))
    for reach in REACHES:
        shares = (dots.sum(reach) / noise + trust * shares) / (norms.sum(reach) / noise + trust)

    if len(shares) > 1:
        coat = shares.clamp(0.7 * opacity, 1.3 * opacity)
        gain = coat * (2 * dot - coat * norm)
        best = torch.zeros_like(shares, dtype=torch.bool).scatter_(0, gain.argmax(0, keepdim=True), True)
        shares = shares.where(best, shares.clamp(max=0))
    return (shares / opacity).numpy(), norm.sqrt().numpy()


class Integral:
    """Summed-area table of [N, H, W] (integral image; Viola and Jones, 2001), for window sums in constant time."""

    def __init__(self, planes: torch.Tensor, furthest: int):
        self.furthest = furthest  # maximum reach of a window in pixels
        rim = (furthest + 1, furthest)  # the first row and column of an integral image are empty
        # In double precision, because a window sum is the difference of sums over most of the image.
        self.totals = F.pad(planes, rim + rim).double().cumsum(1).cumsum(2)

    def sum(self, reach: int) -> torch.Tensor:
        """Sums over squares of 2 * reach + 1 pixels around each pixel, clipped to the image; [N, H, W]."""
        sums = self.totals
        for dim in (1, 2):
            length = self.totals.shape[dim] - 2 * self.furthest - 1
            after, before = self.furthest + reach + 1, self.furthest - reach
            sums = sums.narrow(dim, after, length) - sums.narrow(dim, before, length)
        return sums.float()
