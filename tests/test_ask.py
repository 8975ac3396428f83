import random

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from instructdiffusion_pipeline import (
    Editing,
    Keypoints,
    Mask,
    Restoration,
    Segmentation,
    ask,
    ask_batch,
)

FAST = {"num_inference_steps": 2}
TASKS = [Segmentation({"cat": "red"}), Keypoints({"nose": "blue"}), Restoration("noise"), Editing("make it winter")]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_every_family_gives_a_typed_answer_in_pixels_of_the_input(pipe, task):
    image = tiny.picture(width=150, height=100).convert("RGBA")
    answer = ask(pipe, image, task, resolution=64, generator=tiny.generator(), **FAST)
    assert answer.instruction == task.instruction()
    assert answer.picture.size == answer.image.size == answer.overlay.size == (150, 100)
    assert answer.box == (0, 0, 150, 100)
    if isinstance(task, Segmentation):
        assert isinstance(answer.data["cat"], Mask) and answer.data["cat"].pixels.shape == (100, 150)
    elif isinstance(task, Keypoints):
        assert answer.data.keys() == {"nose"}
    else:
        assert isinstance(answer.data, Image.Image) and answer.data.size == (150, 100)


def test_it_asks_what_a_user_of_the_pipeline_would(pipe):
    image, task = tiny.picture(), Segmentation({"cat": "red"})
    asked = ask(pipe, image, task, generator=tiny.generator(), num_inference_steps=2)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    direct = pipe(
        "mark the cat in red",
        image,
        num_inference_steps=2,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        resolution=side,
        resize_mode="stretch",
        generator=tiny.generator(),
    ).images[0]
    assert np.array_equal(asked.picture, direct)
    assert np.array_equal(asked.data["cat"].pixels, task.read(image, direct)["cat"].pixels)


def test_own_words_and_own_settings_come_first(pipe):
    image, task = tiny.picture(), Restoration("blur")
    own = ask(pipe, image, task, instruction="sharpen", guidance_scale=3.0, generator=tiny.generator(), **FAST)
    direct = pipe(
        "sharpen",
        image,
        resize_mode="stretch",
        guidance_scale=3.0,
        image_guidance_scale=1.0,
        generator=tiny.generator(),
        **FAST,
    ).images[0]
    assert np.array_equal(own.picture, direct)


def test_a_batch_answers_each_question(pipe):
    images = [tiny.picture(seed=seed) for seed in range(2)]
    tasks = [Segmentation({"cat": "red"}), Segmentation({"dog": "blue"})]
    words = [task.instruction(random.Random(0)) for task in tasks]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    answers = ask_batch(pipe, images, tasks, words, generator=generators, **FAST)
    assert [list(answer.data) for answer in answers] == [["cat"], ["dog"]]
    alone = ask(pipe, images[1], tasks[1], instruction=words[1], generator=torch.Generator().manual_seed(1), **FAST)
    difference = np.asarray(alone.picture, int) - np.asarray(answers[1].picture, int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"output_type": "np"}, "`settings` must not contain output_type"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"return_dict": True}, "return_dict"),
    ],
)
def test_settings_that_change_the_form_of_the_answer_are_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(pipe, tiny.picture(), TASKS[0], **settings)


def test_batches_that_do_not_fit_together_are_refused(pipe):
    image = tiny.picture()
    with pytest.raises(ValueError, match="must have the same length, at least one; got 1, 1 and 0"):
        ask_batch(pipe, [image], [TASKS[0]], [])
    with pytest.raises(ValueError, match="`tasks` must have the same settings; got keypoints, segmentation"):
        ask_batch(pipe, [image, image], TASKS[:2], ["a", "b"])


@pytest.mark.parametrize(
    "image, task", [("photo.jpg", TASKS[0]), (tiny.picture(), "make it winter"), (TASKS[0], tiny.picture())]
)
def test_what_is_no_picture_or_no_question_is_refused(pipe, image, task):
    with pytest.raises(TypeError, match="`image` must be a PIL picture and `task` a task such as"):
        ask(pipe, image, task)


def test_a_resolution_of_zero_keeps_the_pictures_own_size(pipe):
    answer = ask(pipe, tiny.picture(width=50, height=34), TASKS[2], resolution=0, generator=tiny.generator(), **FAST)
    assert answer.box == (0, 0, 50, 34)
