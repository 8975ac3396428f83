"""Run a pipeline for a vision task and decode its output image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from instructdiffusion_pipeline.calibration import Platt, calibrate_answer
from instructdiffusion_pipeline.pipeline_instruct_diffusion import (
    DEFAULT_SETTINGS,
    Box,
    InstructDiffusionPipeline,
    is_text,
    upright_rgb,
)
from instructdiffusion_pipeline.readout import read_answer
from instructdiffusion_pipeline.slices import segment_slices
from instructdiffusion_pipeline.tasks import PictureTask, Task, call_settings
from instructdiffusion_pipeline.tasks.keypoints import BOX_PADDING, Keypoints, draw_marks
from instructdiffusion_pipeline.tasks.segmentation import Segmentation, masks_from_margins, prompted_tasks
from instructdiffusion_pipeline.types import Joint
from instructdiffusion_pipeline.views import (
    Response,
    View,
    check_lengths,
    for_images,
    run_views,
    view_margins,
)

Reading = TypeVar("Reading")


@dataclass(frozen=True, eq=False)
class Answer(Generic[Reading]):
    """The output of the pipeline for a task, and the data decoded from it.

    Attributes:
        task: the task.
        image: the input, RGB, upright.
        instruction: the prompt; for a segmentation of several objects, one line for each prompt.
        picture: the output image, in input pixels. It shows the region `box` of the input. For a segmentation of
            several objects, the output images are combined: each object is copied from its own output.
        box: (left, top, right, bottom) in pixels of the input: all of it, or the center with `resize_mode="crop"`.
        data: the decoded output, in pixels of the input; its type depends on the task: `dict[str, Mask]` for
            `Segmentation`, `dict[str, Joint | None]` for `Keypoints` (None: not found), an image at the resolution of
            the input for `Restoration` and `Editing`.
        nsfw_content_detected: whether the safety checker replaced an output, for the image or for one of its
            slices, by a black image; `data` is then meaningless.
        reconstruction: the input after encoding and decoding by the VAE, at working size, for a task whose data is an
            image; otherwise None.
        outputs: the task and the output image of each prompt, at working size. A segmentation of several objects has
            one task per object.
    """

    task: Task[Reading]
    image: Image.Image
    instruction: str
    picture: Image.Image
    box: Box
    data: Reading
    nsfw_content_detected: bool = False
    reconstruction: Image.Image | None = None
    outputs: Sequence[tuple[Task[Reading], Image.Image]] = ()

    @property
    def overlay(self) -> Image.Image:
        """The decoded data drawn on the input."""
        return self.task.overlay(self.image, self.data)


def draw_overlay(answers: Sequence[Answer[Any]]) -> Image.Image:
    """The decoded data of several answers for one image, drawn on it."""
    overlay, marks = answers[0].image, []
    for answer in answers:
        if isinstance(answer.task, Keypoints):
            marks += answer.task.marks(answer.data)
        else:
            overlay = answer.task.overlay(overlay, answer.data)
    return draw_marks(overlay, marks) if marks else overlay


def ask(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Task[Reading],
    instruction: str | None = None,
    use_readout: bool = True,
    slices: float | None = None,
    **settings: Any,
) -> Answer[Reading]:
    """Run `task` on `image` and decode the output.

    The whole image is used (`resize_mode="stretch"`), and the data is at the resolution of the image. A segmentation
    of several objects uses one prompt for each object, all in one call of the pipeline, because the models were
    trained on prompts with one object.

    Args:
        pipeline: an `InstructDiffusionPipeline`.
        image: PIL image of any mode and size.
        task: the task, for example `Segmentation({"cat": "blue"})`.
        instruction: the prompt; by default that of the task. If given, a segmentation of several objects uses this
            prompt alone.
        use_readout: whether to use the pipeline's `readout`, if it has one, to decode masks and keypoints. If False,
            outputs are decoded by color; if the pipeline has a readout, the scores are then not calibrated.
        slices: for segmentation of small objects: the model is also run on overlapping slices of the image, whose
            sides are this fraction of the image's sides, and the masks are combined. With 0.56 there are nine slices
            per object, so the computation is ten times as large. The model is also run on three crops around each
            region that only the slices mark, and around a small mask of the whole image that no slice confirms.
        settings: arguments of the pipeline's `__call__`. They override the model's own settings
            (`pipeline.config.task_settings[task.family]`), which override those of the task.

    Raises:
        TypeError, ValueError: see `ask_batch`.

    Example:
        ```python
        answer = ask(pipe, image, Segmentation({"sunflower": "blue"}), generator=torch.manual_seed(0))
        print(answer.data["sunflower"].box)
        answer.overlay.save("overlay.png")
        ```
    """
    return ask_batch(pipeline, [image], [task], [instruction], use_readout, slices, **settings)[0]


def ask_boxes(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Keypoints,
    boxes: Sequence[Box] | np.ndarray | torch.Tensor,
    instruction: str | None = None,
    batch_size: int = 8,
    **settings: Any,
) -> list[Answer[dict[str, Joint | None]]]:
    """Run `task` on each person of an image: on the part of the image around the person's box.

    As in the evaluation of the paper, the part is a square with 1.25 times the longer side of the box. The area
    outside the image is black.

    Args:
        pipeline, image, task, instruction: as in `ask`.
        boxes: (left, top, right, bottom) of each person, in pixels of `image`; also an array or tensor [N, 4].
        batch_size: boxes per call of the pipeline.
        settings: as in `ask`. `generator`, `negative_prompt` and `negative_prompt_embeds` may have one entry, or one
            for each box.

    Returns:
        An answer for each box. Its `data` is in pixels of `image`; its `box` is the part around the person.

    Raises:
        TypeError, ValueError: see `ask_batch`; also if a box has no area or is outside the image, or `task` is not a
            `Keypoints`.
    """
    if not isinstance(task, Keypoints):
        raise TypeError(f"`task` must be Keypoints; got {type(task).__name__}.")
    if not isinstance(image, Image.Image):
        raise TypeError(f"`image` must be a PIL image; got {type(image).__name__}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1; got {batch_size!r}.")
    boxes = boxes.tolist() if isinstance(boxes, torch.Tensor) else boxes
    if not isinstance(boxes, Sequence | np.ndarray):
        raise TypeError(f"`boxes` must be a list, an array or a tensor; got {type(boxes).__name__}.")
    image = upright_rgb(image)
    regions = [padded_square(box, image.size) for box in boxes]
    check_lengths(settings, len(regions), "box")
    answers: list[Answer[dict[str, Joint | None]]] = []
    for start in range(0, len(regions), batch_size):
        chunk = regions[start : start + batch_size]
        batch = for_images(settings, range(start, start + len(chunk)))
        crops = [image.crop(region) for region in chunk]
        answered = ask_batch(pipeline, crops, [task] * len(chunk), [instruction] * len(chunk), **batch)
        for region, answer in zip(chunk, answered, strict=True):
            joints = {
                name: joint and joint._replace(x=joint.x + region[0], y=joint.y + region[1])
                for name, joint in answer.data.items()
            }
            answers.append(replace(answer, image=image, box=region, data=joints))
    return answers


def padded_square(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square of whole pixels with the center of a box and `BOX_PADDING` times its longer side.

    Raises a ValueError if the box or the square has no area in an image of `size`, or the box has an edge so far
    outside that the square would be huge.
    """
    limit = 4 * max(size)
    is_box = (
        isinstance(box, Sequence | np.ndarray)
        and len(box) == 4
        and all(isinstance(edge, Real) and -limit <= edge <= limit for edge in box)
    )
    if not is_box or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(
            "`boxes` must have entries (left, top, right, bottom) with an area, with values from"
            f" {-limit:g} to {limit:g} (four times the longer side of the image); got {box!r}."
        )
    left, top, right, bottom = map(float, box)  # NumPy's unsigned integers would wrap around
    side = max(1, round(BOX_PADDING * max(right - left, bottom - top)))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    # The square of a box that reaches less than a pixel into the image can be outside, because it is rounded.
    if min(right, x + side, bottom, y + side) <= 0 or max(left, x) >= size[0] or max(top, y) >= size[1]:
        raise ValueError(
            f"`boxes` must be in the image of {size[0]} x {size[1]} pixels, at least in part; got {box!r}."
        )
    return x, y, x + side, y + side


