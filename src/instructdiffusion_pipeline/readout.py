"""The readout: a small U-Net that decodes masks and joints from output images (Geng et al., CVPR 2024).

The paper used such a network but did not publish it. Decoding by color (`task.read`) assumes that the model paints the
exact color, whereas a readout is trained on the output images of its model. It is the component `readout` of a
pipeline.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.tasks import Reading, Task
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, MASK_COLORS, RGB, coverage
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import OPACITY, Mask, Segmentation, masks_from_margins
from instructdiffusion_pipeline.types import Joint

MASK, HEATMAP = 0, 1  # output channels
CHANNELS = 10  # input channels: input image (3), output image (3), requested color (3), coverage by color (1)
HEATMAP_SIGMA = 1.5  # standard deviation of the peak at a joint, in pixels at working size
# Minimum peak height of a joint. At 0.5 the false-positive rate equals that of decoding by color, with more joints
# found.
MIN_PEAK = 0.5


def read_answer(
    task: Task[Reading],
    image: Image.Image,
    answer: Image.Image,
    box: Box | None = None,
    readout: UNet2DModel | None = None,
) -> Reading:
    """Like `task.read`, but masks and joints are decoded with the `readout`, if there is one."""
    if readout is not None and isinstance(task, Segmentation | Keypoints):
        return cast(Reading, read_with_readout(readout, task, image, answer, box))
    return task.read(image, answer, box)


def read_with_readout(
    readout: UNet2DModel,
    task: Segmentation | Keypoints,
    image: Image.Image,
    answer: Image.Image,
    box: Box | None = None,
) -> dict[str, Mask] | dict[str, Joint | None]:
    """Decode masks or joints from `answer` with a readout, as `task.read` does by color."""
    if isinstance(task, Segmentation):
        return masks_from_margins(mask_margins(task, image, answer, box, readout))
    frame, planes = run_readout(readout, task, image, answer, box)
    joints: dict[str, Joint | None] = {}
    for name, heatmap in zip(task.colors, planes[:, HEATMAP], strict=True):
        x, y, score = heatmap_peak(heatmap)
        joints[name] = Joint(*frame.point(x, y), score) if score >= MIN_PEAK else None
    return joints


def mask_margins(
    task: Segmentation,
    image: Image.Image,
    answer: Image.Image,
    box: Box | None = None,
    readout: UNet2DModel | None = None,
) -> dict[str, np.ndarray]:
    """Like `task.margins`, but with a `readout`, if there is one: the probability of each pixel minus 0.5."""
    if readout is None:
        return task.margins(image, answer, box)
    frame, planes = run_readout(readout, task, image, answer, box)
    return {
        name: frame.place(plane - 0.5, outside=-0.5) for name, plane in zip(task.colors, planes[:, MASK], strict=True)
    }


@torch.no_grad()
def run_readout(
    readout: UNet2DModel,
    task: Segmentation | Keypoints,
    image: Image.Image,
    answer: Image.Image,
    box: Box | None = None,
) -> tuple[Frame, np.ndarray]:
    """Run a readout on `answer`, at the size that it was trained for.

    Args:
        readout: a U-Net with `CHANNELS` input channels and two output channels, the logits of mask and heatmap.
        task, image, answer, box: as in `task.read`.

    Returns:
        The frame, and the probabilities of mask and heatmap for each of N names, [N, 2, height, width].

    Raises:
        ValueError: if the readout has another number of input or output channels.
    """
    if (readout.config.in_channels, readout.config.out_channels) != (CHANNELS, 2):
        raise ValueError(
            f"`readout` must have {CHANNELS} input channels and 2 output channels; got {readout.config.in_channels}"
            f" and {readout.config.out_channels}."
        )
    frame = Frame.of(image, answer, box, shortest=readout.config.sample_size, enlarge=True)
    inputs = readout_inputs(frame, *asked_colors(task))
    if readout.device.type != "meta":  # with sequential offloading, hooks move the inputs
        inputs = inputs.to(readout.device)
    logits = readout_logits(readout, inputs.to(readout.dtype))
    if not logits.isfinite().all():
        raise ValueError(
            f"`readout` returned values that are NaN or infinite: its weights are, or {readout.dtype} overflowed."
        )
    return frame, logits.float().sigmoid().cpu().numpy()


def readout_logits(readout: UNet2DModel, inputs: torch.Tensor) -> torch.Tensor:
    """The logits of mask and heatmap, [N, 2, height, width], for inputs [N, CHANNELS, height, width] of any size."""
    height, width = inputs.shape[-2:]
    multiple = 2 ** (len(readout.config.block_out_channels) - 1)  # each level except the last halves the size
    padded = torch.nn.functional.pad(inputs, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    return readout(padded, timestep=0).sample[..., :height, :width]


def asked_colors(task: Segmentation | Keypoints) -> tuple[list[RGB], float]:
    """The requested colors of a task, and the opacity at which they are painted."""
    if isinstance(task, Segmentation):
        return [MASK_COLORS[color] for color in task.colors.values()], OPACITY
    return [KEYPOINT_COLORS[color] for color in task.colors.values()], 1.0


def readout_inputs(frame: Frame, colors: Sequence[RGB], opacity: float) -> torch.Tensor:
    """The network's inputs for each of N colors, [N, CHANNELS, height, width], with values from about -1 to 1."""
    shares, _ = coverage(frame.source, frame.answer, colors, opacity)
    pictures = np.concatenate([frame.source, frame.answer], -1).transpose(2, 0, 1) / 127.5 - 1  # [6, H, W]
    painted = np.broadcast_to(np.array(colors)[:, :, None, None] / 127.5 - 1, (len(colors), 3, *pictures.shape[1:]))
    both = np.broadcast_to(pictures, (len(colors), *pictures.shape))
    return torch.from_numpy(np.concatenate([both, painted, shares[:, None].clip(-1, 2)], 1).astype(np.float32))


def heatmap_peak(heatmap: np.ndarray) -> tuple[float, float, float]:
    """The subpixel position of the maximum of a heatmap, and its value."""
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    # The window is kept symmetric at the border, because a one-sided window would bias the centroid.
    reach_y, reach_x = (
        min(round(2 * HEATMAP_SIGMA), place, side - 1 - place)
        for place, side in zip((row, column), heatmap.shape, strict=True)
    )
    top, left = row - reach_y, column - reach_x
    window = heatmap[top : row + reach_y + 1, left : column + reach_x + 1]
    rows, columns = np.indices(window.shape)
    total = window.sum()
    return (
        float(left + (columns * window).sum() / total),
        float(top + (rows * window).sum() / total),
        float(heatmap[row, column]),
    )
