"""The small model's world: photographs, and named objects laid over them, so that every mask is exact."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

SIZE = 64
OBJECT_SIZES = (22, 40)  # longer side, pixels
# Mostly several: whoever paints all objects, whatever the name, must not get away with it.
OBJECT_COUNTS = {1: 0.15, 2: 0.45, 3: 0.4}
MIN_VISIBLE = 0.6  # of what still shows of an object, the share that each later one must leave uncovered
ATTEMPTS = 5  # to find such a place for an object


def is_held_out(name: str) -> bool:
    """A tenth of all names, fixed for ever by their hash."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Scene:
    """Named objects over a background; each lies on a transparent canvas of its own, later ones cover earlier ones."""

    background: Image.Image
    layers: Mapping[str, Image.Image]

    @cached_property
    def image(self) -> Image.Image:
        """The RGB picture."""
        image = self.background.copy()
        for layer in self.layers.values():
            image.paste(layer, (0, 0), layer)
        return image

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """The visible part of each object, bool, height x width."""
        masks: dict[str, np.ndarray] = {}
        for name, layer in self.layers.items():
            covered = coverage(layer)
            masks = {key: old & ~covered for key, old in masks.items()} | {name: covered}
        return masks

    def fits(self, layer: Image.Image) -> bool:
        """Whether `layer`, laid over the scene, leaves enough of every object to be seen."""
        covered = coverage(layer)
        return all((old & ~covered).sum() >= MIN_VISIBLE * old.sum() for old in self.masks.values())

    def plus(self, name: str, layer: Image.Image) -> "Scene":
        """The scene with one more object, over the others."""
        return Scene(self.background, {**self.layers, name: layer})

    def minus(self, name: str) -> "Scene":
        """The scene as it would look if the object had never been there."""
        return Scene(self.background, {key: layer for key, layer in self.layers.items() if key != name})


def coverage(layer: Image.Image) -> np.ndarray:
    """The pixels (bool, height x width) that a layer covers by more than half."""
    return np.asarray(layer.getchannel("A")) > 127


class World:
    """Scenes from `folder` as `fetch` filled it.

    Training sees neither the photographs nor the objects whose names are held out. With `unseen_objects` scenes hold
    objects of both kinds, at least one of them unseen; `names` are those to ask for.
    """

    def __init__(self, folder: Path, unseen_photographs: bool = False, unseen_objects: bool = False):
        paths = sorted((folder / "photographs").glob("*.png"))
        self.photographs = [
            Image.open(path).convert("RGB") for path in paths if is_held_out(path.stem) == unseen_photographs
        ]
        self.objects = {}
        for path in sorted((folder / "objects").glob("*.png")):
            if unseen_objects or not is_held_out(path.stem):
                sprite = Image.open(path).convert("RGBA")
                sprite.thumbnail((2 * OBJECT_SIZES[1],) * 2)  # enough for the largest, and quicker to rotate
                self.objects[path.stem] = sprite
        self.names = {name for name in self.objects if is_held_out(name) == unseen_objects}

    def background(self, rng: random.Random) -> Image.Image:
        """A random square of a random photograph, mirrored half of the time."""
        photograph = rng.choice(self.photographs)
        side = rng.uniform(0.4, 1) * min(photograph.size)
        left, top = (rng.uniform(0, length - side) for length in photograph.size)
        image = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def scene(self, rng: random.Random) -> Scene:
        """Different objects over a background, each mostly visible, at least one in `names`."""
        scene = Scene(self.background(rng), {})
        (count,) = rng.choices(list(OBJECT_COUNTS), list(OBJECT_COUNTS.values()))
        names = rng.sample(sorted(self.objects), min(count, len(self.objects)))
        names.sort(key=lambda name: name not in self.names)  # the first is never refused its place
        if names[0] not in self.names:
            names[0] = rng.choice(sorted(self.names))
        for name in names:
            layers = (self.place(name, rng) for _ in range(ATTEMPTS))
            layer = next(filter(scene.fits, layers), None)
            scene = scene.plus(name, layer) if layer else scene
        return scene

    def place(
        self,
        name: str,
        rng: random.Random,
        side: float | None = None,
        center: tuple[float, float] | None = None,
    ) -> Image.Image:
        """The object alone on a transparent canvas, at random tilt and brightness.

        `side` (longer side, pixels) and `center` are random, too, unless given; all of the object is in the frame.
        """
        sprite = self.objects[name].rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        scale = (side or rng.uniform(*OBJECT_SIZES)) / max(sprite.size)
        sprite = sprite.resize([max(1, round(length * scale)) for length in sprite.size], Image.Resampling.LANCZOS)
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite).enhance(rng.uniform(0.75, 1.15))
        sprite.putalpha(alpha)
        room = [SIZE - length for length in sprite.size]
        corner = [rng.randint(0, free) for free in room]
        if center:
            wanted = [round(middle - length / 2) for middle, length in zip(center, sprite.size, strict=True)]
            corner = [min(max(0, start), free) for start, free in zip(wanted, room, strict=True)]
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(sprite, tuple(corner))
        return layer