@torch.no_grad()
def ask_batch(
    pipeline: InstructDiffusionPipeline,
    images: Sequence[Image.Image],
    tasks: Sequence[Task[Reading]],
    instructions: Sequence[str | None] | None = None,
    use_readout: bool = True,
    slices: float | None = None,
    **settings: Any,
) -> list[Answer[Reading]]:
    """`ask` for several images of one working size in one call of the pipeline.

    Raises:
        TypeError: an argument has a wrong type, such as an element of `images` that is not a PIL image.
        ValueError: there are no images; the numbers of images, tasks and instructions differ; the settings of the
            tasks differ; `slices` is out of range, or used with a task other than `Segmentation` or with
            `resolution=0`; or `settings` contains an argument that `ask` sets itself, such as `prompt`.
    """
    given = {"images": images, "tasks": tasks} | ({} if instructions is None else {"instructions": instructions})
    for name, values in given.items():
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"`{name}` must be a list; got {type(values).__name__}.")
    instructions = [None] * len(tasks) if instructions is None else instructions
    check_questions(pipeline, images, tasks, instructions, use_readout, slices, settings)
    own = [settings_of(pipeline, task) for task in tasks]
    if any(other != own[0] for other in own):
        families = " and ".join(sorted({task.family for task in tasks}))
        raise ValueError(
            f"`tasks` must have the same settings, but those of {families} differ. Pass them in separate calls."
        )
    if settings.get("timesteps") is not None or settings.get("sigmas") is not None:
        own[0].pop("num_inference_steps", None)
    # None stands for the default of the task, not for that of `__call__`, which is "editing".
    of_tasks = {*DEFAULT_SETTINGS, "resolution"}
    settings = {name: value for name, value in settings.items() if value is not None or name not in of_tasks}
    settings = own[0] | settings | size_settings(pipeline, tasks[0], settings)
    readout = pipeline.readout if use_readout else None
    images = [upright_rgb(image) for image in images]

    # One prompt for each object of a segmentation.
    views = [
        View(number, part, part.instruction() if words is None else words, image, (0, 0))
        for number, (image, task, words) in enumerate(zip(images, tasks, instructions, strict=True))
        for part in (prompted_tasks(task) if words is None else [task])
    ]
    responses = run_views(pipeline, views, **settings)
    answers = []
    for number, (image, task) in enumerate(zip(images, tasks, strict=True)):
        own_views = [pair for pair in zip(views, responses, strict=True) if pair[0].number == number]
        answers.append(make_answer(pipeline, image, task, own_views, readout, slices, settings))
    return answers


