"""What one had before: a classical method for each defect of a picture, to compare a model with."""

import numpy as np
from PIL import Image, ImageFilter
from skimage.restoration import denoise_nl_means, estimate_sigma, inpaint_biharmonic

from instructdiffusion_pipeline.evaluation.cases import Exam
from instructdiffusion_pipeline.tasks.restoration import Restoration

MARKED = 4 / 255  # in one channel: what the watermark changed


def classical(exam: Exam) -> Image.Image | None:
    """The restored picture of a case by a method that has learned nothing; None unless it is one of restoration.

    Noise: non-local means (Buades et al., 2005) at a sigma estimated from the picture. Blur: an unsharp mask.
    Watermark: biharmonic inpainting of all pixels that the mark changed, which it is told; so the clean picture must
    be the marked one's but for the mark, and not have been through a JPEG of its own.
    """
    task = exam.tasks[0]
    if not isinstance(task, Restoration):
        return None
    if task.defect == "blur":
        return exam.image.filter(ImageFilter.UnsharpMask(radius=1, percent=100, threshold=0))
    pixels = np.asarray(exam.image, dtype=np.float64) / 255
    if task.defect == "noise":
        sigma = float(np.mean(estimate_sigma(pixels, channel_axis=-1)))
        restored = denoise_nl_means(
            pixels, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=False, channel_axis=-1
        )
    else:
        clean = np.asarray(exam.truth, dtype=np.float64) / 255
        restored = inpaint_biharmonic(pixels, np.abs(pixels - clean).max(-1) > MARKED, channel_axis=-1)
    return Image.fromarray(np.round(255 * restored.clip(0, 1)).astype(np.uint8))
