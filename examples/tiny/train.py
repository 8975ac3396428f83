"""Train the small model that ships with this repository, everything from nothing.

    python examples/tiny/train.py --work_dir out/tiny

Each stage leaves its result in the work folder, so a run that was stopped goes on where it was. On one core of a
server processor the autoencoder takes half an hour (2.7 steps a second), encoding the samples five minutes, and the
UNet an hour and a quarter (1.4 steps a second; 2.2 on two cores).
"""

import argparse
import random
import shutil
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from fetch import fetch
from model import build_pipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from vae import train as train_vae
from world import World

from instructdiffusion_pipeline import export
from instructdiffusion_pipeline.training import EncodedSamples, TrainingConfig, encode_samples, train

SAMPLES = 30_000
CONFIG = TrainingConfig(
    max_train_steps=6_500,
    batch_size=32,
    learning_rate=5e-4,
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    ema_decay=0.999,
    # Lifts the share of the noisy timesteps, where the picture must be decided from the instruction.
    min_snr_gamma=1.0,
    train_text_encoder=True,
    mixed_precision="bf16",
    checkpointing_steps=250,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="downloads, caches and checkpoints")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "instructdiffusion-tiny")
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} exists already; remove it, or name another folder")
    args.work_dir.mkdir(parents=True, exist_ok=True)

    fetch(args.work_dir / "world")
    world = World(args.work_dir / "world")
    vae = train_vae(world, args.work_dir)
    torch.manual_seed(0)
    pipeline = build_pipeline(vae, args.work_dir / "world" / "bpe_simple_vocab_16e6.txt.gz")
    dataset = cached_samples(world, pipeline, args.work_dir / "samples.safetensors")

    # Plain attention trains this UNet a quarter faster than the fused kernel does on a CPU in bfloat16.
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")
    pipeline = train(pipeline, dataset, CONFIG, args.work_dir / "checkpoints")
    export(pipeline.to(dtype=torch.float16), args.output_dir)
    shutil.copy(Path(__file__).parent / "MODEL_CARD.md", args.output_dir / "README.md")
    shutil.copy(args.work_dir / "world" / "CREDITS.md", args.output_dir)


def cached_samples(world: World, pipeline, path: Path) -> EncodedSamples:
    """`SAMPLES` encoded training samples, drawn and encoded on the first call."""
    if not path.exists():
        rng = random.Random(1)
        samples = (world.sample(rng) for _ in tqdm(range(SAMPLES), desc="encoding"))
        save_file(encode_samples(samples, pipeline.vae, pipeline.tokenizer).tensors, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return EncodedSamples(load_file(path))


if __name__ == "__main__":
    main()
