import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from world import COLORS, SIZE, World, is_held_out

from instructdiffusion_pipeline.tasks import segmentation

NAMES = [f"thing {i}" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey photographs and coloured discs: enough to see in the pixels what was laid where."""
    root = tmp_path_factory.mktemp("world")
    for part in ("photographs", "objects"):
        (root / part).mkdir()
    for name in NAMES:
        Image.new("RGB", (150, 120), (90, 90, 90)).save(root / "photographs" / f"{name}.png")
        sprite = Image.new("RGBA", (100, 100))
        ImageDraw.Draw(sprite).ellipse((0, 0, 99, 99), fill=(240, 240, 240, 255))
        sprite.save(root / "objects" / f"{name}.png")
    return root


def test_a_tenth_of_the_names_is_held_out_and_never_trained_on(folder):
    held_out = {name for name in NAMES if is_held_out(name)}
    assert 0 < len(held_out) < 10
    training = World(folder)
    assert set(training.objects) == set(NAMES) - held_out
    assert len(training.photographs) == len(NAMES) - len(held_out)
    unseen = World(folder, unseen_photographs=True, unseen_objects=True)
    assert set(unseen.objects) == held_out
    assert len(unseen.photographs) == len(held_out)
    assert 0.09 < np.mean([is_held_out(str(i)) for i in range(20_000)]) < 0.11


def test_masks_cover_the_objects_and_nothing_else(folder):
    world = World(folder)
    for seed in range(30):
        scene = world.scene(random.Random(seed))
        union = np.zeros((SIZE, SIZE), bool)
        for mask in scene.masks.values():
            assert mask.any()
            assert not (union & mask).any(), "visible parts do not overlap"
            union |= mask
        bright = np.asarray(scene.image)[..., 0] > 135  # half covered
        assert (bright ^ union).mean() < 0.01


def test_segmentation_paints_the_named_object(folder):
    world = World(folder)
    absent = 0
    for seed in range(60):
        rng = random.Random(seed)
        scene = world.scene(rng)
        sample, name, color = world.segmentation(rng, scene)
        assert name in sample.instruction and color in sample.instruction and color in COLORS
        found = segmentation.read(sample.image, sample.target, color)
        if name in scene.masks:
            assert (found == scene.masks[name]).all()
        else:
            absent += 1
            assert sample.image == sample.target
    assert 0 < absent < 20


def test_the_same_seed_gives_the_same_sample(folder):
    world = World(folder)
    first, second = (world.sample(random.Random(4)) for _ in range(2))
    assert first == second
    assert first != world.sample(random.Random(5))
