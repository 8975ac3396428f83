import random

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from instructdiffusion_pipeline import (
    Editing,
    InstructDiffusionPipeline,
    Keypoints,
    Mask,
    Restoration,
    Segmentation,
    ask,
    ask_batch,
    ask_boxes,
    joint_tasks,
)
from instructdiffusion_pipeline.ask import Answer, draw_overlay
from instructdiffusion_pipeline.tasks.segmentation import masks_from_margins
from instructdiffusion_pipeline.types import Joint

FAST = {"num_inference_steps": 2}
TASKS = [Segmentation({"cat": "red"}), Keypoints({"nose": "blue"}), Restoration("noise"), Editing("make it winter")]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_each_family_returns_its_type_of_data_in_pixels_of_the_input(pipe, task):
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


def test_the_prompt_and_the_output_are_those_of_the_pipeline(pipe):
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


def test_a_given_instruction_and_settings_override_the_defaults(pipe):
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


def test_a_batch_has_an_answer_for_each_task(pipe):
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
def test_settings_that_ask_sets_itself_raise_errors(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(pipe, tiny.picture(), TASKS[0], **settings)


def test_inconsistent_batches_raise_errors(pipe):
    image = tiny.picture()
    with pytest.raises(ValueError, match="must have the same length, at least one; got 1, 1 and 0"):
        ask_batch(pipe, [image], [TASKS[0]], [])
    with pytest.raises(TypeError, match="`instructions` must be a list; got str"):
        ask_batch(pipe, [image, image], [TASKS[0], TASKS[0]], "up")
    with pytest.raises(ValueError, match="the same settings, but those of keypoints and segmentation differ"):
        ask_batch(pipe, [image, image], TASKS[:2], ["a", "b"])


@pytest.mark.parametrize("task", [*TASKS, Restoration("blur"), Restoration("watermark")], ids=repr)
def test_decoding_does_not_depend_on_the_default_device_and_dtype_of_torch(task):
    image, changed = tiny.picture(48, 40, 1), tiny.picture(48, 40, 2)

    def decode():
        if hasattr(task, "transfer"):
            return task.transfer(image, image, changed).tobytes()
        return repr(task.read(image, changed))

    expected = decode()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert decode() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "image, task", [("photo.jpg", TASKS[0]), (tiny.picture(), "make it winter"), (TASKS[0], tiny.picture())]
)
def test_arguments_of_wrong_types_raise_errors(pipe, image, task):
    with pytest.raises(TypeError, match="`image` must be a PIL image and `task` a task such as"):
        ask(pipe, image, task)


def test_another_pipeline_raises_an_error(pipe):
    other = StableDiffusionInstructPix2PixPipeline.from_pipe(pipe, requires_safety_checker=False)
    for wrong in (other, pipe.unet, None):
        with pytest.raises(TypeError, match=f"must be an InstructDiffusionPipeline; got {type(wrong).__name__}"):
            ask(wrong, tiny.picture(), TASKS[0])


def test_a_subclass_of_the_pipeline_is_accepted(pipe):
    class Own(InstructDiffusionPipeline):
        pass

    own = Own(**pipe.components)
    own.set_progress_bar_config(disable=True)
    assert ask(own, tiny.picture(), TASKS[0], **FAST).image.size == tiny.picture().size


@pytest.mark.parametrize("names", [[], ["nose", "nose"], "nose", [f"joint {n}" for n in range(5)] + ["joint 0"]])
def test_names_of_joint_tasks_are_checked(names):
    with pytest.raises(ValueError, match="`names` must be a list of different names, at least one; got"):
        joint_tasks(tiny.picture(), names)


def test_a_resolution_of_zero_keeps_the_image_size(pipe):
    answer = ask(pipe, tiny.picture(width=50, height=34), TASKS[2], resolution=0, generator=tiny.generator(), **FAST)
    assert answer.box == (0, 0, 50, 34)


def test_a_wide_image_is_used_completely(pipe):
    """A change at the rim changes the output, but not with "crop"."""
    wide = tiny.picture(width=100, height=64)
    changed = wide.copy()
    changed.paste("red", (0, 0, 16, 64))

    def picture(image, **settings):
        return np.asarray(ask(pipe, image, TASKS[0], generator=tiny.generator(), **settings, **FAST).picture)

    assert not np.array_equal(picture(wide), picture(changed))
    with pytest.warns(UserWarning, match="cuts off 36% of the image"):
        cropped = picture(wide, resize_mode="crop", resolution=64)
    assert np.array_equal(cropped, picture(changed, resize_mode="crop", resolution=64))


