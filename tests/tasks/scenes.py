"""Held-out photographs, random blobs on them, and JPEG and VAE compression."""

import io
import random

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage import data
from tiny import ROOT

from instructdiffusion_pipeline import InstructDiffusionPipeline

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
SHIPPED = ROOT / "examples" / "instructdiffusion-tiny"


def photograph(rng: random.Random, width: int, height: int) -> Image.Image:
    """A random part of a random photograph, not enlarged by more than a third."""
    picture = rng.choice(PHOTOGRAPHS)
    scale = rng.uniform(0.75, min(picture.width / width, picture.height / height))
    left, top = rng.uniform(0, picture.width - scale * width), rng.uniform(0, picture.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box)


def blob(rng: random.Random, width: int, height: int, narrowest: int = 8) -> np.ndarray:
    """A mask of one to three rectangles and ellipses, each at least `narrowest` pixels wide and high."""
    canvas = Image.new("1", (width, height))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(1, 3)):
        spans = [rng.randint(narrowest, side // 3) for side in (width, height)]
        left, top = (rng.randint(0, side - span) for side, span in zip((width, height), spans, strict=True))
        shape = rng.choice([pen.ellipse, pen.rectangle])
        shape([left, top, left + spans[0] - 1, top + spans[1] - 1], fill=1)
    return np.array(canvas)


def jpeg(image: Image.Image) -> Image.Image:
    """The image after JPEG compression with quality 75, as on web pages."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=75)
    return Image.open(stream).convert("RGB")


@torch.no_grad()
def through_vae(pipeline: InstructDiffusionPipeline, image: Image.Image) -> Image.Image:
    """The image after encoding and decoding by the VAE: the best possible output of a model with that VAE."""
    pixels = pipeline.image_processor.preprocess(image)
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded)[0]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))
