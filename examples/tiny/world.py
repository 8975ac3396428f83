"""Scenes for `instructdiffusion-tiny`: photographs with named objects pasted onto them, so all masks are exact."""

import hashlib
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from figures import draw_figure
from PIL import Image, ImageEnhance, ImageOps

OBJECT_SIZES = (0.1, 0.7)  # longer side of an object, relative to the image's side
# number of objects -> probability; usually several, so that a model that ignores the name has a high loss
OBJECT_COUNTS = {1: 0.15, 2: 0.35, 3: 0.3, 4: 0.2}
PAIRS = 0.35  # fraction of the scenes with several objects in which two have the same name
FIGURE_SHARE = 0.1  # of the backgrounds of scenes, behind the objects
MIN_VISIBLE = 0.6  # fraction of an object's visible pixels that each further object must leave visible
ATTEMPTS = 5  # attempts to find such a position for an object
STYLES = ("fluent", "flat", "noto")  # drawing styles for training
UNSEEN_STYLE = "twemoji"


def is_held_out(name: str) -> bool:
    """Whether a name is held out, as about a tenth are. This depends on the name's hash, so the set never changes."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def coverage(layer: Image.Image) -> np.ndarray:
    """Return the pixels that a layer covers by more than half, bool [height, width]."""
    return np.asarray(layer.getchannel("A")) > 127


@dataclass(frozen=True, eq=False)
class Thing:
    """A named object, drawn on a transparent canvas of the frame's size."""

    name: str
    layer: Image.Image

    @cached_property
    def pixels(self) -> np.ndarray:
        """The pixels that it covers, bool [height, width]."""
        return coverage(self.layer)

    @property
    def center(self) -> tuple[float, float]:
        """The center of its bounding box, x and y in pixels."""
        left, top, right, bottom = self.layer.getchannel("A").getbbox()
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """Objects on a background. Later ones cover earlier ones."""

    background: Image.Image
    things: tuple[Thing, ...] = ()

    @cached_property
    def image(self) -> Image.Image:
        """The RGB image."""
        image = self.background.copy()
        for thing in self.things:
            image.paste(thing.layer, (0, 0), thing.layer)
        return image

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """The visible part of each object, bool [height, width]."""
        masks: list[np.ndarray] = []
        for thing in self.things:
            masks = [*(mask & ~thing.pixels for mask in masks), thing.pixels]
        return masks

    @property
    def names(self) -> set[str]:
        """The names of its objects."""
        return {thing.name for thing in self.things}

    def mask(self, *things: Thing) -> np.ndarray:
        """Return the union of the visible parts of `things`."""
        return np.logical_or.reduce(
            [mask for thing, mask in zip(self.things, self.masks, strict=True) if thing in things]
        )

    def fits(self, thing: Thing) -> bool:
        """Whether `thing` has pixels of its own and leaves enough of every other object visible."""
        return bool(thing.pixels.any()) and all(
            (old & ~thing.pixels).sum() >= MIN_VISIBLE * old.sum() for old in self.masks
        )

    def plus(self, thing: Thing) -> "Scene":
        """Return the scene with one more object, in front of the others."""
        return Scene(self.background, (*self.things, thing))

    def minus(self, thing: Thing) -> "Scene":
        """Return the scene without an object. What it covered is visible."""
        return Scene(self.background, tuple(other for other in self.things if other is not thing))


