"""Ask a model one question about a picture, and get data back."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import (
    Box,
    InstructDiffusionPipeline,
    upright_rgb,
    working_size,
)
from instructdiffusion_pipeline.tasks import Task


@dataclass(frozen=True)
class Answer:
    """What a model answered: `picture` as it came, in the input's size; `data` as the task reads it.

    `picture` shows the `box` (left, top, right, bottom) of the input. `data` is in pixels of the input: a dictionary
    of `Mask` or of `Joint` (None: not there), or the restored or edited picture.
    """

    task: Task
    image: Image.Image
    picture: Image.Image
    box: Box
    data: Any

    @property
    def overlay(self) -> Image.Image:
        """The reading on the input, to look at."""
        return self.task.overlay(self.image, self.data)


def ask(
    pipeline: InstructDiffusionPipeline,
    image: Image.Image,
    task: Task,
    resolution: int | None = None,
    instruction: str | None = None,
    **settings: Any,
) -> Answer:
    """Ask `task` about `image` (PIL, any mode and size) and read the answer.

    Works at `resolution` (default: what the model's UNet was made for, 512 for Stable Diffusion 1.5), in the task's
    own words unless `instruction` brings others. `settings` go to the pipeline and come before the task's preset.
    """
    words = task.instruction() if instruction is None else instruction
    return ask_batch(pipeline, [image], [task], [words], resolution, **settings)[0]


def ask_batch(
    pipeline: InstructDiffusionPipeline,
    images: list[Image.Image],
    tasks: list[Task],
    instructions: list[str],
    resolution: int | None = None,
    **settings: Any,
) -> list[Answer]:
    """`ask` for several pictures in one call: they must share a working size, and share the first task's preset."""
    images = [upright_rgb(image) for image in images]
    resolution = resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    output = pipeline(instructions, images, resolution=resolution, **(tasks[0].preset | settings), return_dict=False)
    answers = []
    for image, task, picture in zip(images, tasks, output[0], strict=True):
        box = working_size(*image.size, resolution, pipeline.vae_scale_factor).box
        answers.append(Answer(task, image, picture, box, task.read(image, picture, box)))
    return answers
