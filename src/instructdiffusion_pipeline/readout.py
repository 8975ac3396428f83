"""A learned reading: a light U-Net that sees a picture and a model's answer to it, and says where the paint is.

The paper's authors used such a network and never published it (Geng et al., CVPR 2024). Reading by colour knows what a
perfect answer looks like; this one is trained on answers as a model really gives them.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from instructdiffusion_pipeline.hub import find_file
from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, MASK_COLORS, RGB, coverage
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import OPACITY, Mask, Segmentation
from instructdiffusion_pipeline.types import Joint

SUBFOLDER = "reading"  # of a model's folder or Hub repository
MASK, HEATMAP = 0, 1  # channels that the network gives
CHANNELS = 10  # that it takes: picture, answer and the asked colour, three each, and the reading by colour
HEAT_SIGMA = 1.5  # pixels of the working size: deviation of the peak that stands for a joint
MIN_HEAT = 0.5  # of a peak: as careful about joints that are not there as the reading by colour, and finds more


class LearnedReading:
    """Reads masks and joints out of answers with `unet`, a `UNet2DModel` of `CHANNELS` to two channels.

    It works at the size that the network was made for, whatever the picture's. Pictures (restored, edited) need no
    reading, and are read as their task does.
    """

    def __init__(self, unet: UNet2DModel):
        if (unet.config.in_channels, unet.config.out_channels) != (CHANNELS, 2):
            raise ValueError(
                f"`unet` must take {CHANNELS} channels and give 2; it takes {unet.config.in_channels} and gives"
                f" {unet.config.out_channels}."
            )
        self.unet = unet.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str]) -> Self:
        """From the folder "reading" of a model's folder or Hub repository. Raises an OSError if it has none."""
        return cls(UNet2DModel.from_pretrained(model, subfolder=SUBFOLDER, torch_dtype=torch.float32))

    @classmethod
    def beside(cls, model: str | PathLike[str]) -> Self | None:
        """The one that a model's folder or Hub repository has, if it has one."""
        found = (Path(model) / SUBFOLDER).is_dir() or find_file(model, f"{SUBFOLDER}/config.json")
        return cls.from_pretrained(model) if found else None

    @torch.no_grad()
    def __call__(self, task: Task, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Any:
        """What `task.read` returns, with the same arguments."""
        if not isinstance(task, Segmentation | Keypoints):
            return task.read(image, answer, box)
        frame = Frame.of(image, answer, box, shortest=self.unet.config.sample_size)
        colors, opacity = asked(task)
        given = planes(frame, colors, opacity)
        height, width = given.shape[-2:]
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)  # each level but the last halves the sides
        given = torch.nn.functional.pad(given, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        found = self.unet(given, timestep=0).sample[..., :height, :width].sigmoid().numpy()
        if isinstance(task, Segmentation):
            return {
                name: Mask.from_margin(frame.place(plane - 0.5, outside=-0.5))
                for name, plane in zip(task.colors, found[:, MASK], strict=True)
            }
        joints: dict[str, Joint | None] = {}
        for name, heat in zip(task.colors, found[:, HEATMAP], strict=True):
            x, y, confidence = peak(heat)
            joints[name] = Joint(*frame.point(x, y), confidence) if confidence >= MIN_HEAT else None
        return joints


def asked(task: Segmentation | Keypoints) -> tuple[list[RGB], float]:
    """The colours of a question, and how opaque they are painted."""
    if isinstance(task, Segmentation):
        return [MASK_COLORS[color] for color in task.colors.values()], OPACITY
    return [KEYPOINT_COLORS[color] for color in task.colors.values()], 1.0


def planes(frame: Frame, colors: Sequence[RGB], opacity: float) -> torch.Tensor:
    """What the network takes for each of N colours, [N, CHANNELS, height, width], about -1 to 1."""
    shares, _ = coverage(frame.source, frame.answer, colors, opacity)
    pictures = np.concatenate([frame.source, frame.answer], -1).transpose(2, 0, 1) / 127.5 - 1  # [6, H, W]
    painted = np.broadcast_to(np.array(colors)[:, :, None, None] / 127.5 - 1, (len(colors), 3, *pictures.shape[1:]))
    both = np.broadcast_to(pictures, (len(colors), *pictures.shape))
    return torch.from_numpy(np.concatenate([both, painted, shares[:, None].clip(-1, 2)], 1).astype(np.float32))


def peak(heat: np.ndarray) -> tuple[float, float, float]:
    """Where a heatmap [height, width] is highest, to a fraction of a pixel, and how high: x, y and 0 to 1."""
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    # As far on one side as on the other, or the frame would push it inward.
    up, aside = (
        min(round(2 * HEAT_SIGMA), place, side - 1 - place)
        for place, side in zip((row, column), heat.shape, strict=True)
    )
    top, left = row - up, column - aside
    around = heat[top : row + up + 1, left : column + aside + 1]
    rows, columns = np.indices(around.shape)
    total = around.sum()
    return (
        float(left + (columns * around).sum() / total),
        float(top + (rows * around).sum() / total),
        float(heat[row, column]),
    )
