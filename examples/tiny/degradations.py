"""Degradations of photographs: three kinds of blur, and watermarks. Noise is `add_noise` of the package."""

import math
import random
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Relative to the image's shorter side: the standard deviation of a Gaussian, the radius of a disc or half the length
# of a line, and the height of letters.
BLUR_RADII = (0.5 / 64, 3.5 / 64)
FONT_SIZES = (9 / 64, 20 / 64)
OPACITIES = (0.35, 0.95)
OVERSAMPLING = 4


def add_blur(image: Image.Image, rng: random.Random, radii: tuple[float, float] = BLUR_RADII) -> Image.Image:
    """Blur an image with a Gaussian, a disc (out of focus) or a line (motion), at random."""
    kernel = rng.choice([gaussian, defocus, motion])(rng.uniform(*radii) * min(image.size), rng)
    margin = len(kernel) // 2
    pixels = np.pad(np.asarray(image, dtype=np.float32), ((margin, margin), (margin, margin), (0, 0)), "edge")
    spectrum = np.fft.rfft2(pixels, axes=(0, 1)) * np.fft.rfft2(kernel, pixels.shape[:2])[..., None]
    blurred = np.fft.irfft2(spectrum, pixels.shape[:2], axes=(0, 1))[2 * margin :, 2 * margin :]
    return Image.fromarray(np.round(blurred).clip(0, 255).astype(np.uint8))


def gaussian(sigma: float, rng: random.Random) -> np.ndarray:
    """Return a Gaussian kernel [side, side] with sum 1."""
    x = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    line = np.exp(-(x**2) / (2 * sigma**2))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


def defocus(radius: float, rng: random.Random) -> np.ndarray:
    """Return a kernel that is constant in a disc, with sum 1."""
    return drawn_kernel(radius, lambda pen, c, r: pen.ellipse((c - r, c - r, c + r, c + r), 255))


def motion(radius: float, rng: random.Random) -> np.ndarray:
    """Return a kernel that is constant on a line of one pixel's width at a random angle, with sum 1."""
    angle = rng.uniform(0, math.pi)
    x, y = math.cos(angle), math.sin(angle)

    def draw_line(pen: ImageDraw.ImageDraw, center: float, length: float) -> None:
        ends = [(center - length * x, center - length * y), (center + length * x, center + length * y)]
        pen.line(ends, 255, 8)

    return drawn_kernel(radius, draw_line)


def drawn_kernel(radius: float, draw) -> np.ndarray:
    """Make a kernel with sum 1 from what `draw(pen, center, radius)` draws at eight times the resolution."""
    side = 2 * math.ceil(radius + 0.5) + 1
    canvas = Image.new("L", (8 * side, 8 * side))
    draw(ImageDraw.Draw(canvas), 4 * side, 8 * radius)
    kernel = np.asarray(canvas.reduce(8), dtype=np.float64)
    return kernel / kernel.sum()


def add_watermark(image: Image.Image, rng: random.Random, opacities: tuple[float, float] = OPACITIES) -> Image.Image:
    """Draw random translucent letters on the image, once or repeated, at a random size, angle and opacity."""
    letters = string.ascii_uppercase if rng.random() < 0.5 else string.ascii_lowercase
    text = "".join(rng.choices(letters, k=rng.randint(3, 7)))
    side = OVERSAMPLING * max(image.size)
    stamp = Image.new("L", (side, side))
    pen = ImageDraw.Draw(stamp)
    font = ImageFont.load_default(OVERSAMPLING * rng.uniform(*FONT_SIZES) * min(image.size))
    if rng.random() < 0.5:
        pen.text((rng.uniform(0.3, 0.7) * side, rng.uniform(0.3, 0.7) * side), text, 255, font, "mm")
    else:
        line = f"{text} " * 6
        pitch = rng.uniform(1.8, 3.0) * font.size
        for row in range(math.ceil(side / pitch)):
            pen.text((-rng.uniform(0, 0.3) * side, row * pitch), line, 255, font)
    stamp = stamp.rotate(rng.choice([0, rng.uniform(-45, 45)]), Image.Resampling.BILINEAR).reduce(OVERSAMPLING)
    opacity = rng.uniform(*opacities)
    color = rng.choice([(255, 255, 255), (255, 255, 255), (0, 0, 0), tuple(rng.choices(range(256), k=3))])
    marked = image.copy()
    marked.paste(color, (0, 0), stamp.crop((0, 0, *image.size)).point(lambda level: round(opacity * level)))
    return marked
