"""The world's examples of each task family, as data sets: (image, annotation) by index."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from color_edits import grade
from degradations import add_blur, add_watermark
from edits import Change, edit_objects
from figures import draw_figure
from PIL import Image
from pose import WholePose
from referring_expressions import phrases, speaks_of
from world import SIZE, Scene, World

from instructdiffusion_pipeline.datasets.mixture import FixedTask, Mixture, Source
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration, add_noise
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Edit, Joints, Masks

SIGMAS = (8.0, 45.0)  # of noise, in grey levels
FACING_SHARE = 0.7  # of the figures; the others show their back
# The same among pictures to restore or to give another look. Training has no say in these, or else scores of models
# that were trained otherwise would be of different pictures.
SHOWN_FACING_SHARE = 0.6


@dataclass(frozen=True)
class Drawn:
    """`length` examples, each made when it is asked for, out of random numbers that `seed` and its index fix."""

    example: Callable[[random.Random], tuple[Image.Image, Any]]
    length: int
    seed: int | str = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # none ever is

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"example {index} of seed {self.seed}"

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"index: got {index}, there are {self.length} examples")
        return self.example(random.Random(f"{self.seed} {index}"))


def segmentation(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """A scene, and the mask of everything that can be spoken of in it, and of every name that is absent."""
    return annotated(world.scene(rng), world, rng)


def pairs(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """A scene with two things of one name, and the masks of the left and the right one."""
    while True:
        scene = world.scene(rng, pairs=1)
        image, masks = annotated(scene, world, rng)
        sides = {words: mask for words, mask in masks.items() if mask.any() and ("left" in words or "right" in words)}
        if sides:
            return image, sides


def absent(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """A scene, and the empty masks of the names that are not there."""
    image, masks = segmentation(world, rng)
    return image, {words: mask for words, mask in masks.items() if not mask.any()}


def annotated(scene: Scene, world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """A scene's picture and its masks, also of what is not among the world's `names` to ask for."""
    masks = {words: scene.mask(*things) for words, things in phrases(scene, set(world.objects), rng).items()}
    return scene.image, masks | dict.fromkeys(sorted(world.objects.keys() - scene.names), np.zeros((SIZE, SIZE), bool))


def keypoints(world: World, rng: random.Random, facing_share: float = FACING_SHARE) -> tuple[Image.Image, Joints]:
    """A figure over a photograph, mostly facing the viewer."""
    layer, joints = draw_figure(rng, faces_viewer=rng.random() < facing_share)
    image = world.background(rng)
    image.paste(layer, (0, 0), layer)
    return image, joints


def picture(world: World, rng: random.Random) -> Image.Image:
    """A photograph, alone or with something in it."""
    example = rng.choice([None, None, segmentation, partial(keypoints, facing_share=SHOWN_FACING_SHARE)])
    return example(world, rng)[0] if example else world.background(rng)


def noisy(world: World, rng: random.Random, sigmas: tuple[float, float] = SIGMAS) -> tuple[Image.Image, Image.Image]:
    """A picture with white noise, and without."""
    clean = picture(world, rng)
    return add_noise(clean, rng.uniform(*sigmas), np.random.default_rng(rng.getrandbits(32))), clean


def blurred(world: World, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """A blurred picture, and a sharp one."""
    clean = picture(world, rng)
    return add_blur(clean, rng), clean


def watermarked(world: World, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """A picture with lettering across it, and without."""
    clean = picture(world, rng)
    return add_watermark(clean, rng), clean


def changed(
    world: World, rng: random.Random, change: Callable[[World, random.Random], Change]
) -> tuple[Image.Image, Edit]:
    """One kind of edit."""
    return change(world, rng).sample


def graded(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """A picture and another look of it."""
    image = picture(world, rng)
    return image, grade(image, rng)


def pick_named(image: Image.Image, masks: Masks, rng: random.Random, names: set[str]) -> Segmentation:
    """One phrase about things of these `names`."""
    return Segmentation.from_annotation(
        image, {words: mask for words, mask in masks.items() if speaks_of(words, names)}, rng
    )


def pick_few(
    image: Image.Image, joints: Joints, rng: random.Random, counts: Sequence[int] = (1, 2, 2, 3)
) -> Keypoints:
    """At most as many joints as one of `counts`: a small model is slow to learn which colour is whose of five."""
    names = rng.sample(sorted(joints), rng.choice(counts))
    return Keypoints.from_annotation(image, {name: joints[name] for name in names}, rng)


# name -> share of the training samples, examples, and which question to ask of one
FAMILIES: dict[str, tuple[float, Callable, Callable[..., Task]]] = {
    "segmentation": (0.24, segmentation, Segmentation.from_annotation),
    "left or right": (0.05, pairs, Segmentation.from_annotation),
    "absent": (0.11, absent, Segmentation.from_annotation),
    "pose": (0.07, keypoints, FixedTask(WholePose())),
    "keypoints": (0.17, keypoints, Keypoints.from_annotation),
    "few keypoints": (0.09, keypoints, pick_few),
    "noise": (0.04, noisy, FixedTask(Restoration("noise"))),
    "blur": (0.05, blurred, FixedTask(Restoration("blur"))),
    "watermark": (0.05, watermarked, FixedTask(Restoration("watermark"))),
    "objects": (0.1, edit_objects, Editing.from_annotation),
    "grades": (0.03, graded, Editing.from_annotation),
}


def source(name: str, world: World, count: int, seed: int) -> Source:
    """`count` examples of one of `FAMILIES`, and its question.

    Each family has random numbers of its own: two that begin alike would else share their pictures.
    """
    _, example, pick = FAMILIES[name]
    return Source(name, Drawn(partial(example, world), count, f"{seed} {name}"), pick)


def mixture(world: World, count: int, seed: int = 0) -> Mixture:
    """About `count` different training samples of all families, by their shares."""
    return Mixture(
        [(source(name, world, round(share * count), seed), 1.0) for name, (share, *_) in FAMILIES.items()], seed
    )
