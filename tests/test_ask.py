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
    ask_boxes,
)
from instructdiffusion_pipeline.ask import Response, View, combine_views, slice_boxes
from instructdiffusion_pipeline.tasks.segmentation import masks_from_margins

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
    with pytest.raises(ValueError, match="the same settings, but those of keypoints and segmentation differ"):
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


def test_every_part_of_a_wide_picture_is_seen(pipe):
    """What changes at the rim changes the answer; with the crop it does not."""
    wide = tiny.picture(width=100, height=64)
    changed = wide.copy()
    changed.paste("red", (0, 0, 16, 64))

    def picture(image, **settings):
        return np.asarray(ask(pipe, image, TASKS[0], generator=tiny.generator(), **settings, **FAST).picture)

    assert not np.array_equal(picture(wide), picture(changed))
    with pytest.warns(UserWarning, match="cuts off 36% of the picture"):
        cropped = picture(wide, resize_mode="crop", resolution=64)
    assert np.array_equal(cropped, picture(changed, resize_mode="crop", resolution=64))


def test_several_objects_are_asked_about_one_at_a_time_in_one_call(pipe):
    image, task = tiny.picture(width=48, height=32), Segmentation({"cat": "red", "dog": "blue"})
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    steps = []
    answer = ask(
        pipe, image, task, latents=latents, callback_on_step_end=lambda *step: steps.append(step[1]) or {}, **FAST
    )
    assert answer.instruction == "mark the cat in red\nmark the dog in blue" and steps == [0, 1]
    assert not (answer.data["cat"].pixels & answer.data["dog"].pixels).any()
    together = ask(pipe, image, task, instruction="mark both", latents=latents[:1], **FAST)
    assert together.instruction == "mark both"


def test_a_pixel_claimed_twice_goes_to_the_clearer_object():
    cat, dog = np.full((4, 4), -0.5, np.float32), np.full((4, 4), -0.5, np.float32)
    cat[:, :3], dog[:, 2:] = 0.3, 0.5
    masks = masks_from_margins({"cat": cat, "dog": dog})
    assert masks["cat"].pixels[:, :2].all() and not masks["cat"].pixels[:, 2:].any()
    assert masks["dog"].pixels[:, 2:].all() and not masks["dog"].pixels[:, :2].any()


@pytest.mark.parametrize("size", [(100, 60), (33, 47)])
def test_slices_cover_the_picture(size):
    boxes = slice_boxes(size, 0.56)
    seen = np.zeros(size[::-1], int)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == tuple(round(0.56 * side) for side in size)
        seen[top:bottom, left:right] += 1
    assert len(boxes) == 9 and seen.min() == 1 and seen.max() == 9


def test_slices_find_what_half_of_them_see():
    """The answers are drawn: each view paints the disc where it sees all of it; the whole picture paints nothing."""
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    y, x = np.mgrid[:100, :100]
    ball = (x - 30) ** 2 + (y - 30) ** 2 <= 8**2
    whole = [(View(0, task, "", image, (0, 0)), Response(image, None, (0, 0, 100, 100), False))]
    sliced = []
    for left, top, right, bottom in slice_boxes(image.size, 0.56):
        crop, part = image.crop((left, top, right, bottom)), ball[top:bottom, left:right]
        answer = task.draw(crop, {"ball": part}) if part.sum() == ball.sum() else crop
        sliced.append((View(0, task, "", crop, (left, top)), Response(answer, None, (0, 0, *crop.size), False)))
    found = masks_from_margins(combine_views(whole, sliced, None))["ball"]
    assert (found.pixels & ball).sum() / (found.pixels | ball).sum() > 0.9
    assert not masks_from_margins(combine_views(whole, [], None))["ball"].pixels.any()


def test_slices_ask_about_the_parts_too(pipe):
    calls = []
    answer = ask(
        pipe, tiny.picture(), TASKS[0], slices=0.56, generator=tiny.generator(),
        callback_on_step_end=lambda pipe, step, t, tensors: calls.append(len(tensors["latents"])) or {}, **FAST
    )  # fmt: skip
    assert calls == [1, 1, 8, 8, 1, 1] and answer.data["cat"].pixels.shape == (32, 32)
    for slices, task, message in (
        (1.0, TASKS[0], "0.1 to below 1; got 1.0"),
        (0.5, TASKS[1], "only for segmentation tasks; got keypoints"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(pipe, tiny.picture(), task, slices=slices)


def test_pictures_come_back_at_their_own_resolution(pipe):
    """With the input's own latents as the answer nothing has changed."""
    image = tiny.picture(width=150, height=100)

    def unchanged(pipe, step, timestep, tensors):
        return {"latents": tensors["image_latents"] * pipe.vae.config.scaling_factor}

    answer = ask(pipe, image, TASKS[3], generator=tiny.generator(), callback_on_step_end=unchanged,
                 callback_on_step_end_tensor_inputs=["image_latents"], **FAST)  # fmt: skip
    assert np.array_equal(answer.data, image) and not np.array_equal(answer.picture, image)


def test_each_box_is_asked_about_in_pixels_of_the_picture(pipe):
    image, task = tiny.picture(width=120, height=90), Keypoints({"nose": "blue", "left wrist": "red"})
    boxes = [(10, 20, 42, 44), (70, 5, 118, 85), (0, 0, 16, 16)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    answers = ask_boxes(pipe, image, task, boxes, batch_size=2, generator=generators, **FAST)
    assert [answer.box for answer in answers] == [(6, 12, 46, 52), (44, -5, 144, 95), (-2, -2, 18, 18)]
    for seed, answer in enumerate(answers):
        alone = ask(
            pipe, image.crop(answer.box), task, generator=torch.Generator().manual_seed(seed), **FAST
        )  # fmt: skip
        left, top = answer.box[:2]
        for name, joint in alone.data.items():
            found = answer.data[name]
            assert (joint is None) == (found is None)
            assert joint is None or np.allclose((found.x - left, found.y - top), (joint.x, joint.y), atol=0.1)
        assert answer.overlay.size == image.size
    with pytest.raises(ValueError, match="with an area; got"):
        ask_boxes(pipe, image, task, [(5, 5, 5, 9)])
    with pytest.raises(TypeError, match="`task` must be Keypoints; got Segmentation"):
        ask_boxes(pipe, image, TASKS[0], boxes)
