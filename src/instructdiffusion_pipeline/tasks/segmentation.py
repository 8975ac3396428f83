"""Segmentation: the named object is tinted, half colour and half picture (Geng et al., CVPR 2024, section 3.1)."""

import random

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.tasks.colors import MASK_COLORS

PRESET = {"num_inference_steps": 100, "guidance_scale": 7.5, "image_guidance_scale": 1.5}

# Share of the colour in a painted pixel.
OPACITY = 0.5

TEMPLATES = [
    "mark the {name} in {color}",
    "paint the {name} {color}",
    "color the {name} {color} and leave the rest alone",
    "put a {color} tint on the {name}",
    "highlight the {name} with {color}",
    "lay {color} over every pixel of the {name}",
    "shade the {name} in {color}, please",
    "where is the {name}? show it in {color}",
]


def instruction(name: str, color: str, rng: random.Random) -> str:
    """One wording of "paint the `name` in `color`"; `color` is a key of `MASK_COLORS`."""
    return rng.choice(TEMPLATES).format(name=name, color=color)


def draw(image: Image.Image, mask: np.ndarray, color: str) -> Image.Image:
    """Mix `color` into an RGB `image` where `mask` (bool, height x width) is set; other pixels stay as they are."""
    pixels = np.array(image, dtype=np.float32)
    pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * np.array(MASK_COLORS[color], dtype=np.float32)
    return Image.fromarray(pixels.astype(np.uint8))


def read(image: Image.Image, answer: Image.Image, color: str) -> np.ndarray:
    """Mask (bool, height x width) of the pixels that moved from `image` toward `color` in `answer`.

    Each pixel's share of the colour is the least-squares solution of answer = image + share * (color - image); the
    mask is where it passes half of what `draw` mixes in. Both pictures must be RGB, of one size, and show the same: an
    answer that was cropped on its way (see `working_size`) has to be compared with the box of the input it shows.
    """
    source = np.asarray(image, dtype=np.float32)
    toward = np.array(MASK_COLORS[color], dtype=np.float32) - source
    moved = np.asarray(answer, dtype=np.float32) - source
    share = (moved * toward).sum(-1) / np.maximum((toward**2).sum(-1), 1)
    return share > OPACITY / 2
