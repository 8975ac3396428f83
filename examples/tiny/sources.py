"""Generated datasets of each task family, with (image, annotation) by index."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from color_edits import edit_colors
from degradations import BLUR_RADII, OPACITIES, add_blur, add_watermark
from edits import Change, edit_objects
from figures import draw_figure
from PIL import Image
from pose import WholePose
from referring_expressions import mentions, referring_expressions
from world import Scene, World

from instructdiffusion_pipeline.datasets.mixture import FixedTask, Mixture, Source
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, visible_colors
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration, add_noise
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Edit, Joints, Masks

ABSENT = 10  # number of absent objects in the annotation of a scene
SIGMAS = (5.0, 60.0)  # of noise, in gray levels
FACING_SHARE = 0.7  # fraction of figures that face the viewer, in training of keypoints
# The same fraction in images for restoration and color edits. It is a separate constant, so that a change of the
# keypoint training does not change the images on which these tasks are scored.
PICTURE_FACING_SHARE = 0.6
OBJECTS_SHARE = 0.3  # fraction of figures with objects behind them, in training of keypoints


@dataclass(frozen=True)
class GeneratedDataset:
    """A dataset of `length` generated examples. An example is determined by `seed` and its index."""

    example: Callable[[random.Random], tuple[Image.Image, Any]]
    length: int
    seed: int | str = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # required by AnnotatedImages; always empty

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"example {index} of seed {self.seed}"

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"`index` must be from 0 to {self.length - 1}; got {index}.")
        return self.example(random.Random(f"{self.seed} {index}"))


def segmentation(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make a scene, with the masks of all objects and empty masks of absent names."""
    return annotate(world.scene(rng), world, rng)


