"""Train a readout for a model: a light U-Net that decodes masks and keypoints from the model's outputs.

    python examples/train_readout.py --model out/run/model --data coco-stuff=data/coco-stuff coco=data/coco \\
        --output_dir out/readout

The model is run on the training split of each dataset. The readout is trained on its outputs, and saved in the model's
folder. The table compares it with decoding by color on the test splits. A run that was stopped continues if it is
started again with the same options.
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
from instructdiffusion_pipeline.training.readout import ReadoutConfig, save_readout, train_readout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; the readout is saved there")
    add_data_argument(parser, MASKS_OR_JOINTS)
    parser.add_argument(
        "--samples",
        type=integer(1),
        default=2000,
        help="number of training samples per dataset (default: %(default)s)",
    )
    parser.add_argument(
        "--test_samples",
        type=integer(1),
        default=200,
        help="number of test samples per dataset, for the table (default: %(default)s)",
    )
    parser.add_argument(
        "--test_split", help="split for the table (default: the validation or test split of each dataset)"
    )
    parser.add_argument(
        "--size",
        type=integer(16),
        help="resolution of the readout in pixels (default: the model's resolution, at most 256)",
    )
    parser.add_argument(
        "--max_train_steps", type=integer(1), default=1500, help="number of updates (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=integer(1), default=8, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument("--num_workers", type=integer(0), default=0, help="data loader processes (default: 0)")
    parser.add_argument("--seed", type=integer(0), default=0, help="seed for samples, noise and weights (default: 0)")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for the model's outputs, the checkpoint and the table"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing readout of the model")
    args = parser.parse_args()
    check_model_folder(args.model)
    if (args.model / "readout").exists() and not args.overwrite:
        raise UsageError(f"--model: {args.model} has a readout; --overwrite replaces it.")
    for entry in args.data:
        if (name := entry.partition("=")[0]) in DATASETS and name not in MASKS_OR_JOINTS:
            raise UsageError(
                f"--data {name}: a readout is for datasets of masks or joints: {', '.join(MASKS_OR_JOINTS)}."
            )

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    resolution = max(map(pipeline.task_resolution, ("segmentation", "keypoints")))
    try:
        examples, held_out = load_examples(
            args.data, resolution, args.samples, args.test_samples, args.test_split, args.seed
        )
    except ValueError as error:
        raise UsageError(error) from error
    config = ReadoutConfig(
        args.size or min(256, resolution),
        args.max_train_steps,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    readout = train_readout(pipeline, examples, held_out, args.output_dir, config, args.batch_size)
    save_readout(readout, args.model, args.overwrite)
    print((args.output_dir / "held-out" / "table.md").read_text())
    print(f"The readout is in {args.model / 'readout'}")


if __name__ == "__main__":
    run_script(main)
