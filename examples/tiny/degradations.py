"""What spoils a photograph: blur of three kinds, and lettering across it. (Noise is the product's own `add_noise`.)"""

import math
import random
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BLURS = (0.7, 2.5)  # pixels: deviation of a Gaussian, radius of a disc, half the length of a trace
LETTERING_SIZES = (9, 20)  # pixels
LETTERING_OPACITIES = (0.35, 0.85)
OVERSAMPLING = 4


def add_blur(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shake the camera along a straight line, put it out of focus, or soften the picture with a Gaussian."""
    kernel = rng.choice([gaussian, defocus, motion])(rng.uniform(*BLURS), rng)
    reach = len(kernel) // 2
    pixels = np.pad(np.asarray(image, dtype=np.float32), ((reach, reach), (reach, reach), (0, 0)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(pixels, kernel.shape, axis=(0, 1))
    blurred = np.einsum("hwcij,ij->hwc", windows, kernel.astype(np.float32), optimize=True)
    return Image.fromarray(np.round(blurred).clip(0, 255).astype(np.uint8))


def gaussian(sigma: float, rng: random.Random) -> np.ndarray:
    """A normalised kernel, side x side, as are the next two."""
    x = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    line = np.exp(-(x**2) / (2 * sigma**2))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def defocus(radius: float, rng: random.Random) -> np.ndarray:
    """An even disc."""
    return drawn_kernel(radius, lambda pen, c, r: pen.ellipse((c - r, c - r, c + r, c + r), 255))


def motion(radius: float, rng: random.Random) -> np.ndarray:
    """An even line at a random angle, one pixel wide."""
    angle = rng.uniform(0, math.pi)
    x, y = math.cos(angle), math.sin(angle)

    def trace(pen: ImageDraw.ImageDraw, center: float, reach: float) -> None:
        ends = [(center - reach * x, center - reach * y), (center + reach * x, center + reach * y)]
        pen.line(ends, 255, 8)

    return drawn_kernel(radius, trace)


def drawn_kernel(radius: float, draw) -> np.ndarray:
    """What `draw(pen, center, radius)` leaves on a canvas of eight dots a pixel, as a normalised kernel."""
    side = 2 * math.ceil(radius + 0.5) + 1
    canvas = Image.new("L", (8 * side, 8 * side))
    draw(ImageDraw.Draw(canvas), 4 * side, 8 * radius)
    kernel = np.asarray(canvas.reduce(8), dtype=np.float64)
    return kernel / kernel.sum()


def add_watermark(image: Image.Image, rng: random.Random) -> Image.Image:
    """Lay see-through letters across the picture, at a random angle, size and strength; half of the time repeated."""
    letters = string.ascii_uppercase if rng.random() < 0.5 else string.ascii_lowercase
    text = "".join(rng.choices(letters, k=rng.randint(3, 7)))
    side = OVERSAMPLING * max(image.size)
    stamp = Image.new("L", (side, side))
    pen = ImageDraw.Draw(stamp)
    font = ImageFont.load_default(OVERSAMPLING * rng.uniform(*LETTERING_SIZES))
    if rng.random() < 0.5:
        pen.text((rng.uniform(0.3, 0.7) * side, rng.uniform(0.3, 0.7) * side), text, 255, font, "mm")
    else:
        line = f"{text} " * 6
        pitch = rng.uniform(1.8, 3.0) * font.size
        for row in range(math.ceil(side / pitch)):
            pen.text((-rng.uniform(0, 0.3) * side, row * pitch), line, 255, font)
    stamp = stamp.rotate(rng.choice([0, rng.uniform(-45, 45)]), Image.Resampling.BILINEAR).reduce(OVERSAMPLING)
    opacity = rng.uniform(*LETTERING_OPACITIES)
    color = rng.choice([(255, 255, 255), (255, 255, 255), (0, 0, 0), tuple(rng.choices(range(256), k=3))])
    marked = image.copy()
    marked.paste(color, (0, 0), stamp.crop((0, 0, *image.size)).point(lambda level: round(opacity * level)))
    return marked
