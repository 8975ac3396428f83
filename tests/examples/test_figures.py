import random

import numpy as np
import pytest
from figures import CLOSE_UP_SHARE, draw_figure
from PIL import Image

from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS, Keypoints

SIZE = 64
PAIRS = [name.removeprefix("left ") for name in COCO_JOINTS if name.startswith("left ")]


def figures(faces_viewer, count=60):
    return [draw_figure(random.Random(seed), faces_viewer, SIZE) for seed in range(count)]


@pytest.mark.parametrize("faces_viewer", [True, False])
def test_joints_lie_on_the_figure(faces_viewer):
    for layer, joints in figures(faces_viewer):
        assert tuple(joints) == COCO_JOINTS
        alpha = np.pad(np.asarray(layer.getchannel("A")), 1)
        for name, joint in joints.items():
            if joint:
                # (0, 0) is the center of the top left pixel; the padding shifts it by one
                column, row = round(joint.x) + 1, round(joint.y) + 1
                assert alpha[row - 1 : row + 2, column - 1 : column + 2].max() > 127, name


@pytest.mark.parametrize("faces_viewer", [True, False])
def test_left_and_right_are_those_of_the_figure(faces_viewer):
    for _, joints in figures(faces_viewer):
        for part in ("shoulder", "hip", "ear", "eye"):
            left, right = joints[f"left {part}"], joints[f"right {part}"]
            if left and right:
                # if a figure faces the viewer, its left side is on the right; figures do not lean further than this
                assert (left.x > right.x) == faces_viewer, part


def test_front_and_back_of_a_head_differ():
    same = 0
    for seed in range(20):
        (front, joints), (back, _) = (draw_figure(random.Random(seed), faces, SIZE) for faces in (True, False))
        eyes = [joints[f"{side} eye"] for side in ("left", "right")]
        if not all(eyes):
            continue
        row, column = (round(sum(eye[axis] for eye in eyes) / 2) for axis in (1, 0))
        spot = (slice(max(0, row - 3), row + 4), slice(max(0, column - 4), column + 5))
        front_spot, back_spot = (np.asarray(layer.convert("RGB")).astype(int)[spot] for layer in (front, back))
        same += front_spot.std((0, 1)).max() <= back_spot.std((0, 1)).max()
    assert same <= 3, "eyes and skin make a face less even than hair"


def test_sizes_of_figures_and_their_position_in_the_frame():
    heights, outside = [], []
    for layer, joints in figures(True, 200):
        _, top, _, bottom = layer.getchannel("A").getbbox()
        missing = sum(joint is None for joint in joints.values())
        outside.append(missing > 0)
        if not missing:
            heights.append((bottom - top) / SIZE)
        for joint in filter(None, joints.values()):
            assert -0.5 <= joint.x < SIZE - 0.5 and -0.5 <= joint.y < SIZE - 0.5
    assert min(heights) > 0.4 and max(heights) <= 1 and np.mean(heights) > 0.65
    assert 0.3 * CLOSE_UP_SHARE < np.mean(outside) < 1.7 * CLOSE_UP_SHARE


def test_discs_are_decoded_at_the_joints():
    steps = []
    for seed in range(40):
        rng = random.Random(seed)
        layer, joints = draw_figure(rng, faces_viewer=True, side=SIZE)
        image = Image.new("RGB", (SIZE, SIZE), (70, 110, 90))
        image.paste(layer, (0, 0), layer)
        task = Keypoints.from_annotation(image, joints, rng)
        for name, found in task.read(image, task.draw(image, joints)).items():
            if joints[name] and found:
                steps.append(np.hypot(found.x - joints[name].x, found.y - joints[name].y))
    assert len(steps) > 80
    assert np.median(steps) < 0.75, "pixels; places are rounded to whole ones"
