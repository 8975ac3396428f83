"""Train the model `examples/instructdiffusion-tiny`, or with `--recipe gpu` a larger one on a GPU.

    python examples/tiny/train.py --work_dir out/tiny --output_dir out/model

Training starts from random weights, or with `--init FOLDER` from the weights of an earlier model, whose VAE is kept.
Samples are generated during the training of the UNet, so no sample is repeated. Each stage saves its state in the work
folder, so an interrupted run is resumed when it is started again. On two cores of a server CPU, the UNet is trained on
35 samples per second, which is six hours from random weights. For a machine with a GPU and no network, `pack.py` makes
a folder with everything needed.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from fetch import fetch
from model import build_pipeline, export_model, task_settings, use_plain_attention
from recipes import RECIPES, Recipe, add_recipe_argument
from sources import TRAINING_SOURCES, mixture
from transformers import CLIPTokenizer
from vae import train as train_vae

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import integer, run_script
from instructdiffusion_pipeline.training import ImageDataset, MultiSizeDataset, train

SAMPLES = 4_000_000  # number of different samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for downloads, caches and checkpoints")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="new folder for the model, in the layout of a Hub repository"
    )
    parser.add_argument("--init", type=Path, help="folder of an earlier model, to start from its weights")
    parser.add_argument("--seed", type=integer(0), default=0, help="seed of the order of the samples")
    parser.add_argument(
        "--num_workers", type=integer(0), default=0, help="processes that generate samples (default: %(default)s)"
    )
    add_recipe_argument(parser)
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} already exists; delete it, or choose another folder")
    recipe, world_folder = RECIPES[args.recipe], args.work_dir / "world"
    args.work_dir.mkdir(parents=True, exist_ok=True)

    fetch(world_folder)
    if args.init:
        pipeline = InstructDiffusionPipeline.from_pretrained(
            args.init, readout=None, task_settings=task_settings(recipe), dtype=torch.float32
        )
        pipeline.unet.register_to_config(sample_size=recipe.side // pipeline.vae_scale_factor)
    else:
        if recipe.vae:
            vae = AutoencoderKL.from_pretrained(recipe.vae)
        else:
            vae = train_vae(recipe.world(world_folder), args.work_dir)
        torch.manual_seed(0)
        pipeline = build_pipeline(recipe, vae, world_folder)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        pipeline.unet.to(memory_format=torch.channels_last)
    else:
        use_plain_attention(pipeline)
    config = recipe.tuning if args.init else recipe.config
    config = dataclasses.replace(config, seed=args.seed, num_workers=args.num_workers)
    samples = training_samples(recipe, world_folder, pipeline.tokenizer, config.batch_size)
    pipeline = train(pipeline, samples, config, args.work_dir / "checkpoints", resume="latest")
    export_model(recipe, pipeline, args.output_dir, world_folder)


def training_samples(recipe: Recipe, world: Path, tokenizer: CLIPTokenizer, batch_size: int) -> MultiSizeDataset:
    """Return samples of all families. The images of a batch have one size."""
    by_frame: dict[tuple[int, int], list[str]] = {}
    for name in TRAINING_SOURCES:
        by_frame.setdefault(recipe.frame_of(name), []).append(name)
    datasets = [
        ImageDataset(mixture(recipe.world(world, frame=frame), SAMPLES, seed=1, names=names), tokenizer)
        for frame, names in by_frame.items()
    ]
    return MultiSizeDataset(datasets, batch_size)


if __name__ == "__main__":
    run_script(main)
