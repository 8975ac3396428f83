import random

import numpy as np
from world import COLORS, SIZE, World, is_held_out

from instructdiffusion_pipeline.tasks import segmentation


def test_a_tenth_of_the_names_is_held_out_and_never_trained_on(world_folder):
    names = {path.stem for path in (world_folder / "objects").iterdir()}
    held_out = {name for name in names if is_held_out(name)}
    assert 0 < len(held_out) < 10
    training = World(world_folder)
    assert set(training.objects) == names - held_out
    assert len(training.photographs) == len(names) - len(held_out)
    unseen = World(world_folder, unseen_photographs=True, unseen_objects=True)
    assert unseen.names == held_out
    assert len(unseen.photographs) == len(held_out)
    assert 0.09 < np.mean([is_held_out(str(i)) for i in range(20_000)]) < 0.11


def test_masks_cover_the_objects_and_nothing_else(world_folder):
    world = World(world_folder)
    for seed in range(30):
        scene = world.scene(random.Random(seed))
        union = np.zeros((SIZE, SIZE), bool)
        for mask in scene.masks.values():
            assert mask.any()
            assert not (union & mask).any(), "visible parts do not overlap"
            union |= mask
        bright = np.asarray(scene.image)[..., 0] > 135  # half covered
        assert (bright ^ union).mean() < 0.01


def test_segmentation_paints_the_named_object(world_folder):
    world = World(world_folder)
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


def test_the_same_seed_gives_the_same_sample(world_folder):
    world = World(world_folder)
    first, second = (world.sample(random.Random(4)) for _ in range(2))
    assert first == second
    assert first != world.sample(random.Random(5))


def test_unseen_names_are_asked_for_among_seen_objects(world_folder):
    world = World(world_folder, unseen_objects=True)
    distractors = 0
    for seed in range(60):
        rng = random.Random(seed)
        scene = world.scene(rng)
        assert world.names & scene.masks.keys()
        distractors += len(scene.masks.keys() - world.names)
        _, name, _ = world.segmentation(rng, scene)
        assert name in world.names
    assert distractors > 20
