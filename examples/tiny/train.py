"""Train the small model `examples/instructdiffusion-tiny`.

    python examples/tiny/train.py --work_dir out/tiny --output_dir out/model

Training starts from random weights, or with `--init FOLDER` from the weights of an earlier model, whose VAE is kept.
Samples are generated while the UNet is trained, so that none is repeated. Each stage saves its state in the work
folder, so an interrupted run is resumed when it is started again. Speed on one core of a server CPU: 2.5 VAE steps per
second and 30 UNet samples per second, which is 40 minutes for the VAE and 7 hours for the UNet from random weights.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from fetch import fetch
from model import TASK_SETTINGS, build_pipeline, export_model, use_plain_attention
from sources import mixture
from vae import train as train_vae
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, train

SAMPLES = 4_000_000  # number of different samples
CONFIG = TrainingConfig(
    max_train_steps=12_000,
    batch_size=64,
    learning_rate=5e-4,  # with 1e-3 the loss decreases more slowly, with 2e-3 it diverges
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    ema_decay=0.999,
    # At high noise levels the output depends on image and instruction only; at lower levels it is visible in the noisy
    # latents. With this bias a third of the timesteps is above 900. The change weight is for small targets: a disc
    # covers four latents of 256.
    timestep_bias=8,
    change_weight=10,
    train_text_encoder=True,
    mixed_precision="bf16",
    checkpointing_steps=250,
)
# From the weights of an earlier model. With a constant learning rate a finished run can be continued with more steps;
# instead of a decay, the EMA averages the last thousands of steps. A smaller change weight increases the relative loss
# of false positives.
TUNING = dataclasses.replace(
    CONFIG,
    max_train_steps=30_000,
    learning_rate=3e-4,
    lr_scheduler="constant_with_warmup",
    ema_decay=0.9995,
    change_weight=6,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for downloads, caches and checkpoints")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="new folder for the model, in the layout of a Hub repository"
    )
    parser.add_argument("--init", type=Path, help="folder of an earlier model, to start from its weights")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} already exists; delete it, or choose another folder")
    args.work_dir.mkdir(parents=True, exist_ok=True)

    fetch(args.work_dir / "world")
    world = World(args.work_dir / "world")
    if args.init:
        pipeline = InstructDiffusionPipeline.from_pretrained(
            args.init, readout=None, task_settings=TASK_SETTINGS, score_calibration=None, dtype=torch.float32
        )
    else:
        vae = train_vae(world, args.work_dir)
        torch.manual_seed(0)
        pipeline = build_pipeline(vae, args.work_dir / "world" / "bpe_simple_vocab_16e6.txt.gz")
    use_plain_attention(pipeline)
    samples = ImageDataset(mixture(world, SAMPLES, seed=1), pipeline.tokenizer)
    config = TUNING if args.init else CONFIG
    pipeline = train(pipeline, samples, config, args.work_dir / "checkpoints", resume="latest")
    export_model(pipeline, args.output_dir, args.work_dir / "world")


if __name__ == "__main__":
    run_script(main)
