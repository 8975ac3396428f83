"""What all tasks have in common."""

import copy
import pickle

import pytest

from instructdiffusion_pipeline import Editing, Keypoints, Restoration, Segmentation

MAKERS = [
    lambda: Segmentation({"cat": "blue", "dogs": "red"}),
    lambda: Keypoints({"nose": "blue", "left wrist": "red"}),
    lambda: Restoration("noise"),
    lambda: Editing("make it winter"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_equal_tasks_are_one_key(make):
    task = make()
    assert task == make() and hash(task) == hash(make())
    assert {task: 1}[make()] == 1
    for same in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert same == task and hash(same) == hash(task) and same.instruction() == task.instruction()


def test_tasks_that_ask_otherwise_differ():
    first = Segmentation({"cat": "blue", "dogs": "red"})
    assert first != Segmentation({"cat": "red", "dogs": "blue"})
    assert first != Segmentation({"dogs": "red", "cat": "blue"}), "its instruction names the dogs first"
    assert Segmentation({"nose": "blue"}) != Keypoints({"nose": "blue"})


@pytest.mark.parametrize("make", MAKERS[:2])
def test_the_colors_of_a_task_stay(make):
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
