"""Train the small model that ships with this repository.

    python examples/tiny/train.py --work_dir out/tiny --output_dir out/model

Everything starts from nothing, or with `--init FOLDER` from an earlier model's weights. Each stage leaves its result
in the work folder, so a run that was stopped goes on where it was. A core of a server processor takes 2.5 steps of the
autoencoder a second and encodes 95 samples a second; two take 1.4 steps of the UNet a second.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from fetch import fetch
from model import build_pipeline, use_plain_attention
from sources import mixture
from vae import train as train_vae
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline, export
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, cache_samples, train

SAMPLES = 64_000
STEPS = {"fresh": 12_000, "tuned": 6_000}  # from nothing, and from an earlier model's weights
CONFIG = TrainingConfig(
    max_train_steps=STEPS["fresh"],
    batch_size=64,
    learning_rate=5e-4,  # twice as much learns more slowly, four times as much unlearns
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    ema_decay=0.999,
    # What an answer shows where is decided from picture and words alone near pure noise; later the noisy latents
    # themselves give it away. So a third of the timesteps lies above 900. And a disc of four latents must not be lost
    # among 252 that do not change.
    timestep_bias=8,
    change_weight=10,
    train_text_encoder=True,
    mixed_precision="bf16",
    checkpointing_steps=250,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="downloads, caches and checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make, as a Hub repository")
    parser.add_argument("--init", type=Path, help="a folder of an earlier run, to start from its weights")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} exists already; remove it, or name another folder")
    args.work_dir.mkdir(parents=True, exist_ok=True)

    fetch(args.work_dir / "world")
    world = World(args.work_dir / "world")
    vae = train_vae(world, args.work_dir, args.init)
    torch.manual_seed(0)
    if args.init:
        pipeline = InstructDiffusionPipeline.from_pretrained(args.init, vae=vae, dtype=torch.float32)
    else:
        pipeline = build_pipeline(vae, args.work_dir / "world" / "bpe_simple_vocab_16e6.txt.gz")
    samples = ImageDataset(mixture(world, SAMPLES, seed=1), pipeline.tokenizer)
    dataset = cache_samples(samples, SAMPLES, pipeline, args.work_dir / "samples", embeddings=False)

    use_plain_attention(pipeline)
    config = dataclasses.replace(CONFIG, max_train_steps=STEPS["tuned"]) if args.init else CONFIG
    pipeline = train(pipeline, dataset, config, args.work_dir / "checkpoints", resume="latest")
    export(pipeline.to(dtype=torch.float16), args.output_dir)
    here = Path(__file__).parent
    shutil.copy(here / "MODEL_CARD.md", args.output_dir / "README.md")
    shutil.copy(here / "presets.json", args.output_dir)
    shutil.copy(args.work_dir / "world" / "CREDITS.md", args.output_dir)


if __name__ == "__main__":
    main()
