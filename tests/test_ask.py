import random
from importlib import import_module

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler
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
)
from instructdiffusion_pipeline.ask import (
    Response,
    View,
    centrality,
    close_up,
    combine_views,
    confirm_regions,
    new_regions,
    slice_boxes,
    view_margins,
)
from instructdiffusion_pipeline.tasks.segmentation import masks_from_margins

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
    with pytest.raises(ValueError, match="the same settings, but those of keypoints and segmentation differ"):
        ask_batch(pipe, [image, image], TASKS[:2], ["a", "b"])


@pytest.mark.parametrize(
    "image, task", [("photo.jpg", TASKS[0]), (tiny.picture(), "make it winter"), (TASKS[0], tiny.picture())]
)
def test_arguments_of_wrong_types_raise_errors(pipe, image, task):
    with pytest.raises(TypeError, match="`image` must be a PIL image and `task` a task such as"):
        ask(pipe, image, task)


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


@pytest.mark.parametrize("size", [(100, 60), (33, 47)])
def test_slices_cover_the_image(size):
    boxes = slice_boxes(size, 0.56)
    seen = np.zeros(size[::-1], int)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == tuple(round(0.56 * side) for side in size)
        seen[top:bottom, left:right] += 1
    assert len(boxes) == 9 and seen.min() == 1 and seen.max() == 9


@pytest.mark.parametrize("size, center", [((100, 100), (30, 30)), ((160, 100), (122, 74)), ((100, 160), (26, 122))])
def test_an_object_in_half_of_the_slices_is_found(size, center):
    """Outputs are drawn: only those of slices that contain the whole disc paint it."""
    image, task = Image.new("RGB", size, (90, 90, 90)), Segmentation({"ball": "red"})
    y, x = np.mgrid[: size[1], : size[0]]
    ball = (x - center[0]) ** 2 + (y - center[1]) ** 2 <= 8**2
    whole = View(0, task, "", image, (0, 0)), Response(image, None, (0, 0, *size), False)
    sliced = []
    for left, top, right, bottom in slice_boxes(image.size, 0.56):
        crop, part = image.crop((left, top, right, bottom)), ball[top:bottom, left:right]
        answer = task.draw(crop, {"ball": part}) if part.sum() == ball.sum() else crop
        sliced.append((View(0, task, "", crop, (left, top)), Response(answer, None, (0, 0, *crop.size), False)))
    found = masks_from_margins(combine_views(view_margins(*whole, None), sliced, None))["ball"]
    assert (found.pixels & ball).sum() / (found.pixels | ball).sum() > 0.9
    assert not masks_from_margins(combine_views(view_margins(*whole, None), [], None))["ball"].pixels.any()


def test_a_slice_has_a_lower_weight_at_edges_inside_the_image():
    image, task = Image.new("RGB", (100, 80)), Segmentation({"ball": "red"})
    corner = centrality(View(0, task, "", image.crop((0, 0, 56, 44)), (0, 0)), image.size)
    assert corner.shape == (44, 56) and corner[0, 0] == corner[10, 10] == 1 and corner.min() == np.float32(0.1)
    assert corner[-1, 0] == corner[0, -1] == np.float32(0.1) and corner[43 - 10, 0] == pytest.approx(0.5)
    middle = centrality(View(0, task, "", image.crop((20, 20, 64, 64)), (20, 20)), image.size)
    assert np.array_equal(middle, middle.T) and np.array_equal(middle, middle[::-1, ::-1]) and middle[22, 22] == 1


def test_new_regions_are_connected_parts_not_next_to_the_known_mask():
    pixels, known = np.zeros((2, 300, 200), bool)
    pixels[10:40, 10:40] = pixels[100:120, 100:140] = pixels[200:290, 20:25] = pixels[250, 150] = True
    known[10:40, 30:60] = True
    only, regions = new_regions(pixels, known)
    assert regions[0].sum() == 800 and regions[1][10:40, 10:40].sum() == regions[1].sum() and regions[2].sum() == 450
    assert only[250, 150] and not any(region[250, 150] for region in regions), "too small"
    assert not only[10:40, 30:40].any() and not (only & ~pixels).any() and only[10:40, 10:24].all()
    assert regions[0][100:120, 100:140].all() and not regions[0][:100].any()
    nothing, none = new_regions(np.zeros((5, 5), bool), np.zeros((5, 5), bool))
    assert not nothing.any() and none == []


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("rows, columns", [((0, 10), (0, 20)), ((90, 100), (60, 80)), ((50, 60), (70, 90))])
def test_close_ups_are_squares_inside_the_image_around_the_region(rows, columns, share):
    region = np.zeros((100, 200), bool)
    region[slice(*rows), slice(*columns)] = True
    left, top, right, bottom = close_up(region, share)
    assert right - left == bottom - top == round(20 / share)
    assert left >= 0 and right <= 200 and top >= 0 and bottom <= 100
    assert top <= rows[0] and bottom >= rows[1] and left <= columns[0] and right >= columns[1]


