"""Map output pixels to input pixels. The output image shows a box of the input at another size."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, upright_rgb


class Frame(NamedTuple):
    """Input and output image resized to one size, and their box in the input.

    `source` and `answer` are [height, width, 3] arrays, 8 bits; `box` (left, top, right, bottom) is in pixels of the
    input, whose (width, height) is `size`.
    """

    source: np.ndarray
    answer: np.ndarray
    box: Box
    size: tuple[int, int]

    @classmethod
    def of(
        cls,
        image: Image.Image,
        answer: Image.Image,
        box: Box | None = None,
        shortest: int | None = None,
        enlarge: bool = False,
    ) -> "Frame":
        """Resize `answer` and the `box` of `image` that it shows (None: all of it) to the smaller of their two sizes.

        `shortest` limits the shorter side, in pixels. With `enlarge`, the shorter side has exactly this length, and
        the aspect ratio is that of `answer`.
        """
        image, answer = upright_rgb(image), upright_rgb(answer)
        box = box or (0.0, 0.0, float(image.width), float(image.height))
        if not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
            raise ValueError(f"`box` must lie inside the {image.width} x {image.height} pixels of `image`; got {box}.")
        spans = (box[2] - box[0], box[3] - box[1])
        size = list(answer.size)
        if not enlarge:
            size = [max(1, min(round(span), side)) for span, side in zip(spans, size, strict=True)]
        if shortest and (enlarge or min(size) > shortest):
            size = [round(side * shortest / min(size)) for side in size]
        width, height = size
        source = image.resize((width, height), Image.Resampling.LANCZOS, box)
        shown = answer.resize((width, height), Image.Resampling.LANCZOS)
        return cls(np.asarray(source), np.asarray(shown), box, image.size)

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the input per pixel of the frame, along x and y."""
        height, width = self.source.shape[:2]
        return (self.box[2] - self.box[0]) / width, (self.box[3] - self.box[1]) / height

    def place(self, plane: np.ndarray, outside: float) -> np.ndarray:
        """Resample a [height, width] array to the input size, as float32, with `outside` as value outside the box."""
        x, y = self.scale
        left, top = math.floor(self.box[0]), math.floor(self.box[1])
        right, bottom = math.ceil(self.box[2]), math.ceil(self.box[3])
        framed = Image.fromarray(plane.astype(np.float32)).transform(
            (right - left, bottom - top),
            Image.Transform.AFFINE,
            (1 / x, 0, (left - self.box[0]) / x, 0, 1 / y, (top - self.box[1]) / y),
            Image.Resampling.BILINEAR,
            fillcolor=outside,
        )
        placed = np.full(self.size[::-1], outside, np.float32)
        placed[top:bottom, left:right] = framed
        return placed

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Convert a position in pixels of the frame to pixels of the input."""
        return self.box[0] + (x + 0.5) * self.scale[0] - 0.5, self.box[1] + (y + 0.5) * self.scale[1] - 0.5


def inner_box(box: Box) -> tuple[int, int, int, int]:
    """The box of the whole pixels inside a box."""
    left, top, right, bottom = box
    return math.ceil(left), math.ceil(top), math.floor(right), math.floor(bottom)


def paste_answer(image: Image.Image, answer: Image.Image, box: Box | None) -> Image.Image:
    """Paste `answer` over the whole pixels in the `box` of `image` that it shows (None: all of it).

    Pixels outside the box are copied from `image`. If the box contains no whole pixel, `image` is returned.
    """
    image, answer = upright_rgb(image), upright_rgb(answer)
    left, top, right, bottom = box or (0.0, 0.0, float(image.width), float(image.height))
    whole = inner_box((left, top, right, bottom))
    size = (whole[2] - whole[0], whole[3] - whole[1])
    if min(size) > 0:
        x, y = answer.width / (right - left), answer.height / (bottom - top)
        region = ((whole[0] - left) * x, (whole[1] - top) * y, (whole[2] - left) * x, (whole[3] - top) * y)
        image.paste(answer.resize(size, Image.Resampling.LANCZOS, region), whole[:2])
    return image


def before_and_after(image: Image.Image, answer: Image.Image) -> Image.Image:
    """The left half of `image`, the right half of `answer` (of the same size), and a line between them."""
    sheet = upright_rgb(image)
    middle = sheet.width // 2
    sheet.paste(answer.crop((middle, 0, *answer.size)), (middle, 0))
    ImageDraw.Draw(sheet).line([(middle, 0), (middle, sheet.height)], "white", max(1, sheet.width // 200))
    return sheet
