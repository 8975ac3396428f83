"""Restoration: the answer is the clean picture itself (Geng et al., CVPR 2024, section 3.1)."""

import random

import numpy as np
from PIL import Image

# The original's watermark removal example; it publishes none for noise or blur.
PRESET = {"num_inference_steps": 100, "guidance_scale": 1.0, "image_guidance_scale": 1.0}

DENOISE_TEMPLATES = [
    "take the noise out of this photo",
    "remove the noise",
    "denoise the picture",
    "clean up the grain in this image",
    "make this noisy photo clean",
    "get rid of the grain, please",
]


def instruction(rng: random.Random) -> str:
    """One wording of "take the noise out"."""
    return rng.choice(DENOISE_TEMPLATES)


def add_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add white Gaussian noise of standard deviation `sigma`, in grey levels of 0 to 255, and clip to 8 bits."""
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))
