"""Edits of the colors of a whole image, each with several instructions."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.types import Edit


def edit_colors(image: Image.Image, rng: random.Random, name: str | None = None) -> Edit:
    """Apply the edit `name` of `COLOR_EDITS`, by default a random one, to an RGB image."""
    function, wordings = COLOR_EDITS[name or rng.choice(list(COLOR_EDITS))]
    pixels = function(np.asarray(image, dtype=np.float32) / 255)
    return Edit(rng.choice(wordings), Image.fromarray(np.round(255 * pixels.clip(0, 1)).astype(np.uint8)))


def gray(pixels: np.ndarray) -> np.ndarray:
    """Replace the channels of `pixels` [height, width, 3], with values from 0 to 1, with their luminance."""
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None].repeat(3, -1)


def tinted(pixels: np.ndarray, *factors: float) -> np.ndarray:
    """Multiply red, green and blue by a factor each."""
    return pixels * np.array(factors, np.float32)


def night(pixels: np.ndarray) -> np.ndarray:
    """Darken and desaturate the image, with a blue tint that is strongest in the shadows."""
    return tinted(0.5 * pixels + 0.5 * gray(pixels), 0.3, 0.38, 0.6) + np.array([0, 0, 0.05], np.float32)


def autumn(pixels: np.ndarray) -> np.ndarray:
    """Turn green into orange: red becomes the maximum of red and green."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.stack([1.1 * np.maximum(red, green), 0.3 * red + 0.5 * green, 0.55 * blue], -1)


def winter(pixels: np.ndarray) -> np.ndarray:
    """Desaturate and brighten the image, with a blue tint."""
    return 0.3 + tinted(0.25 * pixels + 0.75 * gray(pixels), 0.75, 0.8, 0.85)


# name -> function of the pixels, instructions
COLOR_EDITS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[str]]] = {
    "black and white": (
        gray,
        [
            "make it black and white",
            "take the colors out",
            "turn the photo into a black and white picture",
            "make this picture monochrome",
            "show it without colors",
        ],
    ),
    "sepia": (
        lambda pixels: tinted(gray(pixels), 1.1, 0.88, 0.65),
        [
            "make it sepia",
            "give the picture a sepia tone",
            "make it look like an old brown photograph",
            "age this photo by a hundred years",
            "turn it into a sepia print",
        ],
    ),
    "night": (
        night,
        [
            "make it night",
            "turn day into night",
            "show it at night",
            "let it be midnight",
            "make the scene dark and blue",
        ],
    ),
    "autumn": (
        autumn,
        [
            "make it autumn",
            "give it autumn tones",
            "what would it look like in fall?",
            "turn summer into autumn",
            "color the leaves for autumn",
        ],
    ),
    "winter": (
        winter,
        [
            "make it winter",
            "show it in winter",
            "make it pale and frosty",
            "turn it into a winter picture",
            "let it be a snowy day",
        ],
    ),
    "warm": (
        lambda pixels: tinted(pixels, 1.25, 1.03, 0.7),
        [
            "make it warmer",
            "give it warm colors",
            "warm up the tones",
            "let the evening sun shine on it",
            "add a warm glow",
        ],
    ),
    "cold": (
        lambda pixels: tinted(pixels, 0.7, 0.95, 1.3),
        [
            "make it colder",
            "give it cold colors",
            "cool down the tones",
            "make the light bluish",
            "add a cold tint",
        ],
    ),
    "negative": (
        lambda pixels: 1 - pixels,
        [
            "invert the colors",
            "make it a negative",
            "turn it into a photographic negative",
            "show the negative of this picture",
        ],
    ),
    "bright": (
        lambda pixels: pixels**0.55,
        [
            "make it brighter",
            "brighten the picture",
            "let in more light",
            "lighten this photo",
            "expose it longer",
        ],
    ),
    "dark": (
        lambda pixels: pixels**1.8,
        [
            "make it darker",
            "darken the picture",
            "dim the light",
            "tone down the brightness",
            "expose it more briefly",
        ],
    ),
    "vivid": (
        lambda pixels: gray(pixels) + 2 * (pixels - gray(pixels)),
        [
            "make the colors stronger",
            "make it more colorful",
            "boost the saturation",
            "give it vivid colors",
        ],
    ),
}
