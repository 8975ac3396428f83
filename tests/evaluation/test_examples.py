import random

import numpy as np
import pytest
import tiny
from PIL import Image

from instructdiffusion_pipeline.datasets.keypoints import COCO_SIGMAS, Person
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.datasets.transforms import EvaluationPersonCrop
from instructdiffusion_pipeline.evaluation import examples_from, whole_person
from instructdiffusion_pipeline.evaluation.metrics import keypoint_ap
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Joint, Pose


class Blobs:
    """Images with one object each; two of them share a name."""

    skipped = []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        mask = np.zeros((32, 32), bool)
        mask[index : index + 8, 4:20] = True
        return tiny.picture(seed=index), {"blob": mask}

    def name(self, index):
        return f"{max(1, index)}.png"


def source(**changes):
    return Source(**{"name": "blobs", "dataset": Blobs(), "make_task": Segmentation.from_annotation} | changes)


def test_a_seed_chooses_the_examples_and_the_tasks():
    examples, again = examples_from(source(), 12, seed=3), examples_from(source(), 12, seed=3)
    assert [lazy.name for lazy in examples] == [lazy.name for lazy in again]
    assert [lazy.open().tasks for lazy in examples] == [lazy.open().tasks for lazy in again]
    assert [lazy.name for lazy in examples] != [lazy.name for lazy in examples_from(source(), 12, seed=4)]
    assert {lazy.row for lazy in examples} == {"blobs"}


def test_names_of_examples_are_unique_even_if_names_of_images_are_not():
    examples = examples_from(source(), 100)
    assert len({lazy.name for lazy in examples}) == len(examples) == 20


def test_examples_are_read_when_opened_and_transformed_before_the_task_is_made():
    def mirrored(image, masks, rng):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {name: mask[:, ::-1] for name, mask in masks.items()}

    class Broken(Blobs):
        def __getitem__(self, index):
            raise OSError("cannot be read")

    (lazy,) = examples_from(source(transform=mirrored), 1)
    index = int(lazy.name.split()[1].rstrip(":"))
    image, masks = Blobs()[index]
    example = lazy.open()
    assert (np.asarray(example.image) == np.asarray(image)[:, ::-1]).all()
    assert (example.truth["blob"] == masks["blob"][:, ::-1]).all()
    (broken,) = examples_from(source(dataset=Broken()), 1)
    with pytest.raises(OSError, match="cannot be read"):
        broken.open()


def test_tasks_of_a_person_have_each_joint_once_in_visible_colors():
    image = Image.new("RGB", (64, 64), "red")
    tasks = whole_person(image, dict.fromkeys(COCO_SIGMAS), random.Random(0))
    assert sorted(name for task in tasks for name in task.colors) == sorted(COCO_SIGMAS)
    assert not any({"left eye", "right eye"} <= set(task.colors) for task in tasks), "neighbors are in different tasks"
    assert [len(task.colors) for task in tasks] == [5, 4, 4, 4]
    assert all("red" not in task.colors.values() for task in tasks)


@pytest.mark.parametrize("shift", [2.0, 5.0, 9.0])
def test_a_crop_scales_the_area_so_that_oks_does_not_change(shift):
    joints = {name: Joint(100 + 9.0 * (i % 5), 80 + 15.0 * (i // 5)) for i, name in enumerate(COCO_SIGMAS)}
    person = Person(joints, (118.0, 110.0), (0.6, 0.6), 2500.0, 1, 1)
    crop = EvaluationPersonCrop(64, COCO_SIGMAS)
    image, pose = crop(tiny.picture(200, 180), person, random.Random(0))
    assert image.size == (64, 64) and pose.area == pytest.approx(2500 * (64 / 120) ** 2)

    moved = {name: Joint(joint.x + shift, joint.y) for name, joint in joints.items()}
    found = {name: Joint(joint.x + shift * 64 / 120, joint.y) for name, joint in pose.items()}
    assert keypoint_ap([pose], [found]) == keypoint_ap([Pose(joints, 2500.0, COCO_SIGMAS)], [moved])
