"""Write the model of the newest checkpoint of a training run, in half precision.

python examples/tiny/export.py out/tiny/checkpoints out/model --world out/tiny/world --recipe gpu
"""

import argparse
from pathlib import Path

import torch
from model import export_model
from recipes import RECIPES, add_recipe_argument

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError, run_script
from instructdiffusion_pipeline.training import checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="folder of the checkpoints")
    parser.add_argument("output_dir", type=Path, help="new folder for the model")
    parser.add_argument("--world", type=Path, required=True, help="folder `world` of the training run")
    add_recipe_argument(parser)
    args = parser.parse_args()
    if args.output_dir.exists():
        parser.error(f"output_dir: {args.output_dir} already exists; delete it, or choose another folder")
    found = checkpoints.list_checkpoints(args.checkpoints)
    if not found:
        raise UsageError(f"There is no checkpoint in {args.checkpoints}.")
    pipeline = InstructDiffusionPipeline.from_pretrained(found[-1], dtype=torch.float32)
    export_model(RECIPES[args.recipe], pipeline, args.output_dir, args.world)


if __name__ == "__main__":
    run_script(main)
