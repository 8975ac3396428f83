import random

import edits
import numpy as np
import pytest
from color_edits import COLOR_EDITS, edit_colors
from PIL import Image
from referring_expressions import plural
from world import World

SIZE = 64


def changed(before, after):
    """Pixels that differ, bool, height x width."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_removing_an_object_changes_only_its_pixels(world_folder):
    world = World(world_folder, (SIZE, SIZE))
    for seed in range(20):
        before, words, after = edits.remove(world, random.Random(seed))
        (gone,) = set(before.things) - set(after.things)
        assert gone.name in words or plural(gone.name) in words
        touched = np.asarray(gone.layer.getchannel("A")) > 0
        assert not (changed(before.image, after.image) & ~touched).any()
        assert changed(before.image, after.image).any()


def test_the_replacement_is_at_the_position_of_the_old_object(world_folder):
    world = World(world_folder, (SIZE, SIZE))
    for seed in range(20):
        before, words, after = edits.replace(world, random.Random(seed))
        (old,), new = set(before.things) - set(after.things), after.things[-1]
        assert new.name in words and new.name not in before.names
        assert np.allclose(old.center, new.center, atol=3)
        left, top, right, bottom = Image.fromarray(changed(before.image, after.image)).getbbox()
        box = old.layer.getchannel("A").getbbox()
        assert left >= box[0] - 3 and top >= box[1] - 3 and right <= box[2] + 3 and bottom <= box[3] + 3


@pytest.mark.parametrize("change", [edits.add, edits.move])
@pytest.mark.parametrize("place", edits.PLACES)
def test_added_and_moved_objects_are_at_the_named_position(world_folder, place, change):
    world = World(world_folder, (SIZE, SIZE))
    there, _ = edits.PLACES[place]
    seen = 0
    for seed in range(80):
        _, words, after = change(world, random.Random(seed))
        # "move the thing on the left to the top" names two places: the second one counts
        if not words.endswith((place, there)):
            continue
        seen += 1
        thing = after.things[-1]
        left, top, right, bottom = thing.layer.getchannel("A").getbbox()
        reach = max(right - left, bottom - top) / 2  # maximum shift by the frame
        off = np.abs(np.subtract(thing.center, edits.center(place, world))).max()
        assert off <= max(1, reach - 15)
    assert seen > 3


def test_a_moved_object_looks_the_same(world_folder):
    before, _, after = edits.move(World(world_folder, (SIZE, SIZE)), random.Random(2))
    (old,), new = set(before.things) - set(after.things), after.things[-1]
    first, second = (thing.layer.crop(thing.layer.getchannel("A").getbbox()) for thing in (old, new))
    assert first.tobytes() == second.tobytes()
    assert new.name == old.name


@pytest.mark.parametrize("name", COLOR_EDITS)
def test_a_color_edit_depends_only_on_its_name(name):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    first, second = (edit_colors(image, random.Random(seed), name) for seed in (1, 2))
    assert first.edited == second.edited
    assert first.instruction in COLOR_EDITS[name][1]
    assert np.abs(np.asarray(first.edited).astype(int) - pixels).mean() > 10


def test_instructions_of_color_edits_are_unique():
    wordings = [wording for _, several in COLOR_EDITS.values() for wording in several]
    assert len(set(wordings)) == len(wordings)
