"""Referring expressions for objects in a scene: by name, and by position or size if two have the same name."""

import random
import re

from world import Scene, Thing

MIN_DISTANCE = 0.15  # of two centers, relative to the image's side, for "left" or "upper"
MIN_SIZE_RATIO = 1.4  # of the numbers of pixels, for "larger"
BOTH = ["both {names}", "the {names}", "the two {names}", "all {names}"]
ONE = {
    "left": ["the left {name}", "the {name} on the left", "the leftmost {name}", "the left one of the {names}"],
    "right": ["the right {name}", "the {name} on the right", "the rightmost {name}", "the right one of the {names}"],
    "upper": ["the upper {name}", "the {name} at the top", "the topmost {name}", "the upper one of the {names}"],
    "lower": ["the lower {name}", "the {name} at the bottom", "the lowest {name}", "the lower one of the {names}"],
    "smaller": ["the small {name}", "the smaller {name}", "the smallest {name}", "the smaller one of the {names}"],
    "larger": ["the large {name}", "the larger {name}", "the largest {name}", "the larger one of the {names}"],
}


def plural(name: str) -> str:
    """Return the plural of an object's name. No name has an irregular plural, except "maple leaf"."""
    if name.endswith("leaf"):
        return name[:-1] + "ves"
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def mentions(expression: str, names: set[str]) -> bool:
    """Whether an expression contains one of `names` or its plural."""
    return any(re.search(rf"\b({name}|{plural(name)})\b", expression) for name in names)


def referring_expressions(scene: Scene, names: set[str], rng: random.Random) -> dict[str, list[Thing]]:
    """Return a mapping from referring expressions to the objects they refer to, one expression per set of objects.

    Only objects with a name in `names` are included, and only positions and sizes that differ enough.
    """
    expressions: dict[str, list[Thing]] = {}
    for name in sorted(names & scene.names):
        same_name = [thing for thing in scene.things if thing.name == name]
        if len(same_name) == 1:
            expressions[name] = same_name
            continue
        words = {"name": name, "names": plural(name)}
        expressions[rng.choice(BOTH).format(**words)] = same_name
        expressions |= {
            rng.choice(ONE[relation]).format(**words): [thing] for relation, thing in distinguish(*same_name).items()
        }
    return expressions


def distinguish(first: Thing, second: Thing) -> dict[str, Thing]:
    """Return the relations in `ONE` that distinguish two objects, and for each the object that it refers to."""
    relations = {}
    for axis, sides in enumerate((("left", "right"), ("upper", "lower"))):
        ordered = sorted((first, second), key=lambda thing: thing.center[axis])
        if ordered[1].center[axis] - ordered[0].center[axis] >= MIN_DISTANCE * first.layer.size[axis]:
            relations |= dict(zip(sides, ordered, strict=True))
    ordered = sorted((first, second), key=lambda thing: thing.pixels.sum())
    if ordered[1].pixels.sum() >= MIN_SIZE_RATIO * ordered[0].pixels.sum():
        relations |= dict(zip(("smaller", "larger"), ordered, strict=True))
    return relations
