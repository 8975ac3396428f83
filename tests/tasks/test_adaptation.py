"""The images of the adaptation stage: the marks in the caption are drawn."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.transforms import SquareCrop
from instructdiffusion_pipeline.tasks.adaptation import COLORS, NOUNS, TEMPLATES, Adaptation, Mark
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, MASK_COLORS

GREY = Image.new("RGB", (256, 256), (90, 100, 110))


def drawn(mark, image=GREY):
    return np.asarray(Adaptation("a cat", (mark,)).draw(image, "a cat"))


@given(rng=st.integers(0, 2**32).map(random.Random))
def test_the_caption_contains_color_and_kind_of_each_mark(rng):
    marked = Adaptation.from_annotation(GREY, "A cat on a mat.", rng)
    words = marked.instruction(rng)
    assert "A cat on a mat" in words and "mat.," not in words
    for mark in marked.marks:
        assert re.search(rf"\ba {mark.color} ({'|'.join(NOUNS[mark.kind])})\b", words)
    assert len({mark.color for mark in marked.marks}) == len(marked.marks) <= 3
    pixels = np.asarray(marked.draw(GREY, "A cat on a mat."))
    last = marked.marks[-1]
    left, top, right, bottom = last.box
    assert min(left, top) >= 0 and max(right, bottom) <= 256
    color, share = COLORS[last.kind][last.color], 0.5 if last.kind == "patch" else 1
    if share == 1:  # nothing covers the last mark
        assert (pixels == color).all(-1).any()


def test_a_disc_is_drawn_as_in_keypoints():
    pixels = drawn(Mark("disc", "red", (50, 60, 70, 80)))
    red = (pixels == KEYPOINT_COLORS["red"]).all(-1)
    assert 280 <= red.sum() <= 360 and red[70, 60] and not red[60, 50]
    assert (pixels[~red] == (90, 100, 110)).all()


def test_a_box_is_drawn_as_an_outline():
    pixels = drawn(Mark("box", "cyan", (50, 60, 150, 120)))
    cyan = (pixels == KEYPOINT_COLORS["cyan"]).all(-1)
    assert cyan[61, 100] and cyan[90, 51] and not cyan[90, 100]
    rows, columns = np.nonzero(cyan)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 120, 50, 150)


def test_a_patch_is_half_transparent_and_deterministic():
    mark = Mark("patch", "purple", (50, 60, 150, 120))
    pixels = drawn(mark)
    mixed = (np.array((90, 100, 110)) + MASK_COLORS["purple"]) // 2
    purple = (pixels == mixed).all(-1)
    assert (pixels[~purple] == (90, 100, 110)).all()
    assert 0.2 * 6000 < purple.sum() < 6000 and purple[90, 100]
    assert (drawn(mark) == pixels).all()


def test_all_kinds_of_marks_and_templates_are_used():
    rng = random.Random(0)
    marked = [Adaptation.from_annotation(GREY, "a cat", rng) for _ in range(200)]
    assert {mark.kind for one in marked for mark in one.marks} == set(COLORS)
    assert {len(one.marks) for one in marked} == {1, 2, 3}
    assert len({one.instruction(rng) for one in marked}) > 150
    assert all("{caption}" in template and "{marks}" in template for template in TEMPLATES)
    assert Adaptation("a cat", (Mark("disc", "red", (0, 0, 9, 9)),)).instruction() == "a cat, with a red disc"


@pytest.mark.parametrize(("caption", "flips"), [("a dog runs", True), ("a dog left of a cat", False)])
def test_captions_in_a_mixture_are_not_flipped_if_they_contain_left_or_right(caption, flips):
    class Captions(list):
        skipped: list[tuple[str, str]] = []

        def name(self, index):
            return str(index)

    ramp = Image.linear_gradient("L").rotate(90).resize((80, 60)).convert("RGB")
    source = Source("captions", Captions([(ramp, caption)] * 20), Adaptation.from_annotation, SquareCrop(32, flip=0.5))
    samples = list(Mixture([(source, 1)]))
    assert all(caption in sample.instruction and sample.target.size == (32, 32) for sample in samples)
    directions = {sample.image.getpixel((0, 0))[0] > sample.image.getpixel((31, 0))[0] for sample in samples}
    assert len(directions) == (2 if flips else 1)
