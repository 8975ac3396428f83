"""Training of a readout on the outputs of its model. Needs the extra `eval`.

The paper (Geng et al., CVPR 2024) decodes masks and joints with a light U-Net, whose code and weights were not
published. This one predicts a mask and a heatmap for one color at a time; see `instructdiffusion_pipeline.readout`.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from instructdiffusion_pipeline.evaluation import LazyExample, evaluate
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.files import atomic_write, update_json
from instructdiffusion_pipeline.fingerprint import check_run_config
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.readout import (
    CHANNELS,
    HEATMAP,
    HEATMAP_SIGMA,
    MASK,
    asked_colors,
    readout_inputs,
    readout_logits,
)
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Segmentation, prompted_tasks
from instructdiffusion_pipeline.types import Joint

WIDTHS = (16, 32, 64)  # of the first levels; deeper levels have the width of the last
PEAK_WEIGHT = 20.0  # loss weight at the center of a peak at 64 x 64 pixels; proportional to the area


@dataclass(frozen=True)
class ReadoutConfig:
    """Settings of `train_readout`.

    Attributes:
        sample_size: shorter side of the readout's input in pixels; images and outputs are resized to it.
        max_train_steps: number of updates.
        batch_size: colors per update. An output for three joints has three.
        learning_rate: the highest of a one-cycle schedule.
        num_workers: data loader workers; the result does not depend on them.
        checkpointing_steps: updates between two checkpoints.
        seed: seed of the weights, the order of the samples and the flips.
    """

    sample_size: int = 256
    max_train_steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 2e-3
    num_workers: int = 0
    checkpointing_steps: int = 100
    seed: int = 0


def train_readout(
    pipeline: InstructDiffusionPipeline,
    examples: Sequence[LazyExample],
    held_out: Sequence[LazyExample],
    folder: str | PathLike[str],
    config: ReadoutConfig,
    batch_size: int = 8,
) -> UNet2DModel:
    """Train a readout for `pipeline`, and compare it with decoding by color.

    The model is run on `examples`, the readout is trained on the outputs, and then the model is run on `held_out`. A
    run that was stopped continues when it is called again with the same arguments.

    Args:
        pipeline: its component `readout` is set to the new readout, and its `score_calibration` is removed.
        examples: with masks or joints; see `evaluation.examples_from`. Their images have one aspect ratio.
        held_out: the same kind, of other images.
        folder: new, or of the same run. Gets the outputs in answers/ and the evaluation in held-out/, where
            table.md has the scores of the readout in the column "score", and those of decoding by color next to them.
        config: settings of training.
        batch_size: prompts per call of the pipeline.

    Returns:
        The readout, on the pipeline's device, in its precision.

    Raises:
        ValueError: if `folder` has another run, or no example can be scored.
    """
    folder = Path(folder)
    pipeline.register_modules(readout=None)
    pipeline.register_to_config(score_calibration={})  # because it is for another readout
    evaluate(pipeline, examples, folder / "answers", batch_size=batch_size)
    dataset = ReadoutDataset(examples, folder / "answers", config)
    readout = fit(dataset, config, folder, pipeline.device)
    pipeline.register_modules(readout=readout.to(dtype=pipeline.unet.dtype))
    evaluate(pipeline, held_out, folder / "held-out", batch_size=batch_size)
    return readout


def save_readout(readout: UNet2DModel, model: str | PathLike[str], overwrite: bool = False) -> None:
    """Save a readout in the folder of a model, as its component `readout`.

    Raises:
        FileExistsError: if the model has a readout, and `overwrite` is False.
    """
    target, index = Path(model, "readout"), Path(model, "model_index.json")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists.")
    with atomic_write(target) as partial:
        readout.save_pretrained(partial)
        # If the process is killed from here on, the model has no readout. The calibration is removed because it is for
        # another readout.
        update_json(index, {"readout": [None, None], "score_calibration": {}})
        if target.exists():
            shutil.rmtree(target)
    update_json(index, {"readout": ["diffusers", "UNet2DModel"]})


def build_readout(sample_size: int) -> UNet2DModel:
    """A U-Net without attention, whose lowest level has about 16 x 16 pixels (0.6 M parameters at 64 x 64 pixels).

    Its timestep input is always 0.
    """
    levels = max(len(WIDTHS), round(math.log2(sample_size / 16)) + 1)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=CHANNELS,
        out_channels=2,
        block_out_channels=WIDTHS + WIDTHS[-1:] * (levels - len(WIDTHS)),
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )


class ReadoutDataset(Dataset):
    """Inputs and targets for a readout: one item for each color in the tasks of `examples`.

    `len` is the length of an epoch. Larger positions continue with the next epoch. Each epoch has a different order,
    and half of its items are mirrored. An item is determined by the seed and its position.

    Args:
        examples: those passed to `evaluate`. Examples that failed there are left out.
        folder: the folder written by `evaluate`.
        config: the size of the items, and the seed.
    """

    def __init__(self, examples: Sequence[LazyExample], folder: Path, config: ReadoutConfig):
        self.examples, self.folder, self.size, self.seed = examples, folder, config.sample_size, config.seed
        records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
        self.boxes = {record["index"]: tuple(record["box"]) for record in records if "box" in record}
        self.rows = [
            (index, number, part, name)
            for index in tqdm(self.boxes, desc="opening")
            for number, task in enumerate(examples[index].open().tasks)
            for part, prompted in enumerate(prompted_tasks(task))
            for name in cast(Segmentation | Keypoints, prompted).colors
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Inputs [CHANNELS, height, width], target [height, width] and its output channel."""
        epoch, offset = divmod(position, len(self.rows))
        row = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))[offset]
        index, number, part, name = self.rows[row]
        example = self.examples[index].open()
        task, box = prompted_tasks(example.tasks[number])[part], self.boxes[index]
        output = Image.open(self.folder / "answers" / answer_name(index, number, part))
        frame = Frame.of(example.image, output, box, shortest=self.size, enlarge=True)
        colors, opacity = asked_colors(task)
        inputs = readout_inputs(frame, colors, opacity)[list(task.colors).index(name)]
        truth = example.truth.get(name)
        if isinstance(task, Segmentation):
            target, channel = mask_target(truth, frame), MASK
        else:
            target, channel = heatmap_target(truth, frame), HEATMAP
        plane = torch.from_numpy(target.astype(np.float32))
        if np.random.default_rng((self.seed, epoch, row)).random() < 0.5:
            inputs, plane = inputs.flip(-1), plane.flip(-1)
        return inputs, plane, channel


