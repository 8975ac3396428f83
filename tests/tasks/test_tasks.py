"""Common properties of all tasks."""

import copy
import io
import pickle
import random
import re

import numpy as np
import pytest
import tiny
from PIL import Image, ImageOps

from instructdiffusion_pipeline import Editing, Keypoints, Restoration, Segmentation
from instructdiffusion_pipeline.tasks.adaptation import Adaptation
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, most_visible_first
from instructdiffusion_pipeline.types import Edit, Joint

MAKERS = [
    lambda: Segmentation({"cat": "blue", "dogs": "red"}),
    lambda: Keypoints({"nose": "blue", "left wrist": "red"}),
    lambda: Restoration("noise"),
    lambda: Editing("make it winter"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_equal_tasks_have_equal_hashes(make):
    task = make()
    assert task == make() and hash(task) == hash(make())
    assert {task: 1}[make()] == 1
    for same in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert same == task and hash(same) == hash(task) and same.instruction() == task.instruction()


@pytest.mark.parametrize("task", [Editing, Segmentation, Keypoints, Restoration])
def test_default_settings_are_those_in_the_guide(task):
    guide = (tiny.ROOT / "docs" / "guidance.md").read_text()
    (row,) = re.findall(rf"^\| {task.family} \| (.*) \|$", guide, re.MULTILINE)
    assert list(map(float, row.split(" | "))) == list(task.settings.values())
    assert list(task.settings) == ["num_inference_steps", "guidance_scale", "image_guidance_scale"]


def test_different_tasks_are_not_equal():
    first = Segmentation({"cat": "blue", "dogs": "red"})
    assert first != Segmentation({"cat": "red", "dogs": "blue"})
    assert first != Segmentation({"dogs": "red", "cat": "blue"}), "its instruction names the dogs first"
    assert Segmentation({"nose": "blue"}) != Keypoints({"nose": "blue"})


@pytest.mark.parametrize("make", MAKERS[:2])
def test_the_colors_of_a_task_cannot_be_changed(make):
    given = {"cat": "blue"}
    task = type(make())(given)
    given["dog"] = "red"
    assert task.colors == {"cat": "blue"}
    for change in (
        lambda: task.colors.update(dog="red"),
        lambda: task.colors.pop("cat"),
        lambda: task.colors.__setitem__("cat", "red"),
    ):
        with pytest.raises(TypeError, match="make a new task"):
            change()


def with_orientation(orientation):
    """An image of 48 x 32 stored pixels with an EXIF orientation, and the same image already rotated."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    tiny.picture(48, 32).save(file, "PNG", exif=exif)
    stored = Image.open(file)
    upright = ImageOps.exif_transpose(stored).convert("RGB")
    upright.info.clear()
    return stored, upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tasks_apply_the_exif_orientation_of_an_image(orientation):
    stored, upright = with_orientation(orientation)
    mask = np.zeros((upright.height, upright.width), bool)
    mask[2:9, 2:17] = True
    place = Joint(upright.width - 4.0, upright.height - 3.0)
    clean = Image.new("RGB", upright.size)
    for make, annotation in [
        (Keypoints.from_annotation, {"nose": place, "left eye": Joint(5, 6)}),
        (Segmentation.from_annotation, {"cat": mask}),
        (Adaptation.from_annotation, "a cat"),
        (Editing.from_annotation, Edit("make it winter", clean)),
    ]:
        tasks = [make(image, annotation, random.Random(0)) for image in (stored, upright)]
        assert tasks[0] == tasks[1]
        drawn = [tasks[0].draw(image, annotation) for image in (stored, upright)]
        assert drawn[0].size == upright.size and (np.asarray(drawn[0]) == np.asarray(drawn[1])).all()
    assert most_visible_first(stored, KEYPOINT_COLORS) == most_visible_first(upright, KEYPOINT_COLORS)
