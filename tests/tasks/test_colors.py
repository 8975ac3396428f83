"""The choice of colors for objects and joints."""

import numpy as np
import pytest
from PIL import Image

from instructdiffusion_pipeline import Segmentation
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, assign_colors, most_visible_first, visible_colors


def striped(columns: dict[str, int]) -> Image.Image:
    """An image of 100 x 10 pixels with a given number of columns of each color."""
    line = [MASK_COLORS[name] for name, count in columns.items() for _ in range(count)]
    return Image.fromarray(np.array([line] * 10, np.uint8))


EVERYWHERE = np.ones((10, 100), bool)


def test_a_color_is_visible_where_nine_tenths_of_the_pixels_differ_from_it():
    for red, visible in ((9, True), (10, True), (11, False)):
        names = visible_colors(striped({"red": red, "blue": 100 - red}), EVERYWHERE, MASK_COLORS)
        assert ("red" in names) == visible and "blue" not in names and "yellow" in names


def test_without_a_visible_color_the_most_visible_one_is_returned():
    two = {name: MASK_COLORS[name] for name in ("red", "blue")}
    assert visible_colors(striped({"red": 60, "blue": 40}), EVERYWHERE, two) == ["blue"]
    assert visible_colors(striped({"red": 40, "blue": 60}), EVERYWHERE, two) == ["red"]


def test_colors_that_are_not_visible_are_assigned_last():
    image = striped({"red": 50, "white": 50})
    assert {*most_visible_first(image, MASK_COLORS)[-2:]} == {"red", "white"}
    names = [f"object {number}" for number in range(len(MASK_COLORS))]
    assigned = assign_colors(image, names, MASK_COLORS)
    assert list(assigned) == names and sorted(assigned.values()) == sorted(MASK_COLORS)
    assert {assigned[name] for name in names[-2:]} == {"red", "white"}


@pytest.mark.parametrize(
    ("names", "told"),
    [([], "none"), (["cat", "cat"], "cat, cat"), ([f"{number}" for number in range(9)], "0, 1, 2, 3, 4, 5, 6, 7, 8")],
)
def test_more_names_than_colors_raise_an_error(names: list[str], told: str):
    with pytest.raises(ValueError, match=f"`names` must be 1 to 8 different names; got {told}"):
        assign_colors(striped({"red": 100}), names, MASK_COLORS)


def test_tasks_with_another_order_of_objects_differ():
    colors = Segmentation({"cat": "red", "dog": "blue"}).colors
    assert colors != {"dog": "blue", "cat": "red"}
    assert (colors != {"cat": "red", "dog": "blue"}) is False
