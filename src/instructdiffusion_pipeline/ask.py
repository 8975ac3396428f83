"""Ask a model a question about a picture, and get data back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import (
    Box,
    InstructDiffusionPipeline,
    upright_rgb,
    working_size,
)
from instructdiffusion_pipeline.readout import read_with_readout
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

Reading = TypeVar("Reading")


@dataclass(frozen=True, eq=False)
class Answer(Generic[Reading]):
    """A model's answer to a task about a picture.

    Attributes:
        task: the question.
        image: the input, RGB, upright.
        instruction: the prompt that the model was given.
        picture: the model's answer, in the size of the input. It shows the `box` of the input.
        box: (left, top, right, bottom) in pixels of the input.
        data: the reading, typed by the task, in pixels of the input: `dict[str, Mask]` for `Segmentation`,
            `dict[str, Joint | None]` for `Keypoints` (None: not found), the picture for `Restoration` and `Editing`.
        nsfw_content_detected: whether the pipeline's safety checker replaced the answer by black; `data` is then void.
    """

    task: Task[Reading]
    image: Image.Image
    instruction: str
    picture: Image.Image
    box: Box
    data: Reading
    nsfw_content_detected: bool = False

    @property
    def overlay(self) -> Image.Image:
        """The reading drawn on the input."""
        return self.task.overlay(self.image, self.data)


def ask(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Task[Reading],
    instruction: str | None = None,
    use_readout: bool = True,
    **settings: Any,
) -> Answer[Reading]:
    """Ask `task` about `image` and read the answer.

    Args:
        pipeline: an `InstructDiffusionPipeline`.
        image: PIL picture of any mode and size.
        task: the question, for example `Segmentation({"cat": "blue"})`.
        instruction: the wording; by default the task's own.
        use_readout: whether the pipeline's `readout`, if it has one, reads masks and joints. False: by colour.
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
    return ask_batch(pipeline, [image], [task], [instruction], use_readout, **settings)[0]


def ask_batch(
    pipeline: InstructDiffusionPipeline,
    images: Sequence[Image.Image],
    tasks: Sequence[Task[Reading]],
    instructions: Sequence[str | None] | None = None,
    use_readout: bool = True,
    **settings: Any,
) -> list[Answer[Reading]]:
    """`ask` for several pictures of one working size in one call of the pipeline.

    Raises:
        TypeError: an image is not a PIL picture, or a task is not a task.
        ValueError: there are no pictures; the numbers of pictures, tasks and instructions differ; the settings of the
            tasks differ; or `settings` would change how many pictures come back, or in which form.
    """
    instructions = [None] * len(tasks) if instructions is None else instructions
    if not len(images) == len(tasks) == len(instructions) > 0:
        raise ValueError(
            "`images`, `tasks` and `instructions` must have the same length, at least one; got"
            f" {len(images)}, {len(tasks)} and {len(instructions)}."
        )
    for image, task in zip(images, tasks, strict=True):
        if not isinstance(image, Image.Image) or not hasattr(task, "read"):
            raise TypeError(
                "`image` must be a PIL picture and `task` a task such as Segmentation({'cat': 'red'}); got"
                f" {type(image).__name__} and {type(task).__name__}."
            )
    if fixed := settings.keys() & {"prompt", "image", "output_type", "return_dict", "num_images_per_prompt"}:
        raise ValueError(f"`settings` must not contain {', '.join(sorted(fixed))}: `ask` sets these itself.")
    own = [{**task.settings, **pipeline.config.task_settings.get(task.family, {})} for task in tasks]
    if any(other != own[0] for other in own):
        raise ValueError(
            f"`tasks` must have the same settings; got {', '.join(sorted({task.family for task in tasks}))}."
            " Ask them in separate calls."
        )
    settings = own[0] | settings
    images = [upright_rgb(image) for image in images]
    prompts = [task.instruction() if words is None else words for task, words in zip(tasks, instructions, strict=True)]
    pictures, flags = pipeline(prompts, images, **settings, return_dict=False)

    resolution = settings.get("resolution")
    resolution = pipeline.default_resolution if resolution is None else resolution
    answers = []
    flags = flags or [False] * len(images)
    for image, task, prompt, picture, flag in zip(images, tasks, prompts, pictures, flags, strict=True):
        box = working_size(*image.size, resolution, pipeline.vae_scale_factor).box
        data: Any
        if use_readout and pipeline.readout is not None and isinstance(task, Segmentation | Keypoints):
            data = read_with_readout(pipeline.readout, task, image, picture, box)
        else:
            data = task.read(image, picture, box)
        answers.append(Answer(task, image, prompt, picture, box, data, flag))
    return answers
