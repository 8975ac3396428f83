"""Scores are for held-out material. In the world of this test, colors show where the parts of an image come from."""

import dataclasses
import random
import re

import held_out
import numpy as np
import pytest
import readout
from held_out import COUNT_ROWS, SIZE_ROWS, rows
from PIL import Image, ImageDraw
from recipes import RECIPES
from world import STYLES, UNSEEN_STYLE, is_held_out

GRAY, RED = (90, 90, 90), (204, 32, 32)  # of training photographs and of held-out ones, after JPEG compression
WHITE, BLUE = (240, 240, 240, 255), (40, 40, 200, 255)  # of drawings in training styles and in the held-out one

NAMES = tuple(f"thing {i}" for i in range(40))


@pytest.fixture(scope="module")
def colored_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("colored")
    for part in ("photographs", *(f"objects/{style}" for style in (*STYLES, UNSEEN_STYLE))):
        (root / part).mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (100, 100), RED if is_held_out(name) else GRAY).save(root / "photographs" / f"{name}.jpg")
        for style in (*STYLES, UNSEEN_STYLE):
            sprite = Image.new("RGBA", (100, 100))
            ImageDraw.Draw(sprite).ellipse((0, 0, 99, 99), fill=BLUE if style == UNSEEN_STYLE else WHITE)
            sprite.save(root / "objects" / style / f"{name}.png")
    return root


@pytest.fixture(params=RECIPES)
def recipe(request):
    return dataclasses.replace(RECIPES[request.param], names=NAMES)


def test_all_rows_use_material_that_was_not_trained_on(colored_world, recipe):
    styled = {"segmentation, unseen drawing style", *SIZE_ROWS, *COUNT_ROWS}
    for source in rows(recipe, colored_world, 6):
        for index in range(6):
            image, annotation = source.dataset[index]
            task = source.make_task(image, annotation, random.Random(index))
            clean = np.asarray(annotation if task.family == "restoration" else image).astype(int)
            assert (clean == RED).all(-1).any(), source.name
            assert not (clean == GRAY).all(-1).any(), source.name
            if source.name.startswith("one joint"):
                assert len(task.colors) == 1
            if task.family == "segmentation":
                red, _, blue = clean[np.logical_or.reduce(list(annotation.values()))].mean(0)
                assert (blue > 2 * red) == (source.name in styled)
                (words,) = task.colors
                (asked,) = re.findall(r"thing \d+", words)
                assert is_held_out(asked) == (source.name == "segmentation, unseen names")


def test_rows_by_size_and_number_have_such_objects(colored_world, recipe):
    by_row = {source.name: source.dataset for source in rows(recipe, colored_world, 8)}
    for row, (low, high) in SIZE_ROWS.items():
        for index in range(8):
            image, masks = by_row[row][index]
            widths = [np.ptp(np.nonzero(mask)[1]) + 1 for mask in masks.values()]  # of discs that may be covered
            assert image.size == (recipe.side, recipe.side)
            assert low * recipe.side - 2 <= max(widths) <= high * recipe.side + 1
    for row, count in COUNT_ROWS.items():
        assert {len(by_row[row][index][1]) for index in range(8)} == {count}


def test_all_stages_have_different_scenes():
    assert len({0, 1, readout.SEED, held_out.SEED}) == 4  # 0 is the seed of the VAE, 1 that of the UNet
