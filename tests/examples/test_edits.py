import random

import edits
import numpy as np
import pytest
from grades import GRADES, grade
from PIL import Image
from world import SIZE, World


def changed(before, after):
    """Pixels that differ, bool, height x width."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_what_is_removed_is_gone_and_only_that(world_folder):
    world = World(world_folder)
    for seed in range(20):
        image, edit = edits.remove(world, random.Random(seed))
        scene = world.scene(random.Random(seed))
        assert image == scene.image
        (name,) = [name for name in scene.layers if edit.edited == scene.minus(name).image][:1]
        assert any(name in edit.instruction for name in scene.layers)
        touched = np.asarray(scene.layers[name].getchannel("A")) > 0
        assert not (changed(image, edit.edited) & ~touched).any()


def test_the_replacement_lies_where_the_old_object_was(world_folder):
    world = World(world_folder)
    for seed in range(20):
        image, edit = edits.replace(world, random.Random(seed))
        layers = world.scene(random.Random(seed)).layers
        left, top, right, bottom = Image.fromarray(changed(image, edit.edited)).getbbox()
        assert any(
            left >= old[0] - 3 and top >= old[1] - 3 and right <= old[2] + 3 and bottom <= old[3] + 3
            for old in (layer.getchannel("A").getbbox() for name, layer in layers.items() if name in edit.instruction)
        )


@pytest.mark.parametrize("place", edits.PLACES)
def test_what_is_added_lies_where_the_words_say(world_folder, place):
    world = World(world_folder)
    seen = 0
    for seed in range(60):
        image, edit = edits.add(world, random.Random(seed))
        if place not in edit.instruction:
            continue
        seen += 1
        before, after = (np.asarray(picture)[..., 0] > 135 for picture in (image, edit.edited))
        rows, columns = np.nonzero(after & ~before)
        x, y = edits.PLACES[place]
        half = edits.ADDED_SIDE / 2 + 1
        assert len(rows) > 0
        assert rows.min() >= y - half and rows.max() < y + half
        assert columns.min() >= x - half and columns.max() < x + half
    assert seen > 3


@pytest.mark.parametrize("look", GRADES)
def test_a_grade_changes_the_picture_by_its_name_alone(look):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    first, second = (grade(image, random.Random(seed), look) for seed in (1, 2))
    assert first.edited == second.edited
    assert first.instruction in GRADES[look][1]
    assert np.abs(np.asarray(first.edited).astype(int) - pixels).mean() > 10


def test_no_wording_asks_for_two_looks():
    wordings = [wording for _, several in GRADES.values() for wording in several]
    assert len(set(wordings)) == len(wordings)
