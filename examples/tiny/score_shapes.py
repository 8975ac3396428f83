"""Evaluate `instructdiffusion-tiny` on larger images of several shapes, at the images' own resolution.

    python examples/tiny/score_shapes.py --world out/tiny/world --samples 300 --output out/shapes

The rows are segmentation of images of four shapes, of objects of three sizes, of absent objects, of objects at the
rim, and of two and three objects at once; edits at 384 pixels; and watermarks at 64 and 256 pixels. The photographs,
and the drawing style in the segmentation rows, were not used in training. With `--slices 0.56` the model is also run
on overlapping slices of the images. The files are those of an evaluation; table.md has the scores. The score of an
absent object is 1 if its mask is empty, otherwise 0. A run that was stopped continues when it is started again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import edits
import sources
from held_out import OPACITIES, SEED, held_out_world
from recipes import RECIPES, Recipe, add_recipe_argument
from sources import GeneratedDataset
from world import UNSEEN_STYLE

from instructdiffusion_pipeline.cli import integer, load_pipeline, run_script
from instructdiffusion_pipeline.datasets.mixture import FixedTask, Source
from instructdiffusion_pipeline.evaluation import evaluate, examples_from
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

SHAPES = {"1:1": (256, 256), "3:2": (384, 256), "2:3": (256, 384), "16:9": (456, 256)}
SIZES = (0.3, 0.5)  # of the objects, relative to the shorter side
SIZE_ROWS = (0.12, 0.2), (0.2, 0.4), (0.4, 0.62)
EDITED = (384, 384)
WATERMARKED = (64, 256)
TINY_MODEL = Path(__file__).parent.parent / "instructdiffusion-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world", type=Path, required=True, help="folder `world` in the work folder of examples/tiny/train.py"
    )
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: %(default)s)")
    parser.add_argument(
        "--samples", type=integer(1), default=300, help="number of samples per row (default: %(default)s)"
    )
    parser.add_argument("--slices", type=float, help="side of overlapping slices, relative to the image's side")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    add_recipe_argument(parser)
    args = parser.parse_args()

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    sources = rows(RECIPES[args.recipe], args.world, args.samples)
    examples = [case for source in sources for case in examples_from(source, args.samples)]
    settings = {} if args.slices is None else {"segmentation": {"slices": args.slices}}
    evaluate(pipeline, examples, args.output, settings)
    print((args.output / "table.md").read_text())


def rows(recipe: Recipe, folder: Path, count: int) -> list[Source]:
    """Return sources of `count` examples each, from the material that `fetch` wrote to `folder`."""

    def dataset(example: Callable, **options: Any) -> GeneratedDataset:
        return GeneratedDataset(partial(example, held_out_world(recipe, folder, **options)), count, SEED)

    other_style = {"styles": (UNSEEN_STYLE,)}
    style = {**other_style, "sizes": SIZES}
    shapes = [
        Source(f"segmentation, {name}", dataset(sources.present, frame=frame, **style), Segmentation.from_annotation)
        for name, frame in SHAPES.items()
    ]
    alone = {**other_style, "frame": SHAPES["1:1"], "counts": {1: 1}}
    sizes = {
        f"one object of {low} to {high} of the side": dataset(sources.present, sizes=(low, high), **alone)
        for low, high in SIZE_ROWS
    }
    sizes["object absent"] = dataset(sources.absent, sizes=(SIZE_ROWS[0][0], SIZE_ROWS[-1][1]), **alone)
    rim = dataset(sources.at_the_rim, frame=SHAPES["3:2"], **style)
    several = {
        number: dataset(sources.one_each, frame=SHAPES["1:1"], counts={number: 1}, **style) for number in (2, 3)
    }
    return [
        *shapes,
        *(Source(f"segmentation, {name}", data, Segmentation.from_annotation) for name, data in sizes.items()),
        Source("segmentation, at the rim, 3:2", rim, Segmentation.from_annotation),
        *(Source(f"one of {number} objects", data, Segmentation.from_annotation) for number, data in several.items()),
        *(Source(f"{number} objects at once", data, sources.all_at_once) for number, data in several.items()),
        Source(
            "objects removed, 384 pixels",
            dataset(partial(sources.edited, change=edits.remove), frame=EDITED),
            Editing.from_annotation,
        ),
        Source("color edits, 384 pixels", dataset(sources.recolored_scene, frame=EDITED), Editing.from_annotation),
        *(
            Source(
                f"watermark, {side} pixels",
                dataset(partial(sources.watermarked, opacities=OPACITIES), frame=(side, side)),
                FixedTask(Restoration("watermark")),
            )
            for side in WATERMARKED
        ),
    ]


if __name__ == "__main__":
    run_script(main)
