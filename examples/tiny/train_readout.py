"""Train the reading that ships beside the small model, on answers that the model gives to new training scenes.

    python examples/tiny/train_readout.py --model out/model --world out/tiny/world --work_dir out/reading

It leaves the network in the model's folder. Answers are kept in the work folder, so a run that was stopped goes on.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from sources import source
from tqdm import tqdm
from world import SIZE, World

from instructdiffusion_pipeline import InstructDiffusionPipeline, load_presets
from instructdiffusion_pipeline.evaluation import LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.readout import CHANNELS, HEAT_SIGMA, HEATMAP, MASK, SUBFOLDER, asked, planes
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Joint

QUESTIONS = {"segmentation": 1600, "keypoints": 700, "few keypoints": 700, "pose": 400}
SEED = 3  # of the scenes; the model was trained on those of 0 and 1, and is scored on those of 7
STEPS = 1_500
BATCH = 16
LEARNING_RATE = 2e-3
HEAT_WEIGHT = 20.0  # of a peak's middle in the loss; a disc is one pixel in two hundred


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of the model, where the reading goes")
    parser.add_argument("--world", type=Path, required=True, help="the folder the recipe fetched its pictures to")
    parser.add_argument("--work_dir", type=Path, required=True, help="for the model's answers")
    args = parser.parse_args()
    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    world = World(args.world)
    questions = QUESTIONS.items()
    cases = [
        case for name, count in questions for case in examples_from(source(name, world, count, SEED), count, SEED)
    ]
    evaluate(pipeline, cases, args.work_dir, load_presets(args.model), batch_size=32)
    unet = train(*collect(cases, args.work_dir / "answers"))
    unet.half().save_pretrained(args.model / SUBFOLDER)


def build() -> UNet2DModel:
    """About 0.6 M parameters, without attention; the timestep is always 0."""
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
    """What the network takes [N, CHANNELS, SIZE, SIZE] for every colour asked for, the truth [N, SIZE, SIZE], and
    which of the network's channels it is [N]."""
    rows = [
        row for index, case in enumerate(tqdm(cases, desc="reading answers")) for row in examples(index, case, answers)
    ]
    given, truth, channel = zip(*rows, strict=True)
    return torch.stack(given), torch.stack(truth), torch.tensor(channel)


def examples(index: int, case: LazyExample, answers: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The rows of one case, in half precision."""
    example = case.open()
    (task,) = example.tasks
    frame = Frame.of(example.image, Image.open(answers / answer_name(index, 0)))
    for name, given in zip(task.colors, planes(frame, *asked(task)).half(), strict=True):
        if isinstance(task, Segmentation):
            yield given, torch.from_numpy(example.truth[name]).half(), MASK
        else:
            yield given, torch.from_numpy(heatmap(example.truth[name])).half(), HEATMAP


def heatmap(joint: Joint | None) -> np.ndarray:
    """A Gaussian peak of height 1 [SIZE, SIZE]; zeros for a joint that is not there."""
    if joint is None:
        return np.zeros((SIZE, SIZE))
    rows, columns = np.indices((SIZE, SIZE))
    return np.exp(-((columns - joint.x) ** 2 + (rows - joint.y) ** 2) / (2 * HEAT_SIGMA**2))


def train(given: torch.Tensor, truth: torch.Tensor, channel: torch.Tensor) -> UNet2DModel:
    """A network fitted by binary cross entropy."""
    torch.manual_seed(0)
    unet = build()
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    bar = tqdm(range(STEPS), desc="learned reading", mininterval=5)
    for step in bar:
        picks = torch.randint(len(given), (BATCH,))
        inputs, target = given[picks].float(), truth[picks].float()
        if step % 2:  # neither paint nor discs know left from right
            inputs, target = inputs.flip(-1), target.flip(-1)
        logits = unet(inputs, timestep=0).sample[torch.arange(BATCH), channel[picks]]
        weights = torch.where((channel[picks] == HEATMAP)[:, None, None], 1 + (HEAT_WEIGHT - 1) * target, 1.0)
        loss = F.binary_cross_entropy_with_logits(logits, target, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    return unet


if __name__ == "__main__":
    main()
