import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from referring_expressions import BOTH, ONE, phrases, plural, told_apart
from world import SIZE, Scene, Thing


def thing(name, x, y, side):
    layer = Image.new("RGBA", (SIZE, SIZE))
    ImageDraw.Draw(layer).rectangle((x, y, x + side - 1, y + side - 1), fill=(255, 0, 0, 255))
    return Thing(name, layer)


BACKGROUND = Image.new("RGB", (SIZE, SIZE))
SMALL, LARGE = thing("cat", 2, 30, 10), thing("cat", 40, 2, 20)


def test_two_of_a_name_are_told_apart_by_place_and_size():
    ways = {"left": SMALL, "right": LARGE, "upper": LARGE, "lower": SMALL, "smaller": SMALL, "larger": LARGE}
    assert told_apart(SMALL, LARGE) == ways == told_apart(LARGE, SMALL)
    assert told_apart(thing("cat", 0, 0, 10), thing("cat", 30, 2, 10)).keys() == {"left", "right"}
    assert told_apart(thing("cat", 0, 0, 10), thing("cat", 5, 5, 11)) == {}


def test_every_phrase_means_what_its_words_say():
    scene = Scene(BACKGROUND, (SMALL, thing("dog", 20, 50, 12), LARGE))
    meant = {}
    for seed in range(300):
        meant |= phrases(scene, {"cat", "dog", "car"}, random.Random(seed))
    said = {words.format(name="cat", names="cats"): way for way, several in ONE.items() for words in several}
    both = {words.format(name="cat", names="cats") for words in BOTH}
    assert meant.keys() == {"dog"} | both | said.keys()
    assert meant["dog"] == [scene.things[1]]
    assert all(meant[words] == [told_apart(SMALL, LARGE)[way]] for words, way in said.items())
    assert all(meant[words] == [SMALL, LARGE] for words in both)
    assert scene.mask(SMALL, LARGE).sum() == 10 * 10 + 20 * 20
    assert not any("cat" in words for words in phrases(scene, {"dog"}, random.Random(0)))


def test_what_lies_under_another_thing_is_not_in_its_mask():
    under, over = thing("cat", 10, 10, 20), thing("dog", 20, 20, 20)
    scene = Scene(BACKGROUND, (under, over))
    assert np.array_equal(scene.mask(under), under.pixels & ~over.pixels)
    assert np.array_equal(scene.mask(over), over.pixels)


@pytest.mark.parametrize(("name", "names"), [("cat", "cats"), ("butterfly", "butterflies"), ("key", "keys")])
def test_plurals(name, names):
    assert plural(name) == names
