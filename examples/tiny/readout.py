"""Train a readout for `instructdiffusion-tiny` on its outputs for new training scenes.

    python examples/tiny/readout.py --model out/model --world out/tiny/world --work_dir out/readout \\
        --output_dir out/model-with-readout

The output folder contains the model with the component `readout`. The table in WORK_DIR/held-out compares it with
decoding by color, on scenes with photographs that were not used in training. An interrupted run is resumed when it is
started again.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from model import export_model
from recipes import RECIPES, Recipe, add_recipe_argument
from sources import source

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.evaluation import LazyExample, examples_from
from instructdiffusion_pipeline.training.readout import ReadoutConfig, train_readout

QUESTIONS = {"segmentation": 1600, "keypoints": 700, "few keypoints": 700, "pose": 400}
HELD_OUT = 50  # maximum number of examples per task in the table
SEED = 3  # of the scenes; training of the model uses 0 and 1, scoring 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--world", type=Path, required=True, help="folder `world` in the work folder of examples/tiny/train.py"
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the model's outputs and checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the model with its readout")
    add_recipe_argument(parser)
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"--output_dir: {args.output_dir} already exists; delete it, or choose another folder")
    recipe = RECIPES[args.recipe]
    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    examples = questions(recipe, args.world, QUESTIONS)
    few = {name: min(count, HELD_OUT) for name, count in QUESTIONS.items()}
    held_out = questions(recipe, args.world, few, unseen_photographs=True)
    # The images of a batch must have one size.
    config = ReadoutConfig(min(recipe.side, recipe.keypoint_side))
    train_readout(pipeline, examples, held_out, args.work_dir, config, batch_size=32)
    export_model(recipe, pipeline, args.output_dir, args.world)


def questions(recipe: Recipe, folder: Path, counts: Mapping[str, int], **options: Any) -> list[LazyExample]:
    """Return `counts` examples of each source. `options` are arguments of `World`."""
    worlds = {frame: recipe.world(folder, frame=frame, **options) for frame in set(map(recipe.frame_of, counts))}
    return [
        example
        for name, count in counts.items()
        for example in examples_from(source(name, worlds[recipe.frame_of(name)], count, SEED), count, SEED)
    ]


if __name__ == "__main__":
    run_script(main)
