"""Segmentation: the named object is blended with a color at 50 % opacity (Geng et al., CVPR 2024, section 3.1)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, upright_rgb
from instructdiffusion_pipeline.tasks import EmptyAnnotation, Task
from instructdiffusion_pipeline.tasks.colors import (
    MASK_COLORS,
    NamedColors,
    check_colors,
    coverage,
    paint,
    visible_colors,
)
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.wording import join_words, with_the
from instructdiffusion_pipeline.types import Masks

OPACITY = 0.5  # fraction of the color in a painted pixel
READING_SIDE = 640  # maximum short side for decoding, in pixels; outputs of models have no finer details
MIN_SCORE = 0.3  # minimum score of a mask; VAE artifacts and weak traces of color have lower scores
ABSENT_SHARE = 0.2  # probability of choosing an absent object, if the annotation has any

# {things}: "the cat in blue and the dogs in red"
LIST_TEMPLATES = [
    "mark {things}",
    "paint {things}",
    "highlight {things}",
    "segment {things}",
    "tint {things} and leave the rest alone",
    "show {things}",
    "shade {things}, please",
    "fill {things}",
    "cover {things}",
    "lay a see-through coat of paint over {things}",
]
# {name}: "the cat"
SINGLE_TEMPLATES = [
    "paint {name} {color}",
    "color {name} {color}",
    "color {name} {color} and leave the rest alone",
    "put a {color} tint on {name}",
    "highlight {name} with {color}",
    "lay {color} over every pixel of {name}",
    "show me {name} in {color}",
    "find {name} and use {color} as the cover",
    "give {name} a {color} coat",
    "use {color} for the pixels that belong to {name}",
    "turn {name} {color} wherever visible",
    "put {name} under a {color} veil",
]


@dataclass(frozen=True)
class Segmentation:
    """Asks to paint each object in its color: `{"cat": "blue"}`, names to keys of `MASK_COLORS`.

    Raises a ValueError if a color is unknown or used twice, or if no name is given.
    """

    colors: Mapping[str, str]

    family: ClassVar[str] = "segmentation"
    settings: ClassVar[dict[str, float]] = {
        "num_inference_steps": 100,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
    }

    def __post_init__(self) -> None:
        check_colors(self.colors, MASK_COLORS)
        object.__setattr__(self, "colors", NamedColors(self.colors))

    @classmethod
    def from_annotation(cls, image: Image.Image, masks: Masks, rng: random.Random) -> "Segmentation":
        """Choose an object (with probability 0.2 an absent one, if there is any) and a visible color."""
        present = [name for name, mask in masks.items() if mask.any()]
        absent = [name for name, mask in masks.items() if not mask.any()]
        if not masks:
            raise EmptyAnnotation("`masks` must have at least one object; got none.")
        name = rng.choice(absent if absent and (not present or rng.random() < ABSENT_SHARE) else present)
        return cls({name: rng.choice(visible_colors(image, masks[name], MASK_COLORS))})

    def instruction(self, rng: random.Random | None = None) -> str:
        """The instruction: a random wording with `rng`, otherwise always the same."""
        things = join_words([f"{with_the(name)} in {color}" for name, color in self.colors.items()])
        if rng is None:
            return LIST_TEMPLATES[0].format(things=things)
        if len(self.colors) > 1 or rng.random() < len(LIST_TEMPLATES) / len(LIST_TEMPLATES + SINGLE_TEMPLATES):
            return rng.choice(LIST_TEMPLATES).format(things=things)
        ((name, color),) = self.colors.items()
        return rng.choice(SINGLE_TEMPLATES).format(name=with_the(name), color=color)

    def draw(self, image: Image.Image, masks: Masks) -> Image.Image:
        """Blend each color into `image` where its mask is set; objects without a mask are not painted.

        The last of several overlapping masks is painted.
        """
        source = np.array(upright_rgb(image))
        pixels = source.copy()
        for name, color in self.colors.items():
            if name in masks:
                painted = source.copy()
                paint(painted, masks[name], MASK_COLORS[color], OPACITY)
                pixels[masks[name]] = painted[masks[name]]
        return Image.fromarray(pixels)

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> dict[str, "Mask"]:
        """The mask of each object, in pixels of `image`: the pixels whose coverage by its color is more than 0.5.

        A mask with a score below `MIN_SCORE` is returned empty. `answer` may have another size. It shows the `box` of
        `image` (see `working_size`), or all of it if `box` is None. Masks are False outside the box.
        """
        return masks_from_margins(self.margins(image, answer, box))

    def margins(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> dict[str, np.ndarray]:
        """The coverage of each pixel of `image` minus 0.5: float32 [height, width], positive inside the object.

        Arguments as in `read`. Outside the box the margin is -0.5.
        """
        frame = Frame.of(image, answer, box, shortest=READING_SIDE)
        colors = [MASK_COLORS[color] for color in self.colors.values()]
        shares, _ = coverage(frame.source, frame.answer, colors, OPACITY)
        return {name: frame.place(share - 0.5, outside=-0.5) for name, share in zip(self.colors, shares, strict=True)}

    def split(self) -> list["Segmentation"]:
        """One task for each object."""
        return [Segmentation({name: color}) for name, color in self.colors.items()]

    def overlay(self, image: Image.Image, masks: dict[str, "Mask"]) -> Image.Image:
        """`image` with the masks in their colors, outlined in the complementary color."""
        pixels = np.array(upright_rgb(image))
        for name, color in self.colors.items():
            mask, (red, green, blue) = masks[name].pixels, MASK_COLORS[color]
            paint(pixels, mask, MASK_COLORS[color], opacity=0.6)
            paint(pixels, outline(mask), (255 - red, 255 - green, 255 - blue), opacity=1.0)
        return Image.fromarray(pixels)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of `mask` (bool, [height, width]) above, below, left or right of which is a pixel outside of it."""
    padded = np.pad(mask, 1, mode="edge")
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def prompted_tasks(task: Task) -> Sequence[Task]:
    """The tasks that have a prompt each: one for each object of a segmentation, otherwise `task` itself."""
    return task.split() if isinstance(task, Segmentation) else [task]


