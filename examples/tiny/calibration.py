"""Calibrate the scores of `instructdiffusion-tiny` on its outputs for new training scenes.

    python examples/tiny/calibration.py --model out/model --world out/tiny/world --output_dir out/calibration

Slope and intercept are written to the model's model_index.json. reliability.md in the output folder compares scores
and correctness on scenes with photographs that were not used in training, which have the layout of those that score.py
uses. A run that was stopped continues if it is started again with the same options.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import sources
from held_out import SEED as HELD_OUT_SEED
from held_out import held_out_world
from recipes import RECIPES, add_recipe_argument
from sources import GeneratedDataset
from world import UNSEEN_STYLE, World

from instructdiffusion_pipeline.cli import integer, load_pipeline, run_script
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.evaluation import LazyExample, examples_from
from instructdiffusion_pipeline.evaluation.calibrate import calibrate, save_calibration
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

SEED = 4  # of the scenes; training uses 0 and 1, the readout 3, scoring 7
SIZES = (0.12, 0.62)  # of the objects: masks of small objects have lower raw scores, although they are as often right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; model_index.json is changed")
    parser.add_argument(
        "--world", type=Path, required=True, help="folder `world` in the work folder of examples/tiny/train.py"
    )
    parser.add_argument(
        "--samples", type=integer(1), default=600, help="number of samples for masks and for joints (default: 600)"
    )
    parser.add_argument(
        "--test_samples", type=integer(1), default=300, help="number of samples per row (default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model's outputs and the table")
    add_recipe_argument(parser)
    args = parser.parse_args()

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    recipe = RECIPES[args.recipe]
    scenes = partial(held_out_world, recipe, args.world)
    training = scenes(unseen_photographs=False, sizes=SIZES)
    frame = recipe.frame_of("keypoints")
    figures = scenes(frame=frame, unseen_photographs=False)
    examples = rows({"training scenes": training}, figures, args.samples, SEED)
    styles = {
        "styles of training": scenes(),
        "another drawing style": scenes(styles=(UNSEEN_STYLE,)),
    }
    held_out = rows(styles, scenes(frame=frame), args.test_samples, HELD_OUT_SEED)
    fits = calibrate(pipeline, examples, held_out, args.output_dir, batch_size=32)
    save_calibration(fits, args.model)
    print((args.output_dir / "reliability.md").read_text())


def rows(worlds: dict[str, World], figures: World, count: int, seed: int) -> list[LazyExample]:
    """Return `count` examples of masks in each of `worlds`, and of joints in the world `figures`."""

    def row(name: str, example: partial, make_task: Callable) -> list[LazyExample]:
        return examples_from(Source(name, GeneratedDataset(example, count, seed), make_task), count)

    masks = [
        row(f"masks, {name}", partial(sources.segmentation, world), Segmentation.from_annotation)
        for name, world in worlds.items()
    ]
    joints = row("joints", partial(sources.keypoints, figures), Keypoints.from_annotation)
    return [*(example for part in masks for example in part), *joints]


if __name__ == "__main__":
    run_script(main)
