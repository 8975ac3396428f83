"""`instructdiffusion-tiny`: its files, and its outputs in each family on photographs that it was not trained on."""

import json
import math
import random
import re
from pathlib import Path

import edit
import numpy as np
import pytest
import torch
from color_edits import COLOR_EDITS, edit_colors
from fetch import NAMES
from figures import draw_figure
from model import task_settings
from PIL import Image
from pose import WholePose
from recipes import RECIPES
from skimage import data

from instructdiffusion_pipeline import (
    InstructDiffusionPipeline,
    export,
    modular_instruct_diffusion,
    pipeline_instruct_diffusion,
)
from instructdiffusion_pipeline.ask import ask_batch
from instructdiffusion_pipeline.evaluation.metrics import Overlap, psnr
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration, add_noise
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

RECIPE = RECIPES["cpu"]
SIZE = RECIPE.side
SUNFLOWER = Path(edit.__file__).parent / "demo" / "sunflower.png"


@pytest.fixture(scope="module")
def model():
    pipe = InstructDiffusionPipeline.from_pretrained(edit.TINY_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def answers(model):
    """Outputs of the model with its own settings, for one task for each image."""

    def ask(images, tasks, **settings):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(images))]
        return ask_batch(model, images, tasks, generator=generators, **settings)

    return ask


@pytest.fixture
def photographs():
    """Center squares of photographs that it was not trained on, at its working size."""
    pictures = []
    for pixels in (data.coffee(), data.chelsea(), data.astronaut()):
        image = Image.fromarray(pixels)
        left, top = ((length - min(image.size)) // 2 for length in image.size)
        box = (left, top, left + min(image.size), top + min(image.size))
        pictures.append(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box))
    return pictures


@pytest.mark.parametrize("module", [pipeline_instruct_diffusion, modular_instruct_diffusion])
def test_it_contains_the_current_code(module):
    carried = edit.TINY_MODEL / Path(module.__file__).name
    assert carried.read_text() == Path(module.__file__).read_text(), f"copy the file to {carried}"


def test_its_index_of_blocks_matches_an_export(model, tmp_path):
    export(model, tmp_path / "model")
    for name in ("modular_config.json", "modular_model_index.json"):
        carried, exported = (json.loads((path / name).read_text()) for path in (edit.TINY_MODEL, tmp_path / "model"))
        assert carried | {"_diffusers_version": None} == exported | {"_diffusers_version": None}


def test_it_matches_the_recipe_for_cpus(model):
    assert model.default_resolution == RECIPE.side and model.vae_scale_factor == 4
    assert tuple(model.unet.config.block_out_channels) == RECIPE.unet_widths
    assert model.text_encoder.config.hidden_size == model.unet.config.cross_attention_dim == RECIPE.text_width
    assert RECIPE.held_out == ["banana", "penguin", "pig", "tree", "violin"] and set(RECIPE.names) <= NAMES.keys()
    card = " ".join((edit.TINY_MODEL / "README.md").read_text().split())
    assert ", ".join(name for name in RECIPE.names if name not in RECIPE.held_out) in card