def test_close_ups_have_a_minimum_size_and_fit_into_the_image():
    region = np.zeros((100, 200), bool)
    region[50, 100] = True
    left, top, right, bottom = close_up(region, 0.5)
    assert right - left == bottom - top == 15 and region[top:bottom, left:right].any()
    assert close_up(np.ones((100, 200), bool), 0.5) == (50, 0, 150, 100)


@pytest.mark.parametrize("marks, kept", [(3, True), (2, True), (1, False), (0, False)])
def test_close_ups_confirm_a_region_by_majority(monkeypatch, marks, kept):
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    y, x = np.mgrid[:100, :100]
    ball = (x - 30) ** 2 + (y - 40) ** 2 <= 8**2
    view, calls = View(0, task, "", image, (0, 0)), []

    def run_views(pipeline, views, **settings):
        calls.append([view.image.size for view in views])
        answers = []
        for number, view in enumerate(views):
            left, top = view.offset
            part = ball[top : top + view.image.height, left : left + view.image.width]
            shown = task.draw(view.image, {"ball": part}) if number < marks else view.image
            answers.append(Response(shown, None, (0, 0, *view.image.size), False))
        return answers

    monkeypatch.setattr(import_module("instructdiffusion_pipeline.ask"), "run_views", run_views)
    first = np.full((100, 100), -0.5)
    rough = np.where((x > 24) & (x < 38) & (y > 34) & (y < 46), 0.4, -0.5)
    found = Mask.from_margin(confirm_regions(None, view, "ball", first, rough, None, {})).pixels
    assert calls == [[(43, 43), (29, 29), (22, 22)]]
    assert found.any() == kept and (not kept or (found & ball).sum() / (found | ball).sum() > 0.9)
    known = confirm_regions(None, view, "ball", rough, rough, None, {})
    assert np.array_equal(known, rough) and len(calls) == 1, (
        "regions in the output for the whole image are not cropped"
    )


def test_with_slices_the_model_is_also_run_on_slices_and_crops(pipe):
    calls = []
    answer = ask(
        pipe, tiny.picture(), TASKS[0], slices=0.56, generator=tiny.generator(),
        callback_on_step_end=lambda pipe, step, t, tensors: calls.append(len(tensors["latents"])) or {}, **FAST
    )  # fmt: skip
    assert calls == [1, 1, 8, 8, 1, 1] and answer.data["cat"].pixels.shape == (32, 32)
    for slices, task, message in (
        (1.0, TASKS[0], "0.1 to below 1; got 1.0"),
        (0.5, TASKS[1], "must be None for tasks other than segmentation; got keypoints"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(pipe, tiny.picture(), task, slices=slices)


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
    ):
        (answer,) = ask_boxes(pipe, image, task, given, generator=torch.Generator().manual_seed(0), **FAST)
        assert answer.box == answers[0].box and answer.data == answers[0].data
    with pytest.raises(ValueError, match="with an area"):
        ask_boxes(pipe, image, task, [(5, 5, 5, 9)])
    with pytest.raises(ValueError, match=r"with values from -480 to 480 \(four times the longer side"):
        ask_boxes(pipe, image, task, [(5, 5, 10, 481)])
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


def test_a_slice_that_the_safety_checker_replaced_flags_the_answer(pipe):
    parts = tiny.safety_checker(1)
    checker = FlagsLaterCalls(parts["safety_checker"].config)
    guarded = InstructDiffusionPipeline(**pipe.components | parts | {"safety_checker": checker})
    guarded.set_progress_bar_config(disable=True)
    for slices, flagged in ((None, False), (0.7, True)):
        checker.calls = 0
        answer = ask(guarded, tiny.picture(), TASKS[0], slices=slices, generator=tiny.generator(), **FAST)
        assert answer.nsfw_content_detected == flagged
