"""The colours that instructions name (Geng et al., CVPR 2024, section 3.1), painting them, and seeing them again."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

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
VISIBLE_LEVELS = 32  # in one channel at least: what a pixel must be away from a colour for the colour to show on it


def visible_colors(image: Image.Image, mask: np.ndarray, colors: Mapping[str, RGB]) -> list[str]:
    """Names of the colours that would show on the RGB `image` under `mask` (bool, height x width).

    A colour shows if nine tenths of the pixels are `VISIBLE_LEVELS` away from it in one channel. If none does, the
    one that shows on most pixels; all of them for an empty mask.
    """
    if not mask.any():
        return list(colors)
    pixels = np.asarray(image)[mask].astype(np.int16)
    shown = {name: (np.abs(pixels - rgb).max(-1) >= VISIBLE_LEVELS).mean() for name, rgb in colors.items()}
    return [name for name, share in shown.items() if share >= 0.9] or [max(shown, key=lambda name: shown[name])]


def check_colors(asked: Mapping[str, str], known: Mapping[str, RGB], argument: str = "colors") -> None:
    """Raise a ValueError unless `asked` maps one or more names to distinct `known` colours."""
    unknown = sorted(set(asked.values()) - known.keys())
    if not asked or unknown or len(set(asked.values())) < len(asked):
        raise ValueError(
            f"`{argument}` must map at least one name to a colour, each colour once, out of {', '.join(known)};"
            f" got {dict(asked)!r}."
        )


def paint(pixels: np.ndarray, mask: np.ndarray, color: RGB, opacity: float) -> None:
    """Mix `color` into 8-bit `pixels` [height, width, 3] in place where `mask` is set; results are cut to integers."""
    mixed = (1 - opacity) * pixels[mask].astype(np.float32) + opacity * np.array(color, np.float32)
    pixels[mask] = mixed.astype(np.uint8)


def moved_shares(
    image: np.ndarray, answer: np.ndarray, colors: Iterable[RGB], opacity: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel moved from `image` toward each of `colors` in `answer`, as a share of `opacity`.

    A painted pixel is answer = image + opacity * (color - image). The share is the least-squares solution of that for
    opacity, over `opacity`: 0 where nothing moved, 1 where it was painted. Of several colours a pixel keeps the one
    that explains most of its movement; its shares of the others are 0.

    A pixel near the asked colour can hardly move, and noise hides what it did. So each pixel is solved together with
    its neighbours in the smallest square window that holds enough evidence: sigma(share) = noise / |color - image|
    must be at most `MAX_SHARE_ERROR`. In a clean answer that is the pixel alone. The noise is measured: the median
    length of what no colour explains.

    Args:
        image, answer: [height, width, 3], levels of 0 to 255.
        colors: N colours.

    Returns:
        The shares, and the evidence each pixel has by itself, |color - image| in levels; both [N, height, width].
    """
    source, target = (torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in (image, answer))
    toward = torch.tensor(list(colors), dtype=torch.float32)[:, None, None] - source  # [N, H, W, 3]
    moved = target - source
    dot, norm = (moved * toward).sum(-1), (toward**2).sum(-1)  # [N, H, W]

    fitted = (dot / norm.clamp(min=1)).clamp(0, 1)
    unexplained = ((moved - fitted[..., None] * toward) ** 2).sum(-1).amin(0).sqrt()
    noise = max(1.0, unexplained.median().item())
    needed = (noise / (MAX_SHARE_ERROR * opacity)) ** 2

    shares = torch.zeros_like(dot)
    open_ = torch.ones_like(dot, dtype=torch.bool)
    for reach in (0, 1, 2, 4, 8, 16, max(source.shape[:2])):
        pooled_dot, pooled_norm = (window_sum(plane, reach) for plane in (dot, norm))
        ready = open_ & ((pooled_norm >= needed) | (reach >= max(source.shape[:2])))
        shares[ready] = (pooled_dot / pooled_norm.clamp(min=1))[ready]
        open_ &= ~ready
        if not open_.any():
            break
    gain = shares.clamp(0, 1) * (2 * dot - shares.clamp(0, 1) * norm)
    if len(shares) > 1:
        best = torch.zeros_like(shares, dtype=torch.bool).scatter_(0, gain.argmax(0, keepdim=True), True)
        shares = shares.where(best, shares.clamp(max=0))
    return (shares / opacity).numpy(), norm.sqrt().numpy()


MAX_SHARE_ERROR = 0.125  # standard deviation, of a share whose threshold is one half


def window_sum(planes: torch.Tensor, reach: int) -> torch.Tensor:
    """Sum of [N, H, W] over squares of 2 * reach + 1 pixels, as far as they lie inside."""
    if reach == 0:
        return planes
    side = 2 * reach + 1
    return F.avg_pool2d(planes[None].double(), side, 1, reach, divisor_override=1)[0].float()