def test_it_is_small_and_contains_no_local_paths():
    files = [path for path in edit.TINY_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert not re.search(r"_name_or_path|/home/|/root/|/tmp/|/work/", path.read_text()), path


def test_it_has_settings_for_every_family(model):
    settings = model.config.task_settings
    assert settings.keys() == {"keypoints", "segmentation", "restoration", "editing"}
    for family, values in settings.items():
        others = {"keypoints": {"resolution", "ensemble_size"}, "editing": set()}.get(family, {"ensemble_size"})
        assert values.keys() == {"num_inference_steps", "guidance_scale", "image_guidance_scale"} | others
    assert settings == task_settings(RECIPE)


@pytest.mark.slow
def test_its_own_settings_are_better_for_editing_than_those_of_the_paper(model, photographs):
    edit_pair = edit_colors(photographs[0], random.Random(0), "night")
    paper = {"num_inference_steps": 100, "guidance_scale": 5.0, "image_guidance_scale": 1.25}
    own, others = (
        psnr(
            edit_pair.edited,
            model(COLOR_EDITS["night"][1][0], photographs[0], generator=torch.manual_seed(0), **settings).images[0],
        )
        for settings in ({}, paper)
    )
    assert own > others + 1


def test_it_paints_the_sunflower(answers, photographs):
    sunflower = Image.open(SUNFLOWER).convert("RGBA")
    sunflower.thumbnail((34, 34))
    tasks, masks = [], []
    for photograph, color, place in zip(
        photographs, ("blue", "red", "green"), ((4, 8), (20, 24), (26, 4)), strict=True
    ):
        photograph.paste(sunflower, place, sunflower)
        mask = np.zeros((SIZE, SIZE), bool)
        columns, rows = (slice(start, start + length) for start, length in zip(place, sunflower.size, strict=True))
        mask[rows, columns] = np.asarray(sunflower.getchannel("A")) > 127
        tasks.append(Segmentation({"sunflower": color}))
        masks.append(mask)
    for use_readout in (False, True):
        found = answers(photographs, tasks, use_readout=use_readout)
        overlaps = [
            Overlap.of("sunflower", mask, answer.data["sunflower"].pixels).iou
            for answer, mask in zip(found, masks, strict=True)
        ]
        assert np.mean(overlaps) > 0.6


SEVERAL = Keypoints({"nose": "yellow", "left wrist": "red", "right wrist": "blue", "left knee": "green"})


@pytest.mark.parametrize("task", [WholePose(), SEVERAL], ids=["pose", "by name"])
def test_it_finds_joints(answers, photographs, task):
    images, truths = [], []
    for seed in range(6):
        layer, joints = draw_figure(random.Random(seed), faces_viewer=True, side=SIZE)
        image = photographs[seed % 3].copy()
        image.paste(layer, (0, 0), layer)
        images.append(image)
        truths.append(joints)
    hits = []
    for answer, truth in zip(answers(images, [task] * len(images)), truths, strict=True):
        for name, found in answer.data.items():
            if place := truth[name]:
                hits.append(found is not None and math.dist(found[:2], place[:2]) < 0.05 * SIZE)
    assert np.mean(hits) > 0.5


def test_it_takes_noise_out(answers, photographs):
    noisy = [add_noise(image, 30.0, np.random.default_rng(seed)) for seed, image in enumerate(photographs)]
    found = answers(noisy, [Restoration("noise")] * len(noisy))
    gains = [
        psnr(clean, answer.data) - psnr(clean, before)
        for clean, before, answer in zip(photographs, noisy, found, strict=True)
    ]
    assert np.mean(gains) > 2


def test_it_edits_colors(answers, photographs):
    looks = ("black and white", "night", "sepia")
    edits = [
        edit_colors(image, random.Random(0), look)._replace(instruction=COLOR_EDITS[look][1][0])
        for image, look in zip(photographs, looks, strict=True)
    ]
    found = answers(photographs, [Editing(edit.instruction) for edit in edits])
    gains = [
        psnr(edit.edited, answer.data) - psnr(edit.edited, before)
        for edit, before, answer in zip(edits, photographs, found, strict=True)
    ]
    assert np.mean(gains) > 1


@pytest.mark.slow
def test_slices_of_an_image_do_not_depend_on_the_rest_of_its_batch(model):
    """Two images of one working size, whose slices have different ones; the objects are at different places."""
    sunflower = Image.open(SUNFLOWER).convert("RGBA")
    images, masks = [], []
    for pixels, size, side, place in (
        (data.coffee(), (241, 271), 70, (20, 30)),
        (data.chelsea(), (150, 163), 45, (90, 85)),
    ):
        image, flower = Image.fromarray(pixels).resize(size), sunflower.resize((side, side))
        image.paste(flower, place, flower)
        mask = Image.new("L", size)
        mask.paste(flower.getchannel("A"), place)
        images.append(image)
        masks.append(np.asarray(mask) > 127)
    task = Segmentation({"sunflower": "blue"})

    def ask_together(numbers):
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        chosen = [images[number] for number in numbers]
        return ask_batch(model, chosen, [task] * len(numbers), generator=generators, slices=0.56)

    for number, together in enumerate(ask_together([0, 1])):
        (alone,) = ask_together([number])
        found, expected = (answer.data["sunflower"].pixels for answer in (together, alone))
        # Sums in batches of other sizes round differently.
        assert expected.any() and (found != expected).mean() < 1e-3
        assert Overlap.of("sunflower", masks[number], found).iou > 0.6
