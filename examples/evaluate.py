"""Evaluate a model on datasets in their published layouts, and write a table, JSON and contact sheets.

    python examples/evaluate.py --data coco=/data/coco --data gopro=/data/GoPro --samples 500 --output out/scores
    python examples/evaluate.py --tables paper --root /data --samples 500 --output out/paper

The second command scores every dataset of the paper that is in /data, and writes the paper's tables with the paper's
figures next to the scores. An interrupted run is resumed when the same command is started again. docs/datasets.md
describes the layouts.
"""

import argparse
from pathlib import Path

from instructdiffusion_pipeline import Editing, Keypoints, Restoration, Segmentation
from instructdiffusion_pipeline.cli import UsageError, add_data_argument, integer, load_pipeline, reading, run_script
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_test_sources, parse_entries
from instructdiffusion_pipeline.evaluation import evaluate, evaluate_paper, examples_from, whole_person
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity
from instructdiffusion_pipeline.evaluation.paper import PAPER_FOLDERS

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
TESTABLE = [name for name, spec in DATASETS.items() if spec.test_split]
TASKS = (Keypoints, Segmentation, Restoration, Editing)  # of the datasets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    add_data_argument(what, TESTABLE, required=False)
    what.add_argument("--tables", choices=["paper"], help="score the datasets of the paper's tables, in --root")
    parser.add_argument(
        "--root", type=Path, help=f"folder with the folders {', '.join(PAPER_FOLDERS)}, or some of them"
    )
    parser.add_argument("--split", help="split of all datasets (default: the validation or test split of each)")
    parser.add_argument("--image_column", help="column of a table with the input images")
    parser.add_argument("--instruction_column", help="column of a table with the instructions")
    parser.add_argument("--target_column", help="column of a table with the edited images")
    parser.add_argument(
        "--samples", type=integer(1), default=500, help="number of samples per dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=integer(1), help="number of denoising steps (default: the model's `task_settings`)"
    )
    parser.add_argument(
        "--batch_size", type=integer(1), default=8, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="seed of the noise and the choice of samples (default: 0)"
    )
    parser.add_argument("--resolution", type=integer(16), help="in pixels (default: that of the model for each task)")
    parser.add_argument("--clip", help="folder or Hub id of a CLIP model, for the similarity of edited images")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="output folder (default: %(default)s)")
    args = parser.parse_args()
    options = {"image": args.image_column, "instruction": args.instruction_column, "edited": args.target_column}
    columns = {name: column for name, column in options.items() if column}

    if args.tables and (args.split or args.clip or columns):
        raise UsageError("--tables paper: cannot be combined with --split, --clip or --*_column.")
    if args.data and columns and not any(entry.key == "table" for entry in parse_entries(args.data)):
        raise UsageError("--*_column: has an effect on tables only; --data has none.")
    if args.tables:
        check_root(args.root)
    elif args.root:
        raise UsageError("--root: is for --tables paper; --data names each folder.")

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": args.steps} if args.steps else {}
    settings = {task.family: steps for task in TASKS if steps}
    if args.tables:
        run = (args.samples, settings, args.batch_size, args.seed, args.resolution)
        print(evaluate_paper(pipeline, args.root, args.output, *run))
        return
    examples = []
    try:
        sources = load_test_sources(args.data, args.resolution or pipeline.default_resolution, args.split, columns)
    except ValueError as error:
        raise UsageError(error) from error
    if args.clip and not any(source.make_task == Editing.from_annotation for source in sources):
        raise UsageError("--clip: has an effect on editing only; --data has no dataset of edits.")
    with reading(f"--clip: no CLIP model could be loaded from {args.clip}"):
        clip = ClipSimilarity(args.clip, pipeline.device) if args.clip else None
    for source in sources:
        ask = whole_person if source.make_task == Keypoints.from_annotation else None
        examples += examples_from(source, args.samples, args.seed, ask)
    evaluate(
        pipeline,
        examples,
        args.output,
        settings,
        args.batch_size,
        args.seed,
        args.resolution,
        clip=clip,
    )
    print((args.output / "table.md").read_text(), f"\nContact sheets: {args.output}/*.png")


def check_root(root: Path | None) -> None:
    """Raise a UsageError if `root` has no folder of the paper's datasets."""
    if root is None or not any((root / folder).is_dir() for folder in PAPER_FOLDERS):
        found = "got none" if root is None else f"{root} has none of them"
        raise UsageError(f"--root: must be a folder with one or more of {', '.join(PAPER_FOLDERS)}; {found}.")


if __name__ == "__main__":
    run_script(main)
