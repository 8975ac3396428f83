"""Edits of a scene: its objects laid down differently; each change with its wordings."""

import math
import random
from typing import NamedTuple

from PIL import Image
from referring_expressions import phrases
from world import Scene, Thing, World, lay

from instructdiffusion_pipeline.tasks.wording import a, the
from instructdiffusion_pipeline.types import Edit

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
MOVE = [
    "move {old} {there}",
    "shift {old} {there}",
    "drag {old} {there}",
    "push {old} {there}",
    "carry {old} {there}",
    "{old} should be {place}",
]
# Where added and moved things go: how one says it of both, and a middle in pixels; fixed, so that the words say all.
PLACES = {
    "on the left": ("to the left", (16, 32)),
    "on the right": ("to the right", (48, 32)),
    "at the top": ("to the top", (32, 16)),
    "at the bottom": ("to the bottom", (32, 48)),
    "in the middle": ("to the middle", (32, 32)),
}
ADDED_SIDE = 28
MOVED = 10  # pixels at least
NEW_STYLE = 0  # of what is added or put in another's place: of two looks a model could only learn the mean


class Change(NamedTuple):
    """A scene before and after what the words ask for; what came or moved is the last thing of `after`."""

    before: Scene
    words: str
    after: Scene

    @property
    def sample(self) -> tuple[Image.Image, Edit]:
        """As editing data sets have it."""
        return self.before.image, Edit(self.words, self.after.image)


def edit_objects(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """A scene, and the same one with a thing less, with another in its place, with one more, or with one moved."""
    change = rng.choice([remove, remove, replace, add, move])
    return change(world, rng).sample


def choose(world: World, rng: random.Random) -> tuple[Scene, str, Thing]:
    """A scene, words for one thing in it, and the thing."""
    while True:
        scene = world.scene(rng)
        single = {words: things[0] for words, things in phrases(scene, world.names, rng).items() if len(things) == 1}
        if single:  # else there are but two of a name, neither left nor right, upper nor lower, larger nor smaller
            words = rng.choice(sorted(single))
            return scene, the(words), single[words]


def remove(world: World, rng: random.Random) -> Change:
    """What the thing hid comes to light."""
    scene, words, old = choose(world, rng)
    return Change(scene, rng.choice(REMOVE).format(old=words), scene.minus(old))


def replace(world: World, rng: random.Random) -> Change:
    """Another object takes the place and about the size of an old one."""
    while True:
        scene, words, old = choose(world, rng)
        name = rng.choice(sorted(world.names - scene.names))
        left, top, right, bottom = old.layer.getchannel("A").getbbox()
        new = world.place(name, rng, max(right - left, bottom - top), old.center, NEW_STYLE)
        if scene.minus(old).fits(new):
            break
    return Change(scene, rng.choice(REPLACE).format(old=words, new=a(name)), scene.minus(old).plus(new))


def add(world: World, rng: random.Random) -> Change:
    """One more thing at a place that the words name; a scene that has no room there loses its own things."""
    scene = world.scene(rng)
    name = rng.choice(sorted(world.names - scene.names))
    place, (_, center) = rng.choice(list(PLACES.items()))
    new = world.place(name, rng, ADDED_SIDE, center, NEW_STYLE)
    if not scene.fits(new):
        scene = Scene(scene.background)
    return Change(scene, rng.choice(ADD).format(new=a(name), place=place), scene.plus(new))


def move(world: World, rng: random.Random) -> Change:
    """A thing as it is, at another place, which the words name, over all others."""
    while True:
        scene, words, old = choose(world, rng)
        place, (there, center) = rng.choice(list(PLACES.items()))
        moved = Thing(old.name, lay(old.layer.crop(old.layer.getchannel("A").getbbox()), center, rng))
        if scene.minus(old).fits(moved) and math.dist(moved.center, old.center) >= MOVED:
            break
    words = rng.choice(MOVE).format(old=words, place=place, there=there)
    return Change(scene, words, scene.minus(old).plus(moved))