class World:
    """Generates scenes from the photographs and objects that `fetch` wrote to `folder`.

    The defaults are for training: held-out photographs, held-out object names and `UNSEEN_STYLE` are not used.

    Args:
        folder: see `fetch`.
        frame: width and height of the images, in pixels.
        names: names of the objects, if not all that `fetch` wrote.
        unseen_photographs: use the held-out photographs only.
        unseen_objects: use all objects, with at least one held-out name in every scene.
        styles: drawing styles of the objects.
        sizes: range of an object's longer side, relative to the image's shorter side.
        counts: number of objects -> probability.
        figures: fraction of the scenes with a figure behind the objects.
        varied: mirror half of the drawings and vary their saturation.

    Attributes:
        names: the names for instructions: with `unseen_objects` the held-out ones, otherwise all that are used.
    """

    def __init__(
        self,
        folder: Path,
        frame: tuple[int, int],
        names: Collection[str] | None = None,
        unseen_photographs: bool = False,
        unseen_objects: bool = False,
        styles: tuple[str, ...] = STYLES,
        sizes: tuple[float, float] = OBJECT_SIZES,
        counts: Mapping[int, float] = OBJECT_COUNTS,
        figures: float = FIGURE_SHARE,
        varied: bool = True,
    ):
        self.frame, self.sizes, self.counts, self.figures, self.varied = frame, sizes, counts, figures, varied
        paths = sorted((folder / "photographs").glob("*.jpg"))
        if not paths:
            raise ValueError(
                f"`folder` must have what `fetch` writes; there is no photograph in {folder}/photographs."
            )
        self.photographs = [
            Image.open(path).convert("RGB") for path in paths if is_held_out(path.stem) == unseen_photographs
        ]
        self.objects: dict[str, list[Image.Image]] = {}  # name -> one drawing for each style
        for style in styles:
            for path in sorted((folder / "objects" / style).glob("*.png")):
                if (names is None or path.stem in names) and (unseen_objects or not is_held_out(path.stem)):
                    self.objects.setdefault(path.stem, []).append(Image.open(path).convert("RGBA"))
        self.names = {name for name in self.objects if is_held_out(name) == unseen_objects}

    def background(self, rng: random.Random) -> Image.Image:
        """Return a random crop of a random photograph, mirrored with a probability of 0.5."""
        photograph = rng.choice(self.photographs)
        scale = rng.uniform(0.4, 1) * min(of / side for of, side in zip(photograph.size, self.frame, strict=True))
        width, height = (scale * side for side in self.frame)
        left, top = (rng.uniform(0, of - side) for of, side in zip(photograph.size, (width, height), strict=True))
        image = photograph.resize(self.frame, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def scene(self, rng: random.Random, pairs: float = PAIRS, figures: float | None = None) -> Scene:
        """Generate a scene. At least one object's name is in `names`; all objects are mostly visible.

        `pairs` is the probability that two objects have the same name, if there are several; `figures` that of a
        figure behind the objects, by default the world's.
        """
        background = self.background(rng)
        if rng.random() < (self.figures if figures is None else figures):
            figure, _ = draw_figure(rng, rng.random() < 0.5, min(self.frame))
            background.paste(figure, (0, 0), figure)
        scene = Scene(background)
        (count,) = rng.choices(list(self.counts), list(self.counts.values()))
        names = rng.sample(sorted(self.objects), min(count, len(self.objects)))
        names.sort(key=lambda name: name not in self.names)  # there is always a position for the first object
        if names[0] not in self.names:
            names[0] = rng.choice(sorted(self.names))
        if count > 1 and rng.random() < pairs:
            names[1:2] = names[:1]
        for name in names:
            things = (self.place(name, rng) for _ in range(ATTEMPTS))
            thing = next(filter(scene.fits, things), None)
            scene = scene.plus(thing) if thing else scene
        return scene

    def place(
        self,
        name: str,
        rng: random.Random,
        side: float | None = None,
        center: tuple[float, float] | None = None,
        style: int | None = None,
    ) -> Thing:
        """Draw an object on a transparent canvas, with a random rotation and brightness.

        In a varied world, reflection and saturation are random, too.
        `side` (the longer side in pixels), `center` and `style` (index of the drawing) are random by default. The
        object is always completely inside the frame.
        """
        drawing = rng.choice(self.objects[name]) if style is None else self.objects[name][style]
        drawing = ImageOps.mirror(drawing) if self.varied and rng.random() < 0.5 else drawing
        side = side or min(self.frame) * rng.uniform(*self.sizes)
        # Scaled before and after the rotation, because rotating a small image is much faster.
        sprite = with_longer_side(drawing, side).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        sprite = with_longer_side(sprite.crop(sprite.getchannel("A").getbbox()), side)
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite).enhance(rng.uniform(0.75, 1.15))
        if self.varied:
            sprite = ImageEnhance.Color(sprite).enhance(rng.uniform(0.7, 1.3))
        sprite.putalpha(alpha)
        return Thing(name, on_canvas(sprite, self.frame, center, rng))


def with_longer_side(picture: Image.Image, side: float) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.LANCZOS)


def on_canvas(
    sprite: Image.Image, frame: tuple[int, int], center: tuple[float, float] | None, rng: random.Random
) -> Image.Image:
    """Paste `sprite` on a transparent canvas, completely inside, at random or as near as possible to `center`."""
    room = [side - length for side, length in zip(frame, sprite.size, strict=True)]
    corner = [rng.randint(0, free) for free in room]
    if center:
        wanted = [round(middle - length / 2) for middle, length in zip(center, sprite.size, strict=True)]
        corner = [min(max(0, start), free) for start, free in zip(wanted, room, strict=True)]
    layer = Image.new("RGBA", frame)
    layer.paste(sprite, tuple(corner))
    return layer