def test_each_of_several_objects_has_a_prompt_in_one_call(pipe):
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


def test_a_pixel_of_two_objects_belongs_to_the_one_with_the_higher_margin():
    cat, dog = np.full((4, 4), -0.5, np.float32), np.full((4, 4), -0.5, np.float32)
    cat[:, :3], dog[:, 2:] = 0.3, 0.5
    masks = masks_from_margins({"cat": cat, "dog": dog})
    assert masks["cat"].pixels[:, :2].all() and not masks["cat"].pixels[:, 2:].any()
    assert masks["dog"].pixels[:, 2:].all() and not masks["dog"].pixels[:, :2].any()
    equal = masks_from_margins({"dog": dog, "cat": dog})
    assert np.array_equal(equal["dog"].pixels, dog > 0) and not equal["cat"].pixels.any(), "the first one"


def test_traces_that_are_too_weak_for_a_mask_take_no_pixels_from_other_objects():
    cat, dog = np.full((4, 4), -0.5, np.float32), np.full((4, 4), -0.5, np.float32)
    dog[:, 2:] = 0.2
    cat[:, 2], cat[:, :2] = 0.25, 0.05
    masks = masks_from_margins({"cat": cat, "dog": dog})
    assert not masks["cat"].pixels.any() and masks["cat"].score == 0
    assert np.array_equal(masks["dog"].pixels, dog > 0)


def test_result_images_have_the_resolution_of_the_input(pipe):
    """If the output is the input's own latents, nothing has changed."""
    image = tiny.picture(width=150, height=100)

    def unchanged(pipe, step, timestep, tensors):
        return {"latents": tensors["image_latents"] * pipe.vae.config.scaling_factor}

    answer = ask(pipe, image, TASKS[3], generator=tiny.generator(), callback_on_step_end=unchanged,
                 callback_on_step_end_tensor_inputs=["image_latents"], **FAST)  # fmt: skip
    assert np.array_equal(answer.data, image) and not np.array_equal(answer.picture, image)


def test_joints_of_each_box_are_in_pixels_of_the_image(pipe):
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
    for given in (
        np.array(boxes[:1]),
        [np.array(boxes[0], dtype=np.float32)],
        [list(boxes[0])],
        np.array(boxes[:1]) / 1.0,
        torch.tensor(boxes[:1]),
        torch.tensor(boxes[:1], dtype=torch.float32),
        *(np.array(boxes[:1], dtype=kind) for kind in (np.uint8, np.uint16, np.uint32)),
    ):
        (answer,) = ask_boxes(pipe, image, task, given, generator=torch.Generator().manual_seed(0), **FAST)
        assert answer.box == answers[0].box and answer.data == answers[0].data
    (named,) = ask_boxes(pipe, image, task, boxes[:1], instruction="show the nose", generator=generators[:1], **FAST)
    assert named.instruction == "show the nose"
    for count in (2, 5):
        with pytest.raises(ValueError, match=rf"`generator` must have one entry, or one per box \(3\); got {count}"):
            ask_boxes(pipe, image, task, boxes, generator=[tiny.generator()] * count, **FAST)
    with pytest.raises(ValueError, match="with an area"):
        ask_boxes(pipe, image, task, [(5, 5, 5, 9)])
    with pytest.raises(ValueError, match=r"with values from -480 to 480 \(four times the longer side"):
        ask_boxes(pipe, image, task, [(5, 5, 10, 481)])
    # The last ones are not outside, but the pixels of their squares are.
    for outside in (
        (-30, 5, -20, 20), (120, 5, 130, 20), (5, -9, 20, 0), (5, 90, 20, 99),
        (-0.1, 5, 0.05, 5.1), (5, -0.1, 5.1, 0.05), (119.9, 5, 121.9, 7), (5, 89.9, 7, 91.9),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"`boxes` must be in the image of 120 x 90 pixels, at least in part"):
            ask_boxes(pipe, image, task, [outside])
    (tiny_box,) = ask_boxes(pipe, image, task, [(10, 10, 10.1, 10.1)], **FAST)
    assert tiny_box.box == (10, 10, 11, 11)
    with pytest.raises(TypeError, match="`task` must be Keypoints; got Segmentation"):
        ask_boxes(pipe, image, TASKS[0], boxes)


