import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from instructdiffusion_pipeline.tasks import segmentation
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS

PHOTOGRAPHS = [Image.fromarray(data.astronaut()), Image.fromarray(data.coffee()), Image.fromarray(data.chelsea())]


def disc(width, height, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def test_paint_is_half_colour_and_half_picture_and_only_in_the_mask():
    image = Image.new("RGB", (8, 6), (100, 50, 201))
    mask = disc(8, 6, 3, 3, 2)
    painted = np.asarray(segmentation.draw(image, mask, "green"))
    assert (painted[mask] == (50, 89, 100)).all()
    assert (painted[~mask] == (100, 50, 201)).all()


@settings(max_examples=60, deadline=None)
@given(
    photograph=st.sampled_from(PHOTOGRAPHS),
    corner=st.tuples(st.integers(0, 150), st.integers(0, 100)),
    x=st.integers(20, 108),
    y=st.integers(20, 108),
    radius=st.integers(4, 40),
    color=st.sampled_from(sorted(MASK_COLORS)),
)
def test_reading_gives_the_mask_that_was_drawn(photograph, corner, x, y, radius, color):
    image = photograph.crop((*corner, corner[0] + 128, corner[1] + 128))
    mask = disc(128, 128, x, y, radius)
    # a pixel that has the asked colour already cannot show the paint
    far = np.abs(np.asarray(image).astype(int) - MASK_COLORS[color]).max(-1) >= 32
    found = segmentation.read(image, segmentation.draw(image, mask, color), color)
    assert (found & far == mask & far).all()


@pytest.mark.parametrize("color", MASK_COLORS)
def test_an_answer_like_the_input_reads_as_nothing(color):
    assert not segmentation.read(PHOTOGRAPHS[0], PHOTOGRAPHS[0], color).any()


def test_every_wording_names_object_and_colour():
    wordings = {segmentation.instruction("left wrist", "purple", random.Random(seed)) for seed in range(200)}
    assert len(wordings) == len(segmentation.TEMPLATES)
    assert all("left wrist" in wording and "purple" in wording for wording in wordings)
