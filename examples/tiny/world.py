"""The small model's world: photographs, and named objects laid over them, so that every mask is exact."""

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

SIZE = 64
OBJECT_SIZES = (20, 40)  # longer side, pixels
# Mostly several: whoever paints all objects, whatever the name, must not get away with it.
OBJECT_COUNTS = {1: 0.15, 2: 0.45, 3: 0.4}
PAIRS = 0.35  # of the scenes with several objects: two have the same name
MIN_VISIBLE = 0.6  # of what still shows of an object, the share that each later one must leave uncovered
ATTEMPTS = 5  # to find such a place for an object
STYLES = ("fluent", "noto")  # of drawing; in training
UNSEEN_STYLE = "twemoji"


def is_held_out(name: str) -> bool:
    """A tenth of all names, fixed for ever by their hash."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def coverage(layer: Image.Image) -> np.ndarray:
    """The pixels (bool, height x width) that a layer covers by more than half."""
    return np.asarray(layer.getchannel("A")) > 127


@dataclass(frozen=True, eq=False)
class Thing:
    """A named object on a transparent canvas of its own, of the frame's size."""

    name: str
    layer: Image.Image

    @cached_property
    def pixels(self) -> np.ndarray:
        """All it covers, bool, height x width."""
        return coverage(self.layer)

    @property
    def center(self) -> tuple[float, float]:
        """The middle of its bounding box, x and y in pixels."""
        left, top, right, bottom = self.layer.getchannel("A").getbbox()
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """Things over a background; later ones cover earlier ones."""

    background: Image.Image
    things: tuple[Thing, ...] = ()

    @cached_property
    def image(self) -> Image.Image:
        """The RGB picture."""
        image = self.background.copy()
        for thing in self.things:
            image.paste(thing.layer, (0, 0), thing.layer)
        return image

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """The visible part of each thing, bool, height x width."""
        masks: list[np.ndarray] = []
        for thing in self.things:
            masks = [*(mask & ~thing.pixels for mask in masks), thing.pixels]
        return masks

    @property
    def names(self) -> set[str]:
        """What lies there."""
        return {thing.name for thing in self.things}

    def mask(self, *things: Thing) -> np.ndarray:
        """The visible part of all `things` together."""
        return np.logical_or.reduce(
            [mask for thing, mask in zip(self.things, self.masks, strict=True) if thing in things]
        )

    def fits(self, thing: Thing) -> bool:
        """Whether `thing`, laid over the scene, leaves enough of every other to be seen."""
        return all((old & ~thing.pixels).sum() >= MIN_VISIBLE * old.sum() for old in self.masks)

    def plus(self, thing: Thing) -> "Scene":
        """The scene with one more thing, over the others."""
        return Scene(self.background, (*self.things, thing))

    def minus(self, thing: Thing) -> "Scene":
        """The scene as it would look if the thing had never been there."""
        return Scene(self.background, tuple(other for other in self.things if other is not thing))


class World:
    """Scenes from `folder` as `fetch` filled it.

    Training sees neither the photographs, nor the objects whose names are held out, nor `UNSEEN_STYLE`. With
    `unseen_objects` scenes hold objects of both kinds, at least one of them unseen; `names` are those to ask for.
    """

    def __init__(
        self,
        folder: Path,
        unseen_photographs: bool = False,
        unseen_objects: bool = False,
        styles: tuple[str, ...] = STYLES,
    ):
        paths = sorted((folder / "photographs").glob("*.png"))
        self.photographs = [
            Image.open(path).convert("RGB") for path in paths if is_held_out(path.stem) == unseen_photographs
        ]
        self.objects: dict[str, list[Image.Image]] = {}  # name -> one drawing a style
        for style in styles:
            for path in sorted((folder / "objects" / style).glob("*.png")):
                if unseen_objects or not is_held_out(path.stem):
                    sprite = Image.open(path).convert("RGBA")
                    sprite.thumbnail((2 * OBJECT_SIZES[1],) * 2)  # enough for the largest, and quicker to rotate
                    self.objects.setdefault(path.stem, []).append(sprite)
        self.names = {name for name in self.objects if is_held_out(name) == unseen_objects}

    def background(self, rng: random.Random) -> Image.Image:
        """A random square of a random photograph, mirrored half of the time."""
        photograph = rng.choice(self.photographs)
        side = rng.uniform(0.4, 1) * min(photograph.size)
        left, top = (rng.uniform(0, length - side) for length in photograph.size)
        image = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def scene(self, rng: random.Random, pairs: float = PAIRS) -> Scene:
        """Objects over a background, each mostly visible, at least one in `names`.

        With a probability of `pairs`, two of several have the same name.
        """
        scene = Scene(self.background(rng))
        (count,) = rng.choices(list(OBJECT_COUNTS), list(OBJECT_COUNTS.values()))
        names = rng.sample(sorted(self.objects), min(count, len(self.objects)))
        names.sort(key=lambda name: name not in self.names)  # the first is never refused its place
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
        """The object alone on a transparent canvas, at random tilt and brightness.

        `side` (longer side, pixels), `center` and `style` (which of its drawings) are random, too, unless given; all
        of the object is in the frame.
        """
        drawing = rng.choice(self.objects[name]) if style is None else self.objects[name][style]
        sprite = drawing.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        scale = (side or rng.uniform(*OBJECT_SIZES)) / max(sprite.size)
        sprite = sprite.resize([max(1, round(length * scale)) for length in sprite.size], Image.Resampling.LANCZOS)
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite).enhance(rng.uniform(0.75, 1.15))
        sprite.putalpha(alpha)
        return Thing(name, lay(sprite, center, rng))


def lay(sprite: Image.Image, center: tuple[float, float] | None, rng: random.Random) -> Image.Image:
    """A transparent canvas with `sprite` around `center`, or anywhere, but wholly in the frame."""
    room = [SIZE - length for length in sprite.size]
    corner = [rng.randint(0, free) for free in room]
    if center:
        wanted = [round(middle - length / 2) for middle, length in zip(center, sprite.size, strict=True)]
        corner = [min(max(0, start), free) for start, free in zip(wanted, room, strict=True)]
    layer = Image.new("RGBA", (SIZE, SIZE))
    layer.paste(sprite, tuple(corner))
    return layer
