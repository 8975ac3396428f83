import random
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image
from pose import WholePose
from referring_expressions import mentions
from sources import (
    ABSENT,
    TRAINING_SOURCES,
    GeneratedDataset,
    absent,
    few_keypoints,
    keypoints,
    mixture,
    one_of_names,
    pairs,
    present,
    segmentation,
    source,
)
from world import STYLES, UNSEEN_STYLE, Scene, Thing, World, is_held_out

from instructdiffusion_pipeline.tasks import make_sample
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

FRAME = (64, 64)


def test_a_tenth_of_the_names_is_held_out_of_training(world_folder):
    names = {path.stem for path in (world_folder / "photographs").iterdir()}
    held_out = {name for name in names if is_held_out(name)}
    assert 0 < len(held_out) < 10
    training = World(world_folder, FRAME)
    assert set(training.objects) == names - held_out
    assert len(training.photographs) == len(names) - len(held_out)
    unseen = World(world_folder, FRAME, unseen_photographs=True, unseen_objects=True)
    assert unseen.names == held_out
    assert len(unseen.photographs) == len(held_out)
    assert 0.09 < np.mean([is_held_out(str(i)) for i in range(20_000)]) < 0.11


def test_one_drawing_style_is_held_out_of_training(world_folder, tmp_path):
    shutil.copytree(world_folder, tmp_path / "world")
    for path in (tmp_path / "world" / "objects" / UNSEEN_STYLE).iterdir():
        Image.new("RGBA", (50, 50), "red").save(path)
    drawings = [each for several in World(tmp_path / "world", FRAME).objects.values() for each in several]
    assert len(drawings) == len(STYLES) * len(World(tmp_path / "world", FRAME).objects)
    assert not any(each.getpixel((25, 25))[:3] == (255, 0, 0) for each in drawings)
    unseen = World(tmp_path / "world", FRAME, styles=(UNSEEN_STYLE,))
    assert all(each.getpixel((25, 25))[:3] == (255, 0, 0) for several in unseen.objects.values() for each in several)


@pytest.mark.parametrize("side", [64, 128])
def test_masks_cover_exactly_the_objects(world_folder, side):
    world = World(world_folder, (side, side), figures=0)
    counts, twins = Counter(), []
    for seed in range(80):
        scene = world.scene(random.Random(seed))
        counts[len(scene.things)] += 1
        if len(scene.things) > 1:
            twins.append(len(scene.names) < len(scene.things))
        union = np.zeros((side, side), bool)
        for mask in scene.masks:
            assert mask.any()
            assert not (union & mask).any(), "visible parts do not overlap"
            union |= mask
        bright = np.asarray(scene.image)[..., 0] > 135  # half covered
        assert (bright ^ union).mean() < 0.02
    assert counts.keys() == {1, 2, 3, 4} and counts[1] < 30, "mostly several"
    assert 0.2 < np.mean(twins) < 0.5, "some of one name"


def test_objects_have_the_sizes_and_numbers_of_their_world(world_folder):
    for options, (low, high), counts in (
        ({}, (0.1, 0.7), {1, 2, 3, 4}),
        ({"sizes": (0.2, 0.3), "counts": {3: 1}}, (0.2, 0.3), {3}),
    ):
        world, sides = World(world_folder, FRAME, **options), []
        for seed in range(40):
            _, masks = present(world, random.Random(seed))
            assert len(masks) in counts and all(mask.any() for mask in masks.values())
            for thing in world.scene(random.Random(seed)).things:
                left, top, right, bottom = thing.layer.getchannel("A").getbbox()
                sides.append(max(right - left, bottom - top) / FRAME[0])
        assert low - 0.01 < min(sides) < low + 0.05 and high - 0.05 < max(sides) < high + 0.01


def test_drawings_are_mirrored_in_a_varied_world_only(world_folder, tmp_path):
    shutil.copytree(world_folder, tmp_path / "world")
    for path in (tmp_path / "world" / "objects").glob("*/*.png"):
        sprite = Image.new("RGBA", (50, 50), "red")
        sprite.paste("blue", (0, 0, 25, 50))
        sprite.save(path)
    for varied, expected in ((True, {True, False}), (False, {True})):
        world = World(tmp_path / "world", FRAME, varied=varied)
        blue_is_left = set()
        for seed in range(20):
            layer = world.place(sorted(world.names)[0], random.Random(seed), 40, (32, 32)).layer
            red, _, blue, _ = layer.getpixel((24, 32))
            blue_is_left.add(blue > red)
        assert blue_is_left == expected


def test_an_object_without_visible_pixels_is_not_placed():
    scene, faint = Scene(Image.new("RGB", FRAME)), Image.new("RGBA", FRAME)
    faint.paste((255, 255, 255, 100), (5, 5, 30, 6))  # a thin object in a small size
    assert not scene.fits(Thing("guitar", faint))
    faint.putpixel((5, 5), (255, 255, 255, 255))
    assert scene.fits(Thing("guitar", faint))


