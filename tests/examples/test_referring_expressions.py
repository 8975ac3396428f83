import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from referring_expressions import BOTH, ONE, distinguish, plural, referring_expressions
from world import Scene, Thing

SIZE = 64


def thing(name, x, y, side):
    layer = Image.new("RGBA", (SIZE, SIZE))
    ImageDraw.Draw(layer).rectangle((x, y, x + side - 1, y + side - 1), fill=(255, 0, 0, 255))
    return Thing(name, layer)


BACKGROUND = Image.new("RGB", (SIZE, SIZE))
SMALL, LARGE = thing("cat", 2, 30, 10), thing("cat", 40, 2, 20)


def test_two_objects_with_one_name_are_distinguished_by_position_and_size():
    relations = {"left": SMALL, "right": LARGE, "upper": LARGE, "lower": SMALL, "smaller": SMALL, "larger": LARGE}
    assert distinguish(SMALL, LARGE) == relations == distinguish(LARGE, SMALL)
    assert distinguish(thing("cat", 0, 0, 10), thing("cat", 30, 2, 10)).keys() == {"left", "right"}
    assert distinguish(thing("cat", 0, 0, 10), thing("cat", 5, 5, 11)) == {}


def test_every_expression_refers_to_the_right_objects():
    scene = Scene(BACKGROUND, (SMALL, thing("dog", 20, 50, 12), LARGE))
    found = {}
    for seed in range(300):
        found |= referring_expressions(scene, {"cat", "dog", "car"}, random.Random(seed))
    expected = {
        words.format(name="cat", names="cats"): relation for relation, several in ONE.items() for words in several
    }
    both = {words.format(name="cat", names="cats") for words in BOTH}
    assert found.keys() == {"dog"} | both | expected.keys()
    assert found["dog"] == [scene.things[1]]
    assert all(found[words] == [distinguish(SMALL, LARGE)[relation]] for words, relation in expected.items())
    assert all(found[words] == [SMALL, LARGE] for words in both)
    assert scene.mask(SMALL, LARGE).sum() == 10 * 10 + 20 * 20
    assert not any("cat" in words for words in referring_expressions(scene, {"dog"}, random.Random(0)))


def test_covered_pixels_are_not_in_a_mask():
    under, over = thing("cat", 10, 10, 20), thing("dog", 20, 20, 20)
    scene = Scene(BACKGROUND, (under, over))
    assert np.array_equal(scene.mask(under), under.pixels & ~over.pixels)
    assert np.array_equal(scene.mask(over), over.pixels)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cat", "cats"),
        ("butterfly", "butterflies"),
        ("key", "keys"),
        ("fox", "foxes"),
        ("bus", "buses"),
        ("peach", "peaches"),
        ("maple leaf", "maple leaves"),
    ],
)
def test_plurals(name, names):
    assert plural(name) == names
