"""Run a pipeline for a vision task and decode its output image."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

from instructdiffusion_pipeline.calibration import Platt, calibrate_answer
from instructdiffusion_pipeline.datasets.keypoints import PADDING
from instructdiffusion_pipeline.pipeline_instruct_diffusion import (
    Box,
    InstructDiffusionPipeline,
    center_crop,
    is_text,
    upright_rgb,
)
from instructdiffusion_pipeline.readout import mask_margins, read_answer
from instructdiffusion_pipeline.tasks import PictureTask, Task
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation, masks_from_margins
from instructdiffusion_pipeline.types import Joint

Reading = TypeVar("Reading")

SLICE_OVERLAP = 0.6  # of neighboring slices, as a fraction of their side
SLICE_BATCH = 8  # slices per call of the pipeline
# If only slices show an object, the model is also run on crops around it, of whose sides it takes up these fractions.
CLOSE_UPS = (0.3, 0.45, 0.6)
CLOSE_UP_SIDE = 0.15  # minimum side of a crop, relative to the image's shorter side
MAX_REGIONS = 3  # per object; the largest ones
MIN_REGION = 0.001  # of the image; smaller regions are dropped
MIN_SEEN = 0.3  # fraction of a region that the output for a crop must mark to confirm it
GRID = 128  # cells along the longer side of the grid in which connected regions are found
# Settings that may be a list or a tensor with one value per image.
PER_PICTURE = {"generator", "negative_prompt", "negative_prompt_embeds"}


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
    """

    task: Task[Reading]
    image: Image.Image
    instruction: str
    picture: Image.Image
    box: Box
    data: Reading
    nsfw_content_detected: bool = False
    reconstruction: Image.Image | None = None

    @property
    def overlay(self) -> Image.Image:
        """The decoded data drawn on the input."""
        return self.task.overlay(self.image, self.data)


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
            per object, so the computation is ten times as large. If only the slices show an object, the model is also
            run on three crops around it, for up to three regions of the image.
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
    boxes: Sequence[Box],
    batch_size: int = 8,
    **settings: Any,
) -> list[Answer[dict[str, Joint | None]]]:
    """Run `task` on each person of an image: on the part of the image around the person's box.

    As in the evaluation of the paper, the part is a square with 1.25 times the longer side of the box. The area
    outside the image is black.

    Args:
        pipeline, image, task, settings: as in `ask`.
        boxes: (left, top, right, bottom) of each person, in pixels of `image`.
        batch_size: boxes per call of the pipeline. `generator` may be one, or a list with one for each box.

    Returns:
        An answer for each box. Its `data` is in pixels of `image`; its `box` is the part around the person.

    Raises:
        TypeError, ValueError: see `ask_batch`; also if a box has no area, or `task` is not a `Keypoints`.
    """
    if not isinstance(task, Keypoints):
        raise TypeError(f"`task` must be Keypoints; got {type(task).__name__}.")
    if not isinstance(image, Image.Image):
        raise TypeError(f"`image` must be a PIL image; got {type(image).__name__}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1; got {batch_size!r}.")
    if not isinstance(boxes, Sequence | np.ndarray):
        raise TypeError(f"`boxes` must be a list or an array; got {type(boxes).__name__}.")
    image = upright_rgb(image)
    regions = [padded_square(box, limit=4 * max(image.size)) for box in boxes]
    answers: list[Answer[dict[str, Joint | None]]] = []
    for start in range(0, len(regions), batch_size):
        chunk = regions[start : start + batch_size]
        batch = for_pictures(settings, range(start, start + len(chunk)))
        crops = [image.crop(region) for region in chunk]
        for region, answer in zip(chunk, ask_batch(pipeline, crops, [task] * len(chunk), **batch), strict=True):
            joints = {
                name: joint and joint._replace(x=joint.x + region[0], y=joint.y + region[1])
                for name, joint in answer.data.items()
            }
            answers.append(replace(answer, image=image, box=region, data=joints))
    return answers


def padded_square(box: Box, limit: float) -> tuple[int, int, int, int]:
    """The square of whole pixels with the center of a box and `PADDING` times its longer side.

    Raises a ValueError if an edge is not from -`limit` to `limit`, which would make a huge square.
    """
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
    left, top, right, bottom = box
    side = round(PADDING * max(right - left, bottom - top))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    return x, y, x + side, y + side


class View(NamedTuple):
    """One input of the pipeline: an image or a slice of it, with the prompt of a task or of one of its objects."""

    number: int  # of the image in the batch
    task: Task
    prompt: str
    image: Image.Image
    offset: tuple[int, int]  # of `image` in the whole image, in pixels


