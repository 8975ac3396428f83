"""Calibrate the scores of a model's masks and joints, so that 80 % of those with a score of 0.8 are right.

    python examples/calibrate.py --model out/run/model --data coco-stuff=data/coco-stuff coco=data/coco \\
        --output_dir out/calibration

The model is run on the training split of each dataset, without the random crops of training, and slope and intercept
are fitted to its scores. They are written to the model's model_index.json. reliability.md in the output folder
compares scores and correctness on the test splits. A run that was stopped continues if it is started again with the
same options.
"""

import argparse
from pathlib import Path

from instructdiffusion_pipeline.cli import (
    UsageError,
    add_data_argument,
    check_model_folder,
    integer,
    load_pipeline,
    run_script,
)
from instructdiffusion_pipeline.datasets.specs import DATASETS, MASKS_OR_JOINTS
from instructdiffusion_pipeline.evaluation import load_examples
from instructdiffusion_pipeline.evaluation.calibrate import calibrate, save_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; model_index.json is changed")
    add_data_argument(parser, MASKS_OR_JOINTS)
    parser.add_argument(
        "--samples", type=integer(1), default=1000, help="training samples per dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--test_samples", type=integer(1), default=500, help="test samples per dataset (default: %(default)s)"
    )
    parser.add_argument("--test_split", help="split for reliability.md (default: that of each dataset)")
    parser.add_argument(
        "--batch_size", type=integer(1), default=8, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="seed of the choice of samples (default: 0)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model's outputs and the table")
    args = parser.parse_args()
    check_model_folder(args.model)
    for entry in args.data:
        if (name := entry.partition("=")[0]) in DATASETS and name not in MASKS_OR_JOINTS:
            raise UsageError(
                f"--data {name}: there are scores for datasets of masks or joints only: {', '.join(MASKS_OR_JOINTS)}."
            )

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    resolution = max(map(pipeline.task_resolution, ("segmentation", "keypoints")))
    try:
        examples, held_out = load_examples(
            args.data, resolution, args.samples, args.test_samples, args.test_split, args.seed, augment=False
        )
    except ValueError as error:
        raise UsageError(error) from error
    fits = calibrate(pipeline, examples, held_out, args.output_dir, args.batch_size)
    save_calibration(fits, args.model)
    print((args.output_dir / "reliability.md").read_text())


if __name__ == "__main__":
    run_script(main)