def pairs(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make a scene with two objects of the same name, with the masks of the left and the right one."""
    while True:
        scene = world.scene(rng, pairs=1)
        image, masks = annotate(scene, world, rng)
        sides = {words: mask for words, mask in masks.items() if mask.any() and ("left" in words or "right" in words)}
        if sides:
            return image, sides


def absent(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make a scene, with the empty masks of absent names."""
    image, masks = segmentation(world, rng)
    return image, {words: mask for words, mask in masks.items() if not mask.any()}


def present(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make a scene of objects with different names, with their masks. A scene with too few objects is drawn again."""
    while True:
        scene = world.scene(rng, pairs=0)
        if len(scene.things) in world.counts:
            return scene.image, {thing.name: mask for thing, mask in zip(scene.things, scene.masks, strict=True)}


def annotate(scene: Scene, world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Return the image of a scene and masks by referring expression, also for objects outside `world.names`.

    `ABSENT` of the other names get an empty mask.
    """
    expressions = referring_expressions(scene, set(world.objects), rng)
    masks = {words: scene.mask(*things) for words, things in expressions.items()}
    absent = sorted(world.names - scene.names)
    absent = rng.sample(absent, min(ABSENT, len(absent)))
    return scene.image, masks | dict.fromkeys(absent, np.zeros(scene.image.size[::-1], bool))


def keypoints(
    world: World, rng: random.Random, facing_share: float = FACING_SHARE, objects_share: float = OBJECTS_SHARE
) -> tuple[Image.Image, Joints]:
    """Draw a figure on a photograph.

    `facing_share` is the probability that it faces the viewer, `objects_share` that there are objects behind it.
    """
    layer, joints = draw_figure(rng, rng.random() < facing_share, min(world.frame))
    image = world.scene(rng, figures=0).image if rng.random() < objects_share else world.background(rng)
    image.paste(layer, (0, 0), layer)
    return image, joints


def picture(world: World, rng: random.Random) -> Image.Image:
    """Return a photograph, a scene or a figure on a photograph."""
    figure = partial(keypoints, facing_share=PICTURE_FACING_SHARE, objects_share=0)
    example = rng.choice([None, None, segmentation, figure])
    return example(world, rng)[0] if example else world.background(rng)


def noisy(world: World, rng: random.Random, sigmas: tuple[float, float] = SIGMAS) -> tuple[Image.Image, Image.Image]:
    """Return an image with white noise, and the clean image."""
    clean = picture(world, rng)
    return add_noise(clean, rng.uniform(*sigmas), np.random.default_rng(rng.getrandbits(32))), clean


def blurred(
    world: World, rng: random.Random, radii: tuple[float, float] = BLUR_RADII
) -> tuple[Image.Image, Image.Image]:
    """Return a blurred image, and the sharp image."""
    clean = picture(world, rng)
    return add_blur(clean, rng, radii), clean


def watermarked(
    world: World, rng: random.Random, opacities: tuple[float, float] = OPACITIES
) -> tuple[Image.Image, Image.Image]:
    """Return an image with a watermark, and the clean image."""
    clean = picture(world, rng)
    return add_watermark(clean, rng, opacities), clean


def edited(
    world: World, rng: random.Random, change: Callable[[World, random.Random], Change]
) -> tuple[Image.Image, Edit]:
    """Make a scene and apply the edit `change`."""
    return change(world, rng).sample


def color_edited(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """Return an image and a random edit of its colors."""
    image = picture(world, rng)
    return image, edit_colors(image, rng)


def recolored_scene(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """Return a scene and a random edit of its colors."""
    image = world.scene(rng).image
    return image, edit_colors(image, rng)


def at_the_rim(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make an image with one object that touches a random side of the image, and its mask."""
    width, height = world.frame
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    center = rng.choice([(0, y), (width, y), (x, 0), (x, height)])
    name = rng.choice(sorted(world.names))
    scene = Scene(world.background(rng)).plus(world.place(name, rng, center=center))
    return scene.image, {name: scene.masks[0]}


def one_each(world: World, rng: random.Random) -> tuple[Image.Image, Masks]:
    """Make a scene whose objects have different names, and the mask of each."""
    while True:
        scene = world.scene(rng, pairs=0)
        if len(scene.things) == max(world.counts) and scene.names <= world.names:
            return scene.image, {thing.name: mask for thing, mask in zip(scene.things, scene.masks, strict=True)}


def all_at_once(image: Image.Image, masks: Masks, rng: random.Random) -> Segmentation:
    """Make a task for all objects, in different colors."""
    colors: dict[str, str] = {}
    for name, mask in masks.items():
        free = {color: rgb for color, rgb in MASK_COLORS.items() if color not in colors.values()}
        colors[name] = rng.choice(visible_colors(image, mask, free))
    return Segmentation(colors)


def one_of_names(image: Image.Image, masks: Masks, rng: random.Random, names: set[str]) -> Segmentation:
    """Make a task for an expression that mentions one of `names`."""
    return Segmentation.from_annotation(
        image, {words: mask for words, mask in masks.items() if mentions(words, names)}, rng
    )


def few_keypoints(
    image: Image.Image, joints: Joints, rng: random.Random, counts: Sequence[int] = (1, 2, 2, 3)
) -> Keypoints:
    """Make a task for at most n joints, with n from `counts`. Small models learn slowly from five joints at once."""
    names = rng.sample(sorted(joints), rng.choice(counts))
    return Keypoints.from_annotation(image, {name: joints[name] for name in names}, rng)


# name -> fraction of the training samples, function that generates an example, function that makes its task
TRAINING_SOURCES: dict[str, tuple[float, Callable, Callable[..., Task]]] = {
    "segmentation": (0.33, segmentation, Segmentation.from_annotation),
    "left or right": (0.06, pairs, Segmentation.from_annotation),
    "absent": (0.2, absent, Segmentation.from_annotation),
    "pose": (0.04, keypoints, FixedTask(WholePose())),
    "keypoints": (0.08, keypoints, Keypoints.from_annotation),
    "few keypoints": (0.04, keypoints, few_keypoints),
    "noise": (0.03, noisy, FixedTask(Restoration("noise"))),
    "blur": (0.03, blurred, FixedTask(Restoration("blur"))),
    "watermark": (0.04, watermarked, FixedTask(Restoration("watermark"))),
    "objects": (0.12, edit_objects, Editing.from_annotation),
    "color edits": (0.03, color_edited, Editing.from_annotation),
}


def source(name: str, world: World, count: int, seed: int) -> Source:
    """Return `count` examples of one of `TRAINING_SOURCES`.

    The name is part of the seed. Otherwise families with similar generators would have the same images.
    """
    _, example, make_task = TRAINING_SOURCES[name]
    return Source(name, GeneratedDataset(partial(example, world), count, f"{seed} {name}"), make_task)


def mixture(world: World, count: int, seed: int = 0, names: Collection[str] = TRAINING_SOURCES.keys()) -> Mixture:
    """Return the sources `names` of about `count` different training samples, in proportion to their fractions."""
    shares = {name: share for name, (share, *_) in TRAINING_SOURCES.items() if name in names}
    return Mixture([(source(name, world, round(share * count), seed), 1.0) for name, share in shares.items()], seed)
