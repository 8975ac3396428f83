"""How one speaks of the things in a scene: by name, or, where two share it, by place and size, or of both."""

import random
import re

from world import SIZE, Scene, Thing

APART = 0.15  # of the picture's side: what two middles must differ by, for one to be the left or the upper one
LARGER = 1.4  # times as many pixels
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
    """The names of this world are regular."""
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def speaks_of(words: str, names: set[str]) -> bool:
    """Whether a phrase has one of `names` in it, or its plural."""
    return any(re.search(rf"\b({name}|{plural(name)})\b", words) for name in names)


def phrases(scene: Scene, names: set[str], rng: random.Random) -> dict[str, list[Thing]]:
    """One phrase for everything that can be spoken of, and the things it means: phrase -> things.

    Things of other `names` are left out; so are places and sizes that are too close to tell.
    """
    spoken: dict[str, list[Thing]] = {}
    for name in sorted(names & scene.names):
        alike = [thing for thing in scene.things if thing.name == name]
        if len(alike) == 1:
            spoken[name] = alike
            continue
        words = {"name": name, "names": plural(name)}
        spoken[rng.choice(BOTH).format(**words)] = alike
        spoken |= {rng.choice(ONE[way]).format(**words): [thing] for way, thing in told_apart(*alike).items()}
    return spoken


def told_apart(first: Thing, second: Thing) -> dict[str, Thing]:
    """In which ways, out of those of `ONE`, two things differ, and which of the two each means."""
    ways = {}
    for axis, sides in enumerate((("left", "right"), ("upper", "lower"))):
        ordered = sorted((first, second), key=lambda thing: thing.center[axis])
        if ordered[1].center[axis] - ordered[0].center[axis] >= APART * SIZE:
            ways |= dict(zip(sides, ordered, strict=True))
    ordered = sorted((first, second), key=lambda thing: thing.pixels.sum())
    if ordered[1].pixels.sum() >= LARGER * ordered[0].pixels.sum():
        ways |= dict(zip(("smaller", "larger"), ordered, strict=True))
    return ways
