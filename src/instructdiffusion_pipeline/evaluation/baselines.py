"""Classical baselines for restoration: non-local means, unsharp mask, inpainting."""

import numpy as np
from PIL import Image, ImageFilter
from skimage.restoration import denoise_nl_means, estimate_sigma, inpaint_biharmonic

from instructdiffusion_pipeline.evaluation.examples import Example
from instructdiffusion_pipeline.tasks.restoration import Restoration

CHANGE_THRESHOLD = 4  # gray levels; a pixel has changed if a channel differs by more


def classical_baseline(example: Example) -> Image.Image | None:
    """Restore the image of an example with a method that needs no training. None if the task is not restoration.

    Noise: non-local means (Buades et al., 2005) with a sigma estimated from the image. Blur: an unsharp mask.
    Watermark: biharmonic inpainting of the pixels that differ from the clean image. So this baseline knows the
    position of the watermark, and both images must be equal outside of it, as they are not in JPEG files.
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
    """Fill in the pixels of `image` that differ from `truth` (biharmonic inpainting; Damelin and Hoang, 2018)."""
    before, after = (np.asarray(picture, dtype=np.float64) for picture in (image, truth))
    return to_image(
        inpaint_biharmonic(before / 255, np.abs(before - after).max(-1) > CHANGE_THRESHOLD, channel_axis=-1)
    )


def to_image(pixels: np.ndarray) -> Image.Image:
    """Convert an array with values from 0 to 1 to an image."""
    return Image.fromarray(np.round(255 * pixels.clip(0, 1)).astype(np.uint8))
