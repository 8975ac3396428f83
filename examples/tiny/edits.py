"""Edits of a scene: objects are removed, replaced, added or moved; each edit has several instructions."""

import math
import random
from typing import NamedTuple

from PIL import Image
from referring_expressions import referring_expressions
from world import Scene, Thing, World, on_canvas

from instructdiffusion_pipeline.tasks.wording import with_a, with_the
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
# Where objects are added (key) and moved: the wording for a move, and the center relative to the frame. Positions are
# fixed, so that the instruction determines the result.
PLACES = {
    "on the left": ("to the left", (0.25, 0.5)),
    "on the right": ("to the right", (0.75, 0.5)),
    "at the top": ("to the top", (0.5, 0.25)),
    "at the bottom": ("to the bottom", (0.5, 0.75)),
    "in the middle": ("to the middle", (0.5, 0.5)),
}
ADDED_SIDE = 28 / 64  # longer side of an added object, relative to the frame's shorter side
MIN_MOVE = 10 / 64
NEW_STYLE = 0  # style of new objects; with two styles for one instruction, an MSE loss would lead to their average


class Change(NamedTuple):
    """A scene before and after an edit, and the instruction. A new or moved object is the last one of `after`."""

    before: Scene
    words: str
    after: Scene

    @property
    def sample(self) -> tuple[Image.Image, Edit]:
        """The change in the format of the editing datasets."""
        return self.before.image, Edit(self.words, self.after.image)


def edit_objects(world: World, rng: random.Random) -> tuple[Image.Image, Edit]:
    """Make a scene, and remove, replace, add or move one object."""
    change = rng.choice([remove, remove, replace, add, move])
    return change(world, rng).sample


def choose(world: World, rng: random.Random) -> tuple[Scene, str, Thing]:
    """Return a scene, an expression that refers to one object in it, and the object."""
    while True:
        scene = world.scene(rng)
        expressions = referring_expressions(scene, world.names, rng).items()
        single = {words: things[0] for words, things in expressions if len(things) == 1}
        if single:  # there is none if the only two objects have the same name and no expression distinguishes them
            words = rng.choice(sorted(single))
            return scene, with_the(words), single[words]


def remove(world: World, rng: random.Random) -> Change:
    """Remove an object and show what it covered."""
    scene, words, old = choose(world, rng)
    return Change(scene, rng.choice(REMOVE).format(old=words), scene.minus(old))


def replace(world: World, rng: random.Random) -> Change:
    """Replace an object by another at the same position and of about the same size."""
    while True:
        scene, words, old = choose(world, rng)
        name = rng.choice(sorted(world.names - scene.names))
        left, top, right, bottom = old.layer.getchannel("A").getbbox()
        new = world.place(name, rng, max(right - left, bottom - top), old.center, NEW_STYLE)
        if scene.minus(old).fits(new):
            break
    return Change(scene, rng.choice(REPLACE).format(old=words, new=with_a(name)), scene.minus(old).plus(new))


def add(world: World, rng: random.Random) -> Change:
    """Add an object at a named position. If there is no room for it, the scene's other objects are left out."""
    scene = world.scene(rng)
    name = rng.choice(sorted(world.names - scene.names))
    place = rng.choice(list(PLACES))
    new = world.place(name, rng, ADDED_SIDE * min(world.frame), center(place, world), NEW_STYLE)
    if not scene.fits(new):
        scene = Scene(scene.background)
    return Change(scene, rng.choice(ADD).format(new=with_a(name), place=place), scene.plus(new))


def move(world: World, rng: random.Random) -> Change:
    """Move an object to a named position, unchanged and in front of the others."""
    while True:
        scene, words, old = choose(world, rng)
        place = rng.choice(list(PLACES))
        sprite = old.layer.crop(old.layer.getchannel("A").getbbox())
        moved = Thing(old.name, on_canvas(sprite, world.frame, center(place, world), rng))
        distance = math.dist(moved.center, old.center)
        if scene.minus(old).fits(moved) and distance >= MIN_MOVE * min(world.frame):
            break
    words = rng.choice(MOVE).format(old=words, place=place, there=PLACES[place][0])
    return Change(scene, words, scene.minus(old).plus(moved))


def center(place: str, world: World) -> tuple[float, float]:
    """Return the position of a place in `PLACES`, x and y in pixels."""
    _, (x, y) = PLACES[place]
    return x * world.frame[0], y * world.frame[1]