def masks_from_margins(margins: Mapping[str, np.ndarray]) -> dict[str, "Mask"]:
    """The mask of each object.

    A pixel with several positive margins belongs to the object with the highest one, or the first of these. Traces of
    color that are too weak for a mask take no pixels from other objects.
    """
    found = {name: without_traces(margin) for name, margin in margins.items()}
    owner = np.argmax(list(found.values()), axis=0)
    return {
        name: Mask.from_margin(np.where(owner == number, margin, np.minimum(margin, 0)))
        for number, (name, margin) in enumerate(found.items())
    }


def without_traces(margin: np.ndarray) -> np.ndarray:
    """The margin of an object, at most 0 if its mask is empty."""
    return margin if Mask.from_margin(margin).pixels.any() else np.minimum(margin, 0)


@dataclass(frozen=True, eq=False)
class Mask:
    """The pixels of an object (bool, height x width), and a score from 0 to 1 for the presence of the object.

    The score is the mean of 2 * coverage - 1 over the pixels of the mask: 1 for full coverage. It is 0 for an empty
    mask.
    """

    pixels: np.ndarray
    score: float

    @classmethod
    def from_margin(cls, margin: np.ndarray) -> "Mask":
        """The mask of pixels with a positive margin (coverage minus 0.5); empty if the score is below `MIN_SCORE`."""
        pixels = margin > 0
        score = float(np.clip(2 * margin[pixels], 0, 1).mean()) if pixels.any() else 0.0
        return cls(pixels, score) if score >= MIN_SCORE else cls(np.zeros_like(pixels), 0.0)

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) in whole pixels, right and bottom not included, or None for an empty mask."""
        if not self.pixels.any():
            return None
        rows, columns = np.flatnonzero(self.pixels.any(1)), np.flatnonzero(self.pixels.any(0))
        return (
            int(columns[0]),
            int(rows[0]),
            int(columns[-1] + 1),
            int(rows[-1] + 1),
        )

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's compressed RLE, {"size": [height, width], "counts": str}; needs pycocotools."""
        from pycocotools import mask as coco

        encoded = coco.encode(np.asfortranarray(self.pixels.astype(np.uint8)))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}

    @property
    def polygons(self) -> list[list[float]]:
        """COCO's polygons [x0, y0, x1, y1, ...] along pixel edges, one for each connected part; needs scikit-image.

        Holes are filled, as COCO's polygons have none.
        """
        from skimage.measure import find_contours, label, regionprops

        polygons = []
        for part in regionprops(label(self.pixels, connectivity=1)):
            # Upsample by 2, so that contour corners are off by at most half a pixel.
            enlarged = np.pad(part.image_filled.repeat(2, 0).repeat(2, 1), 1)
            (outline,) = find_contours(enlarged, 0.5)
            rows, columns = outline[:-1].T
            top, left = part.bbox[:2]
            polygons.append(np.stack([left + (columns - 0.5) / 2, top + (rows - 0.5) / 2], 1).ravel().tolist())
        return polygons