def test_a_removed_object_leaves_no_trace(world_folder):
    world = World(world_folder, FRAME)
    for seed in range(20):
        scene = world.scene(random.Random(seed))
        thing = scene.things[0]
        without = scene.minus(thing)
        changed = np.abs(np.asarray(scene.image).astype(int) - np.asarray(without.image)).max(-1)
        assert changed[scene.mask(thing)].min() > 0, "all of it is gone"
        faint = np.asarray(thing.layer.getchannel("A")) == 0
        assert not changed[faint].any(), "and nothing else"
        for other in scene.things[1:]:
            scene = scene.minus(other)
        assert scene.minus(thing).image == scene.background


def test_segmentation_targets_match_the_instructions(world_folder):
    world = World(world_folder, FRAME)
    dataset = GeneratedDataset(partial(segmentation, world), length=60)
    absent = 0
    for index in range(len(dataset)):
        image, masks = dataset[index]
        assert {words for words, mask in masks.items() if not mask.any()} < world.names
        rng = random.Random(index)
        task = Segmentation.from_annotation(image, masks, rng)
        sample = make_sample(task, image, masks, rng)
        ((name, color),) = task.colors.items()
        assert name in sample.instruction and color in sample.instruction
        assert (task.read(sample.image, sample.target)[name].pixels == masks[name]).mean() > 0.99
        if not masks[name].any():
            absent += 1
            assert sample.image.tobytes() == sample.target.tobytes()
    assert 3 < absent < 24


def test_the_left_or_the_right_object_of_a_pair_is_requested(world_folder):
    world = World(world_folder, FRAME)
    for seed in range(20):
        _, masks = pairs(world, random.Random(seed))
        assert len(masks) == 2 and not np.logical_and(*masks.values()).any()
        middles = {"left" if "left" in words else "right": np.nonzero(mask)[1].mean() for words, mask in masks.items()}
        assert middles["left"] < middles["right"]


def test_absent_names_belong_to_no_object_of_the_scene(world_folder):
    world = World(world_folder, FRAME)
    for seed in range(20):
        image, masks = absent(world, random.Random(seed))
        scene = world.scene(random.Random(seed))
        assert image == scene.image
        assert masks.keys() <= world.names - scene.names and len(masks) == ABSENT
        assert not any(mask.any() for mask in masks.values())


def test_examples_depend_only_on_seed_and_index(world_folder):
    world = World(world_folder, FRAME)
    for _, example, _ in TRAINING_SOURCES.values():
        first, second, other = (GeneratedDataset(partial(example, world), 9, seed) for seed in (1, 1, 2))
        pictures = [first[index][0] for index in range(9)]
        assert second[7][0] == pictures[7]
        assert [other[index][0] for index in range(9)] != pictures
        with pytest.raises(IndexError, match="from 0 to 8; got 9"):
            first[9]


def test_the_mixture_has_each_family_by_its_fraction(world_folder):
    world = World(world_folder, FRAME)
    samples = mixture(world, 100)
    assert len(samples) == 100
    assert sum(share for share, _, _ in TRAINING_SOURCES.values()) == pytest.approx(1)
    found = Counter(samples.source_of(position).name for position in range(100))
    assert found == {name: round(100 * share) for name, (share, _, _) in TRAINING_SOURCES.items()}
    for position in range(100):
        sample = samples[position]
        assert sample.image.size == sample.target.size == FRAME
        assert sample.image.mode == sample.target.mode == "RGB"
    assert samples[5] == mixture(world, 100)[5]


def test_families_with_the_same_generator_have_different_images(world_folder):
    world = World(world_folder, FRAME)

    def clean(name):
        dataset = source(name, world, 9, seed=1).dataset
        return [dataset[index][name in ("noise", "blur")] for index in range(9)]

    for first, second in (("segmentation", "absent"), ("pose", "keypoints"), ("noise", "blur")):
        assert clean(first) != clean(second)


def test_held_out_names_are_requested_among_trained_ones(world_folder):
    world = World(world_folder, FRAME, unseen_objects=True)
    distractors, neighbors = 0, False
    for seed in range(60):
        scene = world.scene(random.Random(seed))
        assert world.names & scene.names
        distractors += len(scene.names - world.names)
        image, masks = segmentation(world, random.Random(seed))
        neighbors |= any(masks[words].any() and not mentions(words, world.names) for words in masks)
        (words,) = one_of_names(image, masks, random.Random(seed), world.names).colors
        assert mentions(words, world.names)
    assert distractors > 20 and neighbors, "the annotation has the other objects, too"


def test_a_whole_pose_is_decoded_from_its_discs(world_folder):
    world = World(world_folder, FRAME)
    task = WholePose()
    assert len(set(task.colors.values())) == len(task.colors) == 9
    steps = []
    for seed in range(20):
        image, joints = keypoints(world, random.Random(seed))
        for name, found in task.read(image, task.draw(image, joints)).items():
            if joints[name] and found:
                steps.append(np.hypot(found.x - joints[name].x, found.y - joints[name].y))
    assert len(steps) > 120 and np.median(steps) < 1
    assert len({task.instruction(random.Random(seed)) for seed in range(30)}) > 3


def test_few_keypoints_are_one_to_three_joints(world_folder):
    world = World(world_folder, FRAME)
    counts = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        image, joints = keypoints(world, rng)
        task = few_keypoints(image, joints, rng)
        counts[len(task.colors)] += 1
        assert task.colors.keys() <= joints.keys()
    assert counts.keys() == {1, 2, 3} and min(counts.values()) > 5
