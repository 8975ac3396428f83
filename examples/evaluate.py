"""Evaluate a model on data sets in their published layouts, and write a table, JSON and contact sheets.

    python examples/evaluate.py --data coco=/data/coco --data gopro=/data/GoPro --samples 500 --output out/scores

An interrupted run is resumed when the same command is started again. docs/datasets.md describes the layouts.
"""

import argparse
from pathlib import Path

from instructdiffusion_pipeline import Editing, Keypoints, Restoration, Segmentation
from instructdiffusion_pipeline.cli import UsageError, add_data_argument, integer, load_pipeline, run_script
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_test_sources
from instructdiffusion_pipeline.evaluation import evaluate, examples_from, whole_person
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
TESTABLE = [name for name, spec in DATASETS.items() if spec.test_split]
TASKS = (Keypoints, Segmentation, Restoration, Editing)  # of the data sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    add_data_argument(parser, TESTABLE)
    parser.add_argument("--split", help="split of all data sets (default: the validation or test split of each)")
    parser.add_argument("--image_column", help="column of a table with the input pictures")
    parser.add_argument("--instruction_column", help="column of a table with the instructions")
    parser.add_argument("--target_column", help="column of a table with the edited pictures")
    parser.add_argument(
        "--samples", type=integer(1), default=500, help="number of samples per data set (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=integer(1), help="number of denoising steps (default: the model's `task_settings`)"
    )
    parser.add_argument(
        "--batch_size", type=integer(1), default=8, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and the choice of samples (default: 0)")
    parser.add_argument("--resolution", type=integer(16), help="in pixels (default: the model's resolution)")
    parser.add_argument("--clip", help="folder or Hub id of a CLIP model, for the similarity of edited pictures")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="output folder (default: %(default)s)")
    args = parser.parse_args()
    options = {"image": args.image_column, "instruction": args.instruction_column, "edited": args.target_column}
    columns = {name: column for name, column in options.items() if column}

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    resolution = args.resolution or pipeline.default_resolution
    examples = []
    try:
        sources = load_test_sources(args.data, resolution, args.split, columns)
    except ValueError as error:
        raise UsageError(error) from error
    for source in sources:
        ask = whole_person if source.make_task == Keypoints.from_annotation else None
        examples += examples_from(source, args.samples, args.seed, ask)
    steps = {"num_inference_steps": args.steps} if args.steps else {}
    evaluate(
        pipeline,
        examples,
        args.output,
        {task.family: steps for task in TASKS if steps},
        args.batch_size,
        args.seed,
        resolution,
        clip=ClipSimilarity(args.clip, pipeline.device) if args.clip else None,
    )
    print((args.output / "table.md").read_text(), f"\nContact sheets: {args.output}/*.png")


if __name__ == "__main__":
    run_script(main)