class Response(NamedTuple):
    """The output of the pipeline for a view, at working size; it shows the region `box` of the view's image."""

    picture: Image.Image
    reconstruction: Image.Image | None
    box: Box
    flag: bool


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
            tasks differ; `slices` is out of range, or used with a task other than `Segmentation`; or `settings`
            contains an argument that `ask` sets itself (prompt, image, output_type, ...).
    """
    given = {"images": images, "tasks": tasks} | ({} if instructions is None else {"instructions": instructions})
    for name, values in given.items():
        if not isinstance(values, Sequence):
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
    settings = {"resolution": None, "resize_mode": "stretch"} | own[0] | settings
    readout = pipeline.readout if use_readout else None
    # The calibration was fitted to scores of the pipeline's own readout, if it has one.
    calibrations = (pipeline.config.get("score_calibration") or {}) if readout is pipeline.readout else {}
    images = [upright_rgb(image) for image in images]

    # One prompt for each object, for the whole image and for its slices.
    views = [
        View(number, part, part.instruction() if words is None else words, image, (0, 0))
        for number, (image, task, words) in enumerate(zip(images, tasks, instructions, strict=True))
        for part in (task.split() if isinstance(task, Segmentation) and words is None else [task])
    ]
    responses = run_views(pipeline, views, **settings)
    parts = [
        view._replace(image=view.image.crop(box), offset=box[:2])
        for view in views
        for box in (slice_boxes(view.image.size, slices) if slices else [])
    ]
    part_responses = []
    for start in range(0, len(parts), SLICE_BATCH):
        part_responses += run_views(pipeline, parts[start : start + SLICE_BATCH], **settings)

    answers: list[Answer[Reading]] = []
    for number, (image, task) in enumerate(zip(images, tasks, strict=True)):
        whole = [pair for pair in zip(views, responses, strict=True) if pair[0].number == number]
        sliced = [pair for pair in zip(parts, part_responses, strict=True) if pair[0].number == number]
        (view, response), *_ = whole
        box = response.box
        size = (round(box[2] - box[0]), round(box[3] - box[1]))
        picture = response.picture.resize(size, Image.Resampling.LANCZOS)
        data: Any
        if isinstance(task, Segmentation):
            alone: dict[str, np.ndarray] = {}
            for pair in whole:
                alone |= view_margins(*pair, readout)
            margins = combine_views(alone, sliced, readout)
            if sliced:
                for asked, _ in whole:
                    for name in cast(Segmentation, asked.task).colors:
                        pair = alone[name], margins[name]
                        margins[name] = confirm_regions(pipeline, asked, name, *pair, readout, settings)
            data = masks_from_margins(margins)
            for other, answer in whole[1:]:
                (name,) = cast(Segmentation, other.task).colors
                mask = Image.fromarray(data[name].pixels).resize(size, Image.Resampling.NEAREST, box)
                picture.paste(answer.picture.resize(size, Image.Resampling.LANCZOS), mask=mask)
        elif isinstance(task, PictureTask) and response.reconstruction is not None:
            data = task.transfer(image, response.reconstruction, response.picture, box)
        else:
            data = read_answer(task, image, response.picture, box, readout)
        if task.family in calibrations:
            data = calibrate_answer(data, Platt(*calibrations[task.family]))
        prompt = "\n".join(view.prompt for view, _ in whole)
        if (kept := (box[2] - box[0]) * (box[3] - box[1]) / (image.width * image.height)) < 0.995:
            warnings.warn(f'`resize_mode="crop"` cuts off {1 - kept:.0%} of the image.', stacklevel=2)
        flag = any(answer.flag for _, answer in [*whole, *sliced])
        answers.append(Answer(task, image, prompt, picture, box, data, flag, response.reconstruction))
    return answers


def settings_of(pipeline: InstructDiffusionPipeline, task: Task[Any] | type[Task[Any]]) -> dict[str, Any]:
    """The default call arguments of `ask`: those of the task or its class, overridden by the model's."""
    return {**task.settings, **pipeline.config.task_settings.get(task.family, {})}