def make_answer(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Task[Reading],
    views: Sequence[tuple[View, Response]],
    readout: UNet2DModel | None,
    slices: float | None,
    settings: dict[str, Any],
) -> Answer[Reading]:
    """Decode the outputs for the `views` of one image. `settings` are used for its slices."""
    (_, response), *others = views
    box, flag = response.box, any(response.flag for _, response in views)
    size = (round(box[2] - box[0]), round(box[3] - box[1]))
    picture = response.picture.resize(size, Image.Resampling.LANCZOS)
    data: Any
    if isinstance(task, Segmentation):
        margins = {name: margin for pair in views for name, margin in view_margins(*pair, readout).items()}
        if slices:
            run = partial(run_views, pipeline, **settings)
            margins, sliced_flag = segment_slices(run, [view for view, _ in views], margins, slices, readout)
            flag = flag or sliced_flag
        data = masks_from_margins(margins)
        for view, other in others:
            (name,) = cast(Segmentation, view.task).colors
            mask = Image.fromarray(data[name].pixels).resize(size, Image.Resampling.NEAREST, box)
            picture.paste(other.picture.resize(size, Image.Resampling.LANCZOS), mask=mask)
    elif isinstance(task, PictureTask) and response.reconstruction is not None:
        data = task.transfer(image, response.reconstruction, response.picture, box)
    else:
        data = read_answer(task, image, response.picture, box, readout)
    calibrations = pipeline.config.get("score_calibration") or {}
    # A calibration was fitted to the scores of the pipeline's own readout, if it has one.
    if task.family in calibrations and readout is pipeline.readout:
        data = calibrate_answer(data, Platt(*calibrations[task.family]))
    prompt = "\n".join(view.prompt for view, _ in views)
    outputs = [(view.task, part.picture) for view, part in views]
    return Answer(task, image, prompt, picture, box, data, flag, response.reconstruction, outputs)