def mask_target(mask: np.ndarray | None, frame: Frame) -> np.ndarray:
    """The fraction of each pixel of the frame that a mask covers, [height, width]; None is an empty mask."""
    height, width = frame.source.shape[:2]
    if mask is None:
        return np.zeros((height, width))
    plane = Image.fromarray(mask.astype(np.float32))
    return np.asarray(plane.resize((width, height), Image.Resampling.BOX, frame.box))


def heatmap_target(joint: Joint | None, frame: Frame) -> np.ndarray:
    """A Gaussian peak of height 1 at the joint, [height, width], or zeros if there is none."""
    rows, columns = np.indices(frame.source.shape[:2])
    if joint is None:
        return np.zeros(rows.shape)
    x, y = (
        (place - start + 0.5) / scale - 0.5
        for place, start, scale in zip(joint[:2], frame.box[:2], frame.scale, strict=True)
    )
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * HEATMAP_SIGMA**2))


def fit(dataset: ReadoutDataset, config: ReadoutConfig, folder: Path, device: torch.device) -> UNet2DModel:
    """Train a readout with binary cross entropy, in float32. A stopped run continues from `folder`/checkpoint.pt."""
    run = {name: value for name, value in asdict(config).items() if name not in ("num_workers", "checkpointing_steps")}
    check_run_config(folder, "config.json", run, "a readout with the same settings")
    torch.manual_seed(config.seed)
    readout = build_readout(config.sample_size).to(device)
    optimizer = torch.optim.AdamW(readout.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_train_steps, pct_start=0.05
    )
    step, path, state = 0, folder / "checkpoint.pt", (readout, optimizer, schedule)
    if path.exists():
        step, *states = torch.load(path, map_location="cpu", weights_only=True)
        for part, values in zip(state, states, strict=True):
            part.load_state_dict(values)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=range(step * config.batch_size, config.max_train_steps * config.batch_size),
        num_workers=config.num_workers,
    )
    bar = tqdm(loader, desc="readout", initial=step, total=config.max_train_steps)
    for inputs, targets, channels in bar:
        loss = readout_loss(readout, inputs.to(device), targets.to(device), channels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step += 1
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            with atomic_write(path) as partial:
                torch.save([step, *(part.state_dict() for part in state)], partial)
    return readout.eval().requires_grad_(False)


def readout_loss(
    readout: UNet2DModel, inputs: torch.Tensor, targets: torch.Tensor, channels: torch.Tensor
) -> torch.Tensor:
    """Mean binary cross entropy, a scalar.

    Args:
        inputs: [B, CHANNELS, height, width].
        targets: [B, height, width], 0 to 1.
        channels: [B], the output channel that each target is for.
    """
    logits = readout_logits(readout, inputs)[torch.arange(len(inputs), device=inputs.device), channels]
    # Because a peak covers few pixels.
    peak_weight = PEAK_WEIGHT * targets.shape[1:].numel() / 64**2
    weights = torch.where((channels == HEATMAP)[:, None, None], 1 + (peak_weight - 1) * targets, 1.0)
    return F.binary_cross_entropy_with_logits(logits, targets, weights)
