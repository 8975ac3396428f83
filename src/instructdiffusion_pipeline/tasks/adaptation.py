"""The adaptation stage: images with marks, and captions that name the marks (Geng et al., CVPR 2024, section 3.3).

In this stage a text-to-image model is trained to draw colored discs, boxes and patches.
"""

import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, upright_rgb
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, MASK_COLORS, paint, visible_colors
from instructdiffusion_pipeline.tasks.keypoints import RADIUS
from instructdiffusion_pipeline.tasks.segmentation import OPACITY
from instructdiffusion_pipeline.tasks.wording import join_words, with_a

MAX_MARKS = 3  # on an image
MAX_WORDS = 35  # of a caption, so that the names of the marks are within the 77 tokens
SIDES = (0.15, 0.5)  # of boxes and patches, as fractions of the image's sides
CORNERS = 9  # of a patch's outline
COLORS = {"disc": KEYPOINT_COLORS, "box": KEYPOINT_COLORS, "patch": MASK_COLORS}
NOUNS = {
    "disc": ["disc", "dot", "round mark"],
    "box": ["box", "frame", "rectangle"],
    "patch": ["veil", "patch", "tint"],
}

# {caption}: the image's caption; {marks}: "a red disc and a yellow box"
TEMPLATES = [
    "{caption}, with {marks}",
    "{caption}, with {marks} drawn on it",
    "{caption}; {marks} on top",
    "{marks} over a picture: {caption}",
    "{caption}, marked by {marks}",
    "a picture with {marks}, showing {caption}",
]


class Mark(NamedTuple):
    """A disc, box or patch of a named color, and the box that it fills."""

    kind: str
    color: str
    box: Box


@dataclass(frozen=True)
class Adaptation:
    """Asks for an image of `text` with one to three `marks` in different colors.

    Discs are drawn as in `Keypoints`, patches are half transparent like masks, and boxes are outlines.
    """

    text: str
    marks: tuple[Mark, ...]

    family: ClassVar[str] = "adaptation"
    # Without an input image this equals classifier-free guidance of 7.5.
    settings: ClassVar[dict[str, float]] = {
        "num_inference_steps": 50,
        "guidance_scale": 7.0,
        "image_guidance_scale": 0.5,
    }

    @classmethod
    def from_annotation(cls, image: Image.Image, caption: str, rng: random.Random) -> "Adaptation":
        """Choose random marks, preferably in visible colors."""
        image = upright_rgb(image)
        marks: list[Mark] = []
        for _ in range(rng.randint(1, MAX_MARKS)):
            kind = rng.choice(list(COLORS))
            box = random_box(image.size, kind, rng)
            free = COLORS[kind].keys() - {mark.color for mark in marks}
            showing = free.intersection(visible_colors(image, mark_pixels(kind, box, image.size), COLORS[kind]))
            marks.append(Mark(kind, rng.choice(sorted(showing or free)), box))
        return cls(" ".join(caption.split()[:MAX_WORDS]).rstrip(". "), tuple(marks))

    def draw(self, image: Image.Image, caption: str) -> Image.Image:
        """Draw the marks on `image`, later ones over earlier ones."""
        image = upright_rgb(image)
        pixels = np.array(image)
        for mark in self.marks:
            opacity = OPACITY if mark.kind == "patch" else 1.0
            paint(pixels, mark_pixels(mark.kind, mark.box, image.size), COLORS[mark.kind][mark.color], opacity)
        return Image.fromarray(pixels)

    def instruction(self, rng: random.Random | None = None) -> str:
        """The caption and the names of the marks; without `rng` always the same wording."""
        names = [with_a(f"{mark.color} {rng.choice(NOUNS[mark.kind]) if rng else mark.kind}") for mark in self.marks]
        template = rng.choice(TEMPLATES) if rng else TEMPLATES[0]
        return template.format(caption=self.text, marks=join_words(names))


def random_box(size: tuple[int, int], kind: str, rng: random.Random) -> Box:
    """A random box for a mark inside an image of `size` pixels."""
    sides = [rng.uniform(*SIDES) * length for length in size] if kind != "disc" else [2 * RADIUS * min(size)] * 2
    left, top = (rng.uniform(0, length - side) for length, side in zip(size, sides, strict=True))
    return left, top, left + sides[0], top + sides[1]


def mark_pixels(kind: str, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The pixels of a mark, bool [height, width]. The random outline of a patch is determined by its box."""
    canvas = Image.new("1", size)
    pen = ImageDraw.Draw(canvas)
    if kind == "disc":
        pen.ellipse(box, 1)
    elif kind == "box":
        pen.rectangle(box, outline=1, width=max(1, round(min(size) / 85)))  # 3 pixels at 256
    else:
        rng, (left, top, right, bottom) = random.Random(str(box)), box
        angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
        reach = np.array([rng.uniform(0.5, 1) for _ in angles])
        x = (left + right) / 2 + reach * np.cos(angles) * (right - left) / 2
        y = (top + bottom) / 2 + reach * np.sin(angles) * (bottom - top) / 2
        pen.polygon(list(zip(x.tolist(), y.tolist(), strict=True)), 1)
    return np.array(canvas)
