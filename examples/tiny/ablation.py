"""One model for all families against one for each, at equal samples, as in the paper's ablation.

    python examples/tiny/ablation.py --work_dir out/tiny --output_dir out/ablation

Each starts from nothing but the autoencoder, and sees as many samples as the others, out of those that the recipe has
cached in the work folder: the one for all some of every family, the others theirs alone, more often. All are asked the
held-out questions with the settings of the shipped model, and ablation.md has both scores of every row. A run that was
stopped goes on where it was.
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
from train import CONFIG

from instructdiffusion_pipeline import InstructDiffusionPipeline, export, load_presets
from instructdiffusion_pipeline.evaluation import LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.evaluation.report import format_score
from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.fingerprint import check_run_config
from instructdiffusion_pipeline.training import CachedDataset, train

SOURCES = {
    "segmentation": {"segmentation", "left or right", "absent"},
    "keypoints": {"pose", "keypoints", "few keypoints"},
    "restoration": {"noise", "blur", "watermark"},
    "editing": {"objects", "grades"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="of examples/tiny/train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="for a folder of each model, and the table")
    parser.add_argument("--steps", type=int, default=2_000, help="updates of each model")
    parser.add_argument("--samples", type=int, default=500, help="questions of each row")
    args = parser.parse_args()
    presets = load_presets(Path(__file__).parent)
    cases = cases_by_family(args.work_dir / "world", args.samples)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_run_config(args.output_dir, "run.json", {"steps": args.steps}, "models of as many steps")
    together: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for name, sources in {"all": None, **SOURCES}.items():
        folder = args.output_dir / name
        if not folder.exists():
            train_model(args.work_dir, sources, args.steps, folder)
        pipeline = InstructDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        asked = cases[name] if sources else [case for family in cases.values() for case in family]
        results = evaluate(pipeline, asked, args.output_dir / f"{name}-scores", presets, batch_size=32)
        (alone if sources else together).update({row["row"]: row["scores"] for row in results["rows"]})
    written = table(together, alone)
    write_text(args.output_dir / "ablation.md", written)
    print(written)


def train_model(work: Path, sources: set[str] | None, steps: int, folder: Path) -> None:
    """Train one from nothing but the autoencoder on the cached samples of `sources` (None: of all) into `folder`."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    pipeline = build_pipeline(vae, work / "world" / "bpe_simple_vocab_16e6.txt.gz")
    use_plain_attention(pipeline)
    samples = CachedDataset(work / "samples", only=sources)
    config = dataclasses.replace(CONFIG, max_train_steps=steps)
    pipeline = train(pipeline, samples, config, folder.with_name(f"{folder.name}-checkpoints"), resume="latest")
    export(pipeline.to(dtype=torch.float16), folder)


def cases_by_family(world: Path, count: int) -> dict[str, list[LazyExample]]:
    """`count` held-out questions a row, by the family of their task."""
    cases: dict[str, list[LazyExample]] = {family: [] for family in SOURCES}
    for source in rows(world, count):
        asked = examples_from(source, count)
        cases[asked[0].open().tasks[0].family] += asked
    return cases


def table(together: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """The first metric of each row: shares in percent, PSNR in dB."""
    lines = ["| | metric | one model for all | one for its family alone |", "| --- | --- | --: | --: |"]
    for row, scores in together.items():
        metric = next(iter(scores))
        both = (format_score(metric, of[metric]["model"]) for of in (scores, alone[row]))
        lines.append(f"| {row} | {metric} | {' | '.join(both)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
