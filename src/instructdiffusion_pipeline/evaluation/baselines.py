"""What one had before: a classical method for each defect of a picture, to compare a model with."""

import numpy as np
from PIL import Image, ImageFilter
from skimage.restoration import denoise_nl_means, estimate_sigma, inpaint_biharmonic

from instructdiffusion_pipeline.evaluation.examples import Example
from instructdiffusion_pipeline.tasks.restoration import Restoration

CHANGED = 4  # grey levels in one channel: what differs by more was changed


def classical(example: Example) -> Image.Image | None:
    """The restored picture of a case by a method that has learned nothing; None unless it is one of restoration.

    Noise: non-local means (Buades et al., 2005) at a sigma estimated from the picture. Blur: an unsharp mask.
    Watermark: biharmonic inpainting of all pixels that the mark changed, which it is told; so the clean picture must
    be the marked one's but for the mark, and not have been through a JPEG of its own.
    """
    task = example.tasks[0]
    if not isinstance(task, Restoration):
        return None
    if task.degradation == "blur":
        return example.image.filter(ImageFilter.UnsharpMask(radius=1, percent=100, threshold=0))
    if task.degradation == "noise":
        pixels = np.asarray(example.image, dtype=np.float64) / 255
        sigma = float(np.mean(estimate_sigma(pixels, channel_axis=-1)))
        return to_image(
            denoise_nl_means(
                pixels, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=False, channel_axis=-1
            )
        )
    return inpaint(example.image, example.truth)


def inpaint(image: Image.Image, truth: Image.Image) -> Image.Image:
    """`image` with all that differs from `truth` filled in from around it (biharmonic; Damelin and Hoang, 2018)."""
    before, after = (np.asarray(picture, dtype=np.float64) for picture in (image, truth))
    return to_image(inpaint_biharmonic(before / 255, np.abs(before - after).max(-1) > CHANGED, channel_axis=-1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """From values of 0 to 1."""
    return Image.fromarray(np.round(255 * pixels.clip(0, 1)).astype(np.uint8))
