"""The transfer gets the VAE's reconstruction of the true target in place of a model's answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from skimage.transform import SimilarityTransform, warp

from instructdiffusion_pipeline.tasks.transfer import transfer_change

WORKING_SIDE = 64
MODEL = Path(__file__).parents[2] / "examples" / "instructdiffusion-tiny"


@pytest.fixture(scope="module")
def reconstruct():
    """Resizes a picture to working size, and encodes and decodes it with the VAE that ships."""
    vae = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", dtype=torch.float32)

    @torch.no_grad()
    def through_vae(pixels):
        side = WORKING_SIDE
        small = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), np.float32)
        planes = torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None]
        decoded = vae.decode(vae.encode(planes).latent_dist.mode()).sample[0]
        return ((decoded.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255).astype(np.uint8)

    return through_vae


def photograph(name, side):
    image = Image.fromarray(getattr(data, name)())
    square = min(image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, (0, 0, square, square)))


def ellipse(side, box):
    """A mask [side, side]; `box` in shares of the side."""
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).ellipse([side * edge for edge in box], 1)
    return np.array(canvas)


def night(pixels):
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    mixed = 0.5 * pixels + 0.5 * gray[..., None]
    return (mixed * (0.3, 0.38, 0.6) + (0, 0, 12)).round().clip(0, 255).astype(np.uint8)


def sepia(pixels):
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    return (gray[..., None] * (1.1, 0.88, 0.65)).round().clip(0, 255).astype(np.uint8)


def pasted(pixels, box, color=(250, 210, 30)):
    """A ball with a shaded rim over the picture."""
    side = len(pixels)
    result = pixels.copy()
    result[ellipse(side, box)] = np.array(color) // 2
    left, top, right, bottom = box
    result[ellipse(side, (left + 0.02, top + 0.02, right - 0.02, bottom - 0.02))] = color
    return result


def tinted(pixels, box):
    mask = ellipse(len(pixels), box)
    result = pixels.copy()
    result[mask] = (0.5 * pixels[mask] + 0.5 * np.array([0, 0, 255])).astype(np.uint8)
    return result


def shifted(pixels):
    moved = warp(pixels, SimilarityTransform(translation=(0.05 * len(pixels),) * 2), mode="edge", preserve_range=True)
    return moved.round().astype(np.uint8)


BALL, DISC = (0.25, 0.3, 0.65, 0.7), (0.7, 0.1, 0.78, 0.18)
LOCAL = {
    "inserted": lambda pixels: (pixels, pasted(pixels, BALL)),
    "removed": lambda pixels: (pasted(pixels, BALL), pixels),
    "tint": lambda pixels: (pixels, tinted(pixels, BALL)),
    "disc": lambda pixels: (pixels, pasted(pixels, DISC, (255, 0, 0))),
}
GLOBAL = {"night": lambda pixels: (pixels, night(pixels)), "sepia": lambda pixels: (pixels, sepia(pixels))}


def enlarged(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    rec = reconstruct.__wrapped__() if hasattr(reconstruct, "__wrapped__") else reconstruct._get_wrapped_function()()
    import sys

    from instructdiffusion_pipeline.tasks import transfer as T_

    kw = eval(sys.argv[1])
    for k, v in kw.items():
        setattr(T_, k, v)
    for factor in (6,):
        for photo in ("astronaut", "chelsea", "coffee"):
            for name, make in {**LOCAL, **GLOBAL, "warp": lambda p: (p, shifted(p))}.items():
                image, truth = make(photograph(photo, factor * WORKING_SIDE))
                copy, answer = rec(image), rec(truth)
                out = transfer_change(image, copy, answer)
                plain = enlarged(answer, len(image))
                diff = (image != truth).any(-1)
                far = ~diff
                for _ in range(3 * factor):
                    pad = np.pad(far, 1, constant_values=True)
                    far = pad[:-2, 1:-1] & pad[2:, 1:-1] & pad[1:-1, :-2] & pad[1:-1, 2:] & far
                eq = (out == image).all(-1)
                psnr = peak_signal_noise_ratio
                band = diff ^ (~far)
                print(
                    f"{factor} {photo:9} {name:9} out {psnr(truth, out):.1f} plain {psnr(truth, plain):.1f} in {psnr(truth[diff], out[diff]):.1f} plain {psnr(truth[diff], plain[diff]):.1f} far equal {eq[far].mean() if far.any() else -1:.4f} band {psnr(truth[band], out[band]) if band.any() else 0:.1f}"
                )
