import random

import numpy as np
import pytest
import tiny
from folders import Recorded, same
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.keypoints import AIC_JOINTS, CROWDPOSE_JOINTS, MPII_JOINTS, Person
from instructdiffusion_pipeline.datasets.transforms import (
    PersonCrop,
    Resize,
    SquareCrop,
    flip_joints,
    half_body,
    swap_sides,
)
from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS
from instructdiffusion_pipeline.types import Edit, Joint, LabeledMasks

SEEDS = st.integers(0, 10**6)


def person(joints, center=(60, 50), scale=0.5):
    return Person(joints, center, (scale, scale), None, 1, 1)


def dots(*places, size=(120, 100)):
    """Bright dots of 5 x 5 pixels on black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y in places:
        pixels[y - 2 : y + 3, x - 2 : x + 3] = 255
    return Image.fromarray(pixels)


def brightest(image):
    """The centroid of the brightness."""
    light = np.asarray(image.convert("L"), float)
    rows, columns = np.indices(light.shape)
    return (columns * light).sum() / light.sum(), (rows * light).sum() / light.sum()


@pytest.mark.parametrize("names", [COCO_JOINTS, CROWDPOSE_JOINTS, AIC_JOINTS, MPII_JOINTS])
def test_flipping_swaps_sides_and_flipping_twice_is_the_identity(names):
    joints = {name: Joint(number, 2 * number) if number % 3 else None for number, name in enumerate(names)}
    flipped = flip_joints(joints, 120)
    assert set(flipped) == set(names) and flip_joints(flipped, 120) == joints
    for name, joint in joints.items():
        assert flipped[swap_sides(name)] == (joint and Joint(119 - joint.x, joint.y))
    assert swap_sides("left wrist") == "right wrist" and swap_sides("head top") == "head top"


@given(x=st.integers(30, 90), y=st.integers(25, 75), seed=SEEDS)
def test_joints_are_transformed_with_the_pixels(x, y, seed):
    joints = {"left wrist": Joint(x, y), "nose": None}
    try:
        crop, placed = PersonCrop(size=128)(dots((x, y)), person(joints), random.Random(seed))
    except UnreadableSample:
        assume(False)
    assert placed["nose"] is None and set(placed) in ({"left wrist", "nose"}, {"right wrist", "nose"})
    joint = placed.get("left wrist") or placed["right wrist"]
    assume(8 < joint.x < 119 and 8 < joint.y < 119)
    assert brightest(crop) == pytest.approx(joint[:2], abs=0.35)


def test_without_jitter_a_person_is_centered():
    joints = {"nose": Joint(60, 50)}
    crop, placed = PersonCrop(size=64, jitter=False)(dots((60, 50)), person(joints), random.Random(0))
    assert crop.size == (64, 64) and placed == {"nose": Joint(32, 32)}


def test_a_crop_without_joints_is_unreadable():
    with pytest.raises(UnreadableSample, match="annotation 1: no joint is left in the crop"):
        PersonCrop(jitter=False)(dots((60, 50)), person({"nose": Joint(-70, 50)}), random.Random(0))


@pytest.mark.parametrize("chance, angles", [(0.0, 1), (0.6, 1), (0.601, 0), (0.9, 0)])
def test_six_of_ten_people_are_rotated(chance, angles):
    # scale, whether to rotate, the angle if so, whether to flip; other random choices fail
    rng = Recorded(("gauss", 0.0), ("random", chance), *[("gauss", 1.0)] * angles, ("random", 0.9))
    _, placed = PersonCrop(size=100)(dots((60, 50)), person({"nose": Joint(60, 40)}), rng)
    root = 100 / 2**0.5 / 10  # 10 pixels above the center, rotated by 45 degrees
    assert placed["nose"] == pytest.approx((50 - root, 50 - root, 1) if angles else (50, 40, 1))
    assert not rng.choices


@pytest.mark.parametrize(
    "above, below, drawn, half",
    [
        (5, 3, 0.6, "lower"), (5, 3, 0.4, "upper"), (3, 3, 0.4, "upper"), (3, 6, 0.6, "lower"),
        (5, 2, 0.6, "upper"), (2, 3, 0.4, "lower"), (2, 3, 0.6, "lower"), (2, 2, 0.4, "upper"),
    ],
)  # fmt: skip
def test_a_half_body_needs_three_joints_unless_both_halves_have_fewer(above, below, drawn, half):
    names = [*COCO_JOINTS[:above], *COCO_JOINTS[-below:]]
    joints = {name: Joint(10 * number, 200 * (number >= above)) for number, name in enumerate(names)}
    (_, y), _ = half_body(joints, Recorded(("gauss", drawn)))
    assert y == {"upper": 0, "lower": 200}[half]


def test_centers_and_sides_of_half_bodies():
    joints = {name: Joint(10 * number, number) for number, name in enumerate(COCO_JOINTS)}
    found = {half_body(joints, random.Random(seed)) for seed in range(50)}
    # eleven joints of the upper body span 100 pixels, six of the lower body 50; the side is 1.5 times as long
    assert found == {((50.0, 5.0), 150.0), ((135.0, 13.5), 75.0)}
    few = {"nose": Joint(1, 2), "left hip": Joint(3, 4), "left knee": None}
    assert half_body(few, random.Random(0)) is None
    sides = {
        half: PersonCrop(half_body=half)(dots((60, 50)), person(joints), random.Random(1))[1] for half in (0.0, 1.0)
    }
    assert sides[0.0] != sides[1.0]


@given(
    width=st.integers(20, 80),
    height=st.integers(20, 80),
    seed=SEEDS,
    reduce=st.booleans(),
    size=st.sampled_from([16, 32, 48]),
)
def test_image_clean_image_and_masks_have_the_same_crop(width, height, seed, reduce, size):
    image = tiny.picture(width, height, seed)
    mask = np.asarray(image)[..., 0] > 128
    shown = Image.fromarray(np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255)
    crop = SquareCrop(size, flip=0.5, reduce=reduce)
    picture, clean = crop(image, image, random.Random(seed))
    assert picture.size == (size, size) and same(picture, clean)
    other, edit = crop(image, Edit("make it winter", image), random.Random(seed))
    assert same(other, picture) and same(edit.edited, picture)
    absent = np.zeros_like(mask)
    other, masks = crop(image, {"cat": mask, "dog": absent, "cow": absent}, random.Random(seed))
    assert same(other, picture) and masks["cat"].shape == (size, size) and masks["dog"] is masks["cow"]
    if min(width, height) == size:
        assert same(Image.fromarray(masks["cat"].astype(np.uint8) * 255).convert("RGB"), crop_of(crop, shown, seed))


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_a_small_image_is_not_enlarged_for_evaluation(size, reduce):
    image = tiny.picture(60, 48)
    crop = SquareCrop(size, reduce=reduce, enlarge=False)
    picture, masks = crop(image, {"cat": np.ones((48, 60), bool)}, random.Random(0))
    assert picture.size == masks["cat"].shape == (min(size, 48),) * 2
    if size >= 48 or not reduce:
        crops = sliding_window_view(np.asarray(image), (*picture.size, 3))
        assert (crops == np.asarray(picture)).all((-3, -2, -1)).any()


def crop_of(crop, image, seed):
    return crop(image, image, random.Random(seed))[0]


@pytest.mark.parametrize("side, size", [(200, 256), (256, 256), (300, 256), (77, 64), (64, 77)])
def test_masks_are_resized_to_the_nearest_pixels_as_in_pillow(side, size):
    mask = np.random.default_rng(0).random((side, side)) < 0.5
    image = tiny.picture(side, side)
    _, masks = SquareCrop(size)(image, {"cat": mask}, random.Random(0))
    pillow = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    assert (masks["cat"] == np.asarray(pillow)).all()


def test_samples_with_left_or_right_are_not_flipped():
    image, mask = tiny.picture(32, 32), np.eye(32, dtype=bool)
    always = SquareCrop(32, flip=1.0)
    for name, flips in [("cat", True), ("cat on the left", False), ("rightmost dog", False), ("bright sky", True)]:
        crop, masks = always(image, {name: mask}, random.Random(0))
        assert same(crop, image) != flips and (masks[name][0, 0] != flips)
        crop, edit = Resize(32, flip=1.0)(image, Edit(f"remove the {name}", image), random.Random(0))
        assert same(crop, image) != flips and same(edit.edited, crop)


def test_edits_are_resized_regardless_of_aspect_ratio():
    edit = Edit("make it winter", tiny.picture(50, 40))
    crop, squashed = Resize(32)(tiny.picture(40, 30), edit, random.Random(0))
    assert crop.size == squashed.edited.size == (32, 32)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_unlabeled_pixels_are_cropped_and_flipped_with_the_masks(flip):
    image, labeled = tiny.picture(64, 64), np.random.default_rng(0).random((64, 64)) < 0.5
    _, found = SquareCrop(64, flip=flip)(image, LabeledMasks({"cat": labeled}, labeled), random.Random(0))
    assert np.array_equal(found["cat"], found.labeled) and found.labeled.any()
    assert np.array_equal(found.labeled, labeled[:, ::-1] if flip else labeled)
