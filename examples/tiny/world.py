"""The small model's world: named objects laid over photographs, so that every mask is exact."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from instructdiffusion_pipeline.sample import Sample
from instructdiffusion_pipeline.tasks import restoration, segmentation
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS

SIZE = 64
COLORS = ["red", "blue", "green", "yellow"]
OBJECT_SIZES = (22, 42)  # longer side, pixels
MAX_OBJECTS = 3
MIN_VISIBLE = 0.6  # of what still shows of an object, the share that each later one must leave uncovered
MIN_COLOR_DISTANCE = 110  # from the object's mean colour, so that the paint shows
ABSENT_SHARE = 0.1
DENOISING_SHARE = 0.3
TRAINING_SIGMAS = (8.0, 45.0)


def is_held_out(name: str) -> bool:
    """A tenth of all names, fixed for ever by their hash."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Scene:
    """An RGB picture and the visible mask (bool, height x width) of each named object in it."""

    image: Image.Image
    masks: dict[str, np.ndarray]


class World:
    """Scenes from `folder` as `fetch` filled it.

    Training sees neither the photographs nor the objects whose names are held out. With `unseen_objects` scenes hold
    objects of both kinds, at least one of them unseen, and samples ask for unseen ones only.
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
        """One to three different objects over a background, each mostly visible, at least one in `names`."""
        image = self.background(rng)
        masks: dict[str, np.ndarray] = {}
        names = rng.sample(sorted(self.objects), rng.randint(1, min(MAX_OBJECTS, len(self.objects))))
        names.sort(key=lambda name: name not in self.names)  # the first is never refused its place
        if names[0] not in self.names:
            names[0] = rng.choice(sorted(self.names))
        for name in names:
            layer, mask = self.place(name, rng)
            if all((old & ~mask).sum() >= MIN_VISIBLE * old.sum() for old in masks.values()):
                image.paste(layer, (0, 0), layer)
                masks = {key: old & ~mask for key, old in masks.items()} | {name: mask}
        return Scene(image, masks)

    def place(self, name: str, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
        """The object alone on a transparent canvas at a random size, tilt, brightness and place, and its mask."""
        sprite = self.objects[name].rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
        scale = rng.uniform(*OBJECT_SIZES) / max(sprite.size)
        sprite = sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)
        alpha = sprite.getchannel("A")
        sprite = ImageEnhance.Brightness(sprite).enhance(rng.uniform(0.75, 1.15))
        sprite.putalpha(alpha)
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(sprite, tuple(rng.randint(0, SIZE - side) for side in sprite.size))
        return layer, np.asarray(layer.getchannel("A")) > 127

    def segmentation(self, rng: random.Random, scene: Scene) -> tuple[Sample, str, str]:
        """A sample that names one object of `scene`, or an absent one; also that name and the colour asked for."""
        present, absent = sorted(self.names & scene.masks.keys()), sorted(self.names - scene.masks.keys())
        name = rng.choice(absent if rng.random() < ABSENT_SHARE and absent else present)
        mask = scene.masks.get(name, np.zeros((SIZE, SIZE), bool))
        color = rng.choice(visible_colors(scene.image, mask))
        sample = Sample(
            scene.image, segmentation.draw(scene.image, mask, color), segmentation.instruction(name, color, rng)
        )
        return sample, name, color

    def denoising(self, rng: random.Random, scene: Scene, sigma: float | None = None) -> Sample:
        """A sample that asks for `scene` without noise of `sigma` grey levels (drawn at random if None)."""
        sigma = rng.uniform(*TRAINING_SIGMAS) if sigma is None else sigma
        noisy = restoration.add_noise(scene.image, sigma, np.random.default_rng(rng.getrandbits(32)))
        return Sample(noisy, scene.image, restoration.instruction(rng))

    def sample(self, rng: random.Random) -> Sample:
        """A training sample of either family."""
        scene = self.scene(rng)
        if rng.random() < DENOISING_SHARE:
            return self.denoising(rng, scene)
        return self.segmentation(rng, scene)[0]


def visible_colors(image: Image.Image, mask: np.ndarray) -> list[str]:
    """Colours of the world that differ clearly from the mean colour under `mask`; all of them if it is empty."""
    if not mask.any():
        return COLORS
    mean = np.asarray(image, dtype=np.float32)[mask].mean(0)
    return [name for name in COLORS if np.linalg.norm(mean - MASK_COLORS[name]) >= MIN_COLOR_DISTANCE]
