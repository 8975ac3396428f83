"""Train a readout for the small model, on the model's answers to new training scenes.

    python examples/tiny/train_readout.py --model out/model --world out/tiny/world --work_dir out/readout \\
        --output_dir out/model-with-readout

The output folder is the model with the component `readout`. The answers are saved in the work folder, so an
interrupted run continues when it is started again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from model import export_model
from PIL import Image
from sources import source
from tqdm import tqdm
from world import SIZE, World

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.evaluation import LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.readout import CHANNELS, HEATMAP, HEATMAP_SIGMA, MASK, asked_colors, readout_inputs
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Joint

QUESTIONS = {"segmentation": 1600, "keypoints": 700, "few keypoints": 700, "pose": 400}
SEED = 3  # of the scenes; training of the model uses 0 and 1, scoring 7
STEPS = 1_500
BATCH = 16
LEARNING_RATE = 2e-3
PEAK_WEIGHT = 20.0  # loss weight at the center of a peak, because a disc covers only one pixel in 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--world", type=Path, required=True, help="folder `world` in the work folder of examples/tiny/train.py"
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the model's answers")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the model with its readout")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} already exists; delete it, or choose another folder")
    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    world = World(args.world)
    questions = QUESTIONS.items()
    cases = [
        case for name, count in questions for case in examples_from(source(name, world, count, SEED), count, SEED)
    ]
    evaluate(pipeline, cases, args.work_dir, batch_size=32)
    pipeline.register_modules(readout=train(*collect(cases, args.work_dir / "answers")))
    export_model(pipeline, args.output_dir, args.world)


def build() -> UNet2DModel:
    """Build a U-Net without attention (0.6 M parameters). Its timestep is always 0."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=2,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )


def collect(cases: list[LazyExample], answers: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs [N, CHANNELS, SIZE, SIZE], targets [N, SIZE, SIZE] and their output channels [N].

    There is one row for every colour that a case asks for.
    """
    rows = [row for index, case in enumerate(tqdm(cases, desc="answers")) for row in examples(index, case, answers)]
    inputs, targets, channels = zip(*rows, strict=True)
    return torch.stack(inputs), torch.stack(targets), torch.tensor(channels)


def examples(index: int, case: LazyExample, answers: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield the rows of one case, in half precision."""
    example = case.open()
    (task,) = example.tasks
    frame = Frame.of(example.image, Image.open(answers / answer_name(index, 0)))
    for name, inputs in zip(task.colors, readout_inputs(frame, *asked_colors(task)).half(), strict=True):
        if isinstance(task, Segmentation):
            yield inputs, torch.from_numpy(example.truth[name]).half(), MASK
        else:
            yield inputs, torch.from_numpy(heatmap(example.truth[name])).half(), HEATMAP


def heatmap(joint: Joint | None) -> np.ndarray:
    """Return a Gaussian peak of height 1 [SIZE, SIZE], or zeros if there is no joint."""
    if joint is None:
        return np.zeros((SIZE, SIZE))
    rows, columns = np.indices((SIZE, SIZE))
    return np.exp(-((columns - joint.x) ** 2 + (rows - joint.y) ** 2) / (2 * HEATMAP_SIGMA**2))


def train(inputs: torch.Tensor, targets: torch.Tensor, channels: torch.Tensor) -> UNet2DModel:
    """Train a readout with binary cross entropy."""
    torch.manual_seed(0)
    unet = build()
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    bar = tqdm(range(STEPS), desc="readout", mininterval=5)
    for step in bar:
        indices = torch.randint(len(inputs), (BATCH,))
        batch, target, channel = inputs[indices].float(), targets[indices].float(), channels[indices]
        if step % 2:  # augmentation
            batch, target = batch.flip(-1), target.flip(-1)
        logits = unet(batch, timestep=0).sample[torch.arange(BATCH), channel]
        weights = torch.where((channel == HEATMAP)[:, None, None], 1 + (PEAK_WEIGHT - 1) * target, 1.0)
        loss = F.binary_cross_entropy_with_logits(logits, target, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    return unet


if __name__ == "__main__":
    run_script(main)
