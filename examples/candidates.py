"""The alignment stage's first half: answers of a model to many guidance settings, to pick the best from.

    python examples/candidates.py --model out/run/model --data table=my-pictures --samples 1000 --output out/candidates

Look at out/candidates/sheets, and move the best of out/candidates/candidates into out/candidates/picks: none, one or
two of each sample. Then fine-tune on them:

    python examples/train.py --recipe alignment --init out/run/model --data preferences=out/candidates \\
        --max_train_steps 300 --output_dir out/aligned
"""

import argparse
from pathlib import Path

from edit import TINY_MODEL, load
from train import source

from instructdiffusion_pipeline import model_resolution
from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.training.candidates import GRID, make_candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the model that ships)")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER", help="as in train.py")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--resolution", type=int, help="side of the pictures (default: what the model was trained at)")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=sorted({text for text, _ in GRID}))
    parser.add_argument("--image_guidance_scales", type=float, nargs="+", default=sorted({image for _, image in GRID}))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    pipeline = load(args.model)
    pipeline.set_progress_bar_config(disable=True)
    grid = [(text, image) for text in args.guidance_scales for image in args.image_guidance_scales]
    try:
        mixture = Mixture(
            [source(entry, args.resolution or model_resolution(pipeline)) for entry in args.data], args.seed
        )
        samples = [mixture[position] for position in range(min(args.samples, len(mixture)))]
        make_candidates(pipeline, samples, args.output, grid, args.steps, args.batch_size, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Look at {args.output / 'sheets'}, and move the best of candidates/ into picks/.")


if __name__ == "__main__":
    main()