def for_pictures(settings: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The settings for the images with these `numbers`.

    Lists and tensors have one value per image, or one for all. A number may occur several times, because an image has
    a view for each object and slice.
    """
    chosen = dict(settings)
    for name in PER_PICTURE & settings.keys():
        values = settings[name]
        if isinstance(values, list):
            chosen[name] = [values[number if len(values) > 1 else 0] for number in numbers]
        elif is_per_picture(values) and len(values) > 1:
            chosen[name] = values[list(numbers)]
    return chosen


def is_per_picture(values: Any) -> bool:
    """Whether the value of a setting in `PER_PICTURE` is a list or tensor of values per image."""
    return isinstance(values, list) or (isinstance(values, torch.Tensor) and values.ndim > 0)


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
    if not isinstance(pipeline, DiffusionPipeline):
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
    for name in sorted(PER_PICTURE):
        value: Any = settings.get(name)
        if is_per_picture(value) and len(value) not in (1, len(images)):
            raise ValueError(f"`{name}` must have one entry, or one per image ({len(images)}); got {len(value)}.")
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


def run_views(
    pipeline: InstructDiffusionPipeline,
    views: Sequence[View],
    resolution: int | None,
    resize_mode: str,
    **settings: Any,
) -> list[Response]:
    """Outputs for all views of one working size in one call of the pipeline."""
    pixels, _ = pipeline.preprocess_image([view.image for view in views], resolution, resize_mode)
    image_latents = pipeline.encode_image_latents(pixels, pipeline._execution_device)
    settings = for_pictures(settings, [view.number for view in views])
    pictures, flags = pipeline([view.prompt for view in views], image_latents, **settings, return_dict=False)
    reconstructions: list[Image.Image] | list[None] = [None] * len(views)
    if any(isinstance(view.task, PictureTask) for view in views):
        reconstructions = decode_pictures(pipeline, image_latents)
    # With "crop", the output shows the center of the image, otherwise all of it.
    crop = resize_mode == "crop" and resolution != 0
    boxes = [center_crop(view.image.size, pictures[0].size if crop else view.image.size) for view in views]
    return [
        Response(*response)
        for response in zip(pictures, reconstructions, boxes, flags or [False] * len(views), strict=True)
    ]


def decode_pictures(pipeline: InstructDiffusionPipeline, image_latents: torch.Tensor) -> list[Image.Image]:
    """Decode image latents (B, C, h, w) to images at working size."""
    decoded = pipeline.decode_latents(image_latents * pipeline.vae.config.scaling_factor)
    sizes = [(decoded.shape[3], decoded.shape[2])] * len(decoded)
    return cast(list[Image.Image], pipeline.postprocess_image(decoded, "pil", sizes, crop=False))


def slice_boxes(size: tuple[int, int], fraction: float) -> list[tuple[int, int, int, int]]:
    """Overlapping slices of an image of (width, height): (left, top, right, bottom) of each."""
    count = math.ceil((1 / fraction - 1) / (1 - SLICE_OVERLAP)) + 1
    width, height = (round(fraction * side) for side in size)
    lefts = np.linspace(0, size[0] - width, count).round().astype(int).tolist()
    tops = np.linspace(0, size[1] - height, count).round().astype(int).tolist()
    return [(left, top, left + width, top + height) for top in tops for left in lefts]


def combine_views(
    whole: Mapping[str, np.ndarray], sliced: Sequence[tuple[View, Response]], readout: UNet2DModel | None
) -> dict[str, np.ndarray]:
    """The margin [height, width] of each object, from those of the whole image and from the outputs for its slices.

    A pixel belongs to an object if it is marked in the output for the whole image, or in at least half of the outputs
    for the slices that contain it. Pixels of a slice have a lower weight near its edges inside the image, because it
    may contain only a part of an object there.
    """
    if not sliced:
        return dict(whole)
    margins: dict[str, np.ndarray] = {}
    slices = [(view, view_margins(view, response, readout)) for view, response in sliced]
    for name, margin in whole.items():
        seen, votes, strength = (np.zeros_like(margin) for _ in range(3))
        for view, parts in slices:
            if name not in parts:
                continue
            painted = Mask.from_margin(parts[name]).pixels
            weight = centrality(view, margin.shape[::-1])
            window = window_of(view)
            seen[window] += weight
            votes[window] += weight * painted
            strength[window] += weight * np.where(painted, parts[name], 0)
        found = margin if Mask.from_margin(margin).pixels.any() else np.minimum(margin, 0)
        agreed = strength / np.where(votes > 0, votes, 1)
        margins[name] = np.where((votes > 0) & (2 * votes >= seen), np.maximum(found, agreed), found)
    return margins


def view_margins(view: View, response: Response, readout: UNet2DModel | None) -> dict[str, np.ndarray]:
    """The margin of each object that a view asks about, in pixels of its image."""
    return mask_margins(cast(Segmentation, view.task), view.image, response.picture, response.box, readout)


def window_of(view: View) -> tuple[slice, slice]:
    """The rows and columns of the image that a view shows."""
    left, top = view.offset
    return np.s_[top : top + view.image.height, left : left + view.image.width]


def centrality(view: View, size: tuple[int, int]) -> np.ndarray:
    """Weights of a slice's pixels [height, width]: 1 in its center, 0.1 at edges that are not edges of the image."""
    lines = []
    for length, start, whole in zip(view.image.size, view.offset, size, strict=True):
        places = np.arange(length)
        before = places + 1 if start > 0 else np.full(length, np.inf)
        after = length - places if start + length < whole else np.full(length, np.inf)
        lines.append(np.minimum(before, after))
    inside = np.minimum(lines[1][:, None], lines[0][None, :])
    return np.clip(2 * inside / min(view.image.size), 0.1, 1).astype(np.float32)


def confirm_regions(
    pipeline: InstructDiffusionPipeline,
    view: View,
    name: str,
    alone: np.ndarray,
    margin: np.ndarray,
    readout: UNet2DModel | None,
    settings: dict[str, Any],
) -> np.ndarray:
    """The margin of an object, without regions that the outputs for crops do not confirm.

    A region of `margin` that is not in the margin of the whole image (`alone`) is kept if most of its crops confirm
    it. It then has the pixels that are marked in most of the crops.
    """
    pixels = Mask.from_margin(margin).pixels
    only, regions = new_regions(pixels, Mask.from_margin(alone).pixels)
    margin = np.where(only, np.minimum(margin, 0), margin)
    boxes = [close_up(region, fraction) for region in regions for fraction in CLOSE_UPS]
    views = [view._replace(image=view.image.crop(box), offset=box[:2]) for box in boxes]
    responses = []
    for start in range(0, len(views), SLICE_BATCH):
        responses += run_views(pipeline, views[start : start + SLICE_BATCH], **settings)
    for number, region in enumerate(regions):
        votes, strength = np.zeros_like(margin), np.zeros_like(margin)
        confirmed = 0
        for index in range(number * len(CLOSE_UPS), (number + 1) * len(CLOSE_UPS)):
            if responses[index].flag:  # a black image
                continue
            part = view_margins(views[index], responses[index], readout)[name]
            painted, window = Mask.from_margin(part).pixels, window_of(views[index])
            votes[window] += painted
            strength[window] += np.where(painted, part, 0)
            confirmed += (painted & region[window]).sum() >= MIN_SEEN * region.sum()
        if 2 * confirmed > len(CLOSE_UPS):
            margin = np.where(2 * votes > len(CLOSE_UPS), np.maximum(margin, strength / votes.clip(min=1)), margin)
    return margin


def close_up(region: np.ndarray, fraction: float) -> tuple[int, int, int, int]:
    """A square around a region [height, width], of whose side the region takes up `fraction` if the image permits."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    shortest = min(region.shape)
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(shortest, max(round(CLOSE_UP_SIDE * shortest), round(extent / fraction)))
    top, left = (
        min(max(0, round((line[0] + line[-1] + 1 - side) / 2)), length - side)
        for line, length in zip((rows, columns), region.shape, strict=True)
    )
    return int(left), int(top), int(left + side), int(top + side)


def new_regions(pixels: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The `pixels` (bool, [height, width]) that are not next to `known` ones, and their largest connected parts."""
    step = math.ceil(max(pixels.shape) / GRID)

    def cells(plane: np.ndarray) -> torch.Tensor:
        return F.max_pool2d(torch.from_numpy(plane).float()[None], step, ceil_mode=True)

    def grown(plane: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(plane, 3, 1, 1)

    def placed(plane: torch.Tensor) -> np.ndarray:
        large = plane[0].numpy().repeat(step, 0).repeat(step, 1)[: pixels.shape[0], : pixels.shape[1]]
        return (large > 0) & pixels

    left = cells(pixels) * (1 - grown(cells(known)))
    only, parts = placed(left), []
    while left.any():
        part = torch.zeros_like(left)
        part.view(-1)[left.argmax()] = 1
        while not torch.equal(part, larger := grown(part) * left):
            part = larger
        left = left - part
        parts.append(placed(part))
    large = [part for part in parts if part.mean() >= MIN_REGION]
    return only, sorted(large, key=lambda part: -part.sum())[:MAX_REGIONS]