def test_settings_of_each_image_are_used_for_all_its_views(pipe):
    images = [tiny.picture(seed=seed) for seed in range(2)]
    tasks = [Segmentation({"cat": "red", "dog": "blue"}), Segmentation({"owl": "green", "bell": "white"})]
    words = ["fog", "rain"]
    generators = [tiny.generator(seed) for seed in range(2)]
    together = ask_batch(pipe, images, tasks, negative_prompt=words, generator=generators, slices=0.7, **FAST)
    for number, answer in enumerate(together):
        alone = {"negative_prompt": [words[number]], "generator": [tiny.generator(number)]}
        expected = ask(pipe, images[number], tasks[number], slices=0.7, **alone, **FAST)
        # Sums in batches of other sizes have other rounding errors.
        difference = np.asarray(answer.picture, float) - np.asarray(expected.picture, float)
        assert np.abs(difference).mean() < 0.5
        assert all((answer.data[name].pixels != expected.data[name].pixels).mean() < 0.01 for name in answer.data)


def test_a_list_of_one_generator_is_used_for_all_images(pipe):
    images, tasks = [tiny.picture(seed=seed) for seed in range(2)], [TASKS[3]] * 2
    answers = ask_batch(pipe, images, tasks, generator=[tiny.generator()], **FAST)
    assert len(answers) == 2


def test_each_box_has_its_own_negative_prompt(pipe):
    image, task, boxes = tiny.picture(width=120, height=90), TASKS[1], [(10, 20, 42, 44), (70, 5, 118, 85)]
    with pytest.raises(ValueError, match=r"`negative_prompt` must have one entry, or one per image \(1\); got 2"):
        ask(pipe, image, task, negative_prompt=["fog", "rain"])
    answers = ask_boxes(
        pipe, image, task, boxes, batch_size=1, negative_prompt=["", "rain"], generator=tiny.generator(), **FAST
    )
    generator = tiny.generator()
    ask(pipe, image.crop(answers[0].box), task, generator=generator, **FAST)
    expected = ask(pipe, image.crop(answers[1].box), task, negative_prompt="rain", generator=generator, **FAST)
    assert np.array_equal(answers[1].picture, expected.picture)


@pytest.mark.parametrize("schedule", [{"timesteps": [900, 500, 100]}, {"sigmas": [9.0, 3.0, 0.5, 0.0]}], ids=list)
def test_a_schedule_replaces_the_steps_of_the_task(pipe, schedule):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    answer = ask(pipe, tiny.picture(), TASKS[0], generator=tiny.generator(), **schedule)
    assert pipe.num_timesteps == 3 and "cat" in answer.data
    with pytest.raises(ValueError, match="Exactly one of `num_inference_steps`, `timesteps` and `sigmas`"):
        ask(pipe, tiny.picture(), TASKS[0], num_inference_steps=3, **schedule)


class FlagsLaterCalls(StableDiffusionSafetyChecker):
    """Replaces all images from the second call on, which are those of the slices."""

    calls = 0

    def forward(self, clip_input, images):
        self.calls += 1
        flagged = self.calls > 1
        return images * (not flagged), [flagged] * len(images)


def test_labels_of_several_answers_do_not_overlap():
    """Each person and each group of five joints has an answer of its own."""
    image, joints = Image.new("RGB", (240, 120)), [Joint(100, 60, 0.5), Joint(110, 60, 0.5)]
    tasks = [Keypoints({"nose": "red"}), Keypoints({"left eye": "red"})]
    answers = [
        Answer(task, image, "", image, (0, 0, 240, 120), {name: joint})
        for task, joint in zip(tasks, joints, strict=True)
        for name in task.colors
    ]
    text = [
        np.asarray(overlay).min(-1) > 100 for overlay in (*(one.overlay for one in answers), draw_overlay(answers))
    ]
    assert (text[0] & text[1]).any(), "they would overlap"
    assert text[2].sum() == text[0].sum() + text[1].sum() > 100


def test_a_slice_that_the_safety_checker_replaced_flags_the_answer(pipe):
    parts = tiny.safety_checker(1)
    checker = FlagsLaterCalls(parts["safety_checker"].config)
    guarded = InstructDiffusionPipeline(**pipe.components | parts | {"safety_checker": checker})
    guarded.set_progress_bar_config(disable=True)
    for slices, flagged in ((None, False), (0.7, True)):
        checker.calls = 0
        answer = ask(guarded, tiny.picture(), TASKS[0], slices=slices, generator=tiny.generator(), **FAST)
        assert answer.nsfw_content_detected == flagged
