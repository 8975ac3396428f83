"""Compare a multi-task model with single-task models, as in the paper's ablation.

    python examples/tiny/ablation.py --work_dir out/tiny --output_dir out/ablation

All models are trained on the same number of cached samples, from random weights except for the VAE, which is from the
recipe or otherwise from the work folder. A single-task model is trained only on the samples of one task family. All
models are scored on the held-out examples, and ablation.md has both scores for each row. An interrupted run is resumed
when it is started again.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from held_out import rows
from model import build_pipeline, use_plain_attention
from recipes import RECIPES, Recipe, add_recipe_argument
from sources import mixture

from instructdiffusion_pipeline import InstructDiffusionPipeline, export
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.evaluation import LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.evaluation.report import format_score
from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.fingerprint import check_run_config
from instructdiffusion_pipeline.training import CachedDataset, ImageDataset, cache_samples, train

SAMPLES = 64_000  # cached
SOURCES = {
    "segmentation": {"segmentation", "left or right", "absent"},
    "keypoints": {"pose", "keypoints", "few keypoints"},
    "restoration": {"noise", "blur", "watermark"},
    "editing": {"objects", "color edits"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="work folder of examples/tiny/train.py")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for the models, their scores and the table"
    )
    parser.add_argument("--steps", type=int, default=2_000, help="training steps per model (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="samples per row (default: %(default)s)")
    add_recipe_argument(parser)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    cases = cases_by_family(recipe, args.work_dir / "world", args.samples)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_run_config(args.output_dir, "run.json", {"steps": args.steps}, "models of the same number of steps")
    together: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for name, sources in {"all": None, **SOURCES}.items():
        folder = args.output_dir / name
        if not folder.exists():
            train_model(recipe, args.work_dir, sources, args.steps, folder)
        pipeline = InstructDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        examples = cases[name] if sources else [case for family in cases.values() for case in family]
        folder = args.output_dir / f"{name}-scores"
        # The models are trained with images of one size, also of keypoints.
        results = evaluate(pipeline, examples, folder, batch_size=32, resolution=recipe.side)
        (alone if sources else together).update({row["row"]: row["scores"] for row in results["rows"]})
    markdown = table(together, alone)
    write_text(args.output_dir / "ablation.md", markdown)
    print(markdown)


def train_model(recipe: Recipe, work: Path, sources: set[str] | None, steps: int, folder: Path) -> None:
    """Train a model on the cached samples of `sources` (None: all samples), and write it to `folder`."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(recipe.vae or work / "vae")
    pipeline = build_pipeline(recipe, vae, work / "world")
    use_plain_attention(pipeline)
    samples = ImageDataset(mixture(recipe.world(work / "world"), SAMPLES, seed=1), pipeline.tokenizer)
    cache_samples(samples, SAMPLES, pipeline, work / "samples", embeddings=False)  # for the first model only
    dataset = CachedDataset(work / "samples", only=sources)
    config = dataclasses.replace(recipe.config, max_train_steps=steps)
    pipeline = train(pipeline, dataset, config, folder.with_name(f"{folder.name}-checkpoints"), resume="latest")
    export(pipeline.to(dtype=torch.float16), folder)


def cases_by_family(recipe: Recipe, world: Path, count: int) -> dict[str, list[LazyExample]]:
    """Return `count` held-out examples for each row, by task family."""
    cases: dict[str, list[LazyExample]] = {family: [] for family in SOURCES}
    for source in rows(recipe, world, count):
        examples = examples_from(source, count)
        cases[examples[0].open().tasks[0].family] += examples
    return cases


def table(together: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """Return a table of the first metric of each row: PSNR in dB, others in percent."""
    lines = ["| | metric | multi-task model | single-task model |", "| --- | --- | --: | --: |"]
    for row, scores in together.items():
        metric = next(iter(scores))
        values = (format_score(metric, columns[metric]["model"]) for columns in (scores, alone[row]))
        lines.append(f"| {row} | {metric} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