def settings_of(pipeline: InstructDiffusionPipeline, task: Task[Any] | type[Task[Any]]) -> dict[str, Any]:
    """The default call arguments of `ask`: those of the task or its class, overridden by the model's."""
    return call_settings(task, pipeline.config.task_settings)


def size_settings(
    pipeline: InstructDiffusionPipeline, task: Task[Any] | type[Task[Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The `resolution` and `resize_mode` of a task: those in `settings`, or else the model's, or else `ask`'s.

    They determine the working size of an image: `pipeline.working_size(*image.size, **size_settings(...))`.
    """
    settings = {**settings_of(pipeline, task), **settings}
    resolution = settings["resolution"] if "resolution" in settings else pipeline.task_resolution(task.family)
    return {"resolution": resolution, "resize_mode": settings.get("resize_mode", "stretch")}


def check_questions(
    pipeline: InstructDiffusionPipeline,
    images: Sequence[Image.Image],
    tasks: Sequence[Task],
    instructions: Sequence[str | None],
    use_readout: bool,
    slices: float | None,
    settings: dict[str, Any],
) -> None:
    """Raise a TypeError or ValueError if an argument of `ask_batch` is invalid."""
    # Compared by name, because a pipeline loaded with `trust_remote_code=True` has the class in its folder's file.
    if all(base.__name__ != InstructDiffusionPipeline.__name__ for base in type(pipeline).__mro__):
        raise TypeError(f"`pipeline` must be an InstructDiffusionPipeline; got {type(pipeline).__name__}.")
    if not isinstance(use_readout, bool):
        raise TypeError(f"`use_readout` must be True or False; got {type(use_readout).__name__}.")
    if not len(images) == len(tasks) == len(instructions) > 0:
        raise ValueError(
            "`images`, `tasks` and `instructions` must have the same length, at least one; got"
            f" {len(images)}, {len(tasks)} and {len(instructions)}."
        )
    for image, task in zip(images, tasks, strict=True):
        if not isinstance(image, Image.Image) or not hasattr(task, "read"):
            raise TypeError(
                "`image` must be a PIL image and `task` a task such as Segmentation({'cat': 'red'}); got"
                f" {type(image).__name__} and {type(task).__name__}."
            )
    for words in instructions:
        if not (words is None or isinstance(words, str)):
            raise TypeError(f"`instruction` must be a text or None; got {type(words).__name__}.")
        if not (words is None or is_text(words)):
            raise ValueError(f"`instruction` must not have unpaired surrogates; got {words!r}.")
    check_lengths(settings, len(images), "image")
    if fixed := settings.keys() & {"prompt", "image", "output_type", "return_dict", "num_images_per_prompt"}:
        raise ValueError(f"`settings` must not contain {', '.join(sorted(fixed))}, which `ask` sets itself.")
    if slices is not None:
        if not isinstance(slices, Real) or not 0.1 <= slices < 1:
            raise ValueError(
                f"`slices`, a fraction of the image's sides, must be from 0.1 to below 1; got {slices!r}."
            )
        if others := {task.family for task in tasks if not isinstance(task, Segmentation)}:
            raise ValueError(
                f"`slices` must be None for tasks other than segmentation; got {', '.join(sorted(others))}."
            )
        if settings.get("resolution") == 0:
            raise ValueError("`resolution` must not be 0 with `slices`, which are enlarged to the working size.")
