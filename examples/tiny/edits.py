"""Edits of a scene: its objects laid down differently; each change with its wordings."""

import random

import numpy as np
from PIL import Image
from world import Scene, World, coverage

from instructdiffusion_pipeline.sample import Edit
from instructdiffusion_pipeline.tasks.wording import a, the

REMOVE = [
    "remove {old}",
    "take {old} away",
    "erase {old} from the picture",
    "delete {old}",
    "make {old} disappear",
    "get rid of {old}",
    "cut {old} out of the photo",
    "show the place without {old}",
    "I do not want {old} in this picture",
    "{old} must go",
]
REPLACE = [
    "replace {old} with {new}",
    "swap {old} for {new}",
    "turn {old} into {new}",
    "put {new} where {old} is",
    "exchange {old} for {new}",
    "instead of {old}, show {new}",
    "make {old} become {new}",
]
ADD = [
    "add {new} {place}",
    "put {new} {place}",
    "place {new} {place}",
    "lay {new} {place}",
    "I want {new} {place}",
    "let there be {new} {place}",
    "insert {new} {place}",
]
# Where added objects go, in pixels, and how large: fixed, so that the words say all of it.
PLACES = {
    "on the left": (16, 32),
    "on the right": (48, 32),
    "at the top": (32, 16),
    "at the bottom": (32, 48),
    "in the middle": (32, 32),
}
ADDED_SIDE = 28


def edit_objects(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """A scene, and the same one with an object less, with another in its place, or with one more."""
    change = rng.choice([remove, remove, replace, add])
    return change(world, rng)


def remove(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """What the object hid comes to light."""
    scene = world.scene(rng)
    old = rng.choice(sorted(world.names & scene.layers.keys()))
    return scene.image, Edit(rng.choice(REMOVE).format(old=the(old)), scene.minus(old).image)


def replace(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """Another object takes the place and about the size of an old one."""
    scene = world.scene(rng)
    old = rng.choice(sorted(world.names & scene.layers.keys()))
    new = rng.choice(sorted(world.names - scene.layers.keys()))
    rows, columns = np.nonzero(coverage(scene.layers[old]))
    center = ((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
    layer = world.place(new, rng, side=max(np.ptp(rows), np.ptp(columns)) + 1, center=center)
    words = rng.choice(REPLACE).format(old=the(old), new=a(new))
    return scene.image, Edit(words, scene.minus(old).plus(new, layer).image)


def add(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """One more object at a place that the words name; a scene that has no room there loses its own objects."""
    scene = world.scene(rng)
    new = rng.choice(sorted(world.names - scene.layers.keys()))
    place, center = rng.choice(list(PLACES.items()))
    layer = world.place(new, rng, ADDED_SIDE, center)
    if not scene.fits(layer):
        scene = Scene(scene.background, {})
    return scene.image, Edit(rng.choice(ADD).format(new=a(new), place=place), scene.plus(new, layer).image)
