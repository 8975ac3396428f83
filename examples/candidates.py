"""Make candidates for the alignment stage: many output images per sample, from which people select the best.

    python examples/candidates.py --model out/run/model --data table=my-pictures --samples 1000 --output out/candidates

Look at the sheets in out/candidates/sheets. For each sample, move the best one or two images from
out/candidates/candidates into out/candidates/picks, or none if all are bad. Then fine-tune on the picks:

    python examples/train.py --recipe alignment --init out/run/model --data preferences=out/candidates \\
        --max_train_steps 300 --output_dir out/aligned

An interrupted run is resumed when it is started again with the same options.
"""

import argparse
from pathlib import Path

from instructdiffusion_pipeline import Mixture
from instructdiffusion_pipeline.cli import UsageError, add_data_argument, finite, integer, load_pipeline, run_script
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_sources
from instructdiffusion_pipeline.training.candidates import GUIDANCE_GRID, make_candidates

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    add_data_argument(parser, DATASETS)
    parser.add_argument("--samples", type=integer(1), default=1000, help="number of samples (default: 1000)")
    parser.add_argument(
        "--resolution", type=integer(16), help="side of the images in pixels (default: the model's resolution)"
    )
    text_scales, image_scales = (sorted(set(scales)) for scales in zip(*GUIDANCE_GRID, strict=True))
    for name, scales, what in (
        ("--guidance_scales", text_scales, "guidance scales of the instruction"),
        ("--image_guidance_scales", image_scales, "guidance scales of the image"),
    ):
        parser.add_argument(
            name,
            type=finite,
            nargs="+",
            default=scales,
            help=f"{what}; all combinations of the two options are run (default: {' '.join(map(str, scales))})",
        )
    parser.add_argument("--steps", type=integer(1), default=100, help="number of denoising steps (default: 100)")
    parser.add_argument("--batch_size", type=integer(1), default=4, help="samples per pipeline call (default: 4)")
    parser.add_argument("--seed", type=integer(0), default=0, help="seed of the samples and the noise (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the candidates")
    args = parser.parse_args()

    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    try:
        mixture = Mixture(load_sources(args.data, args.resolution or pipe.default_resolution), args.seed)
    except ValueError as error:
        raise UsageError(error) from error
    samples = [mixture[position] for position in range(min(args.samples, len(mixture)))]
    grid = [(text, image) for text in args.guidance_scales for image in args.image_guidance_scales]
    make_candidates(pipe, samples, args.output, grid, args.steps, args.batch_size, args.seed)
    print(f"The sheets are in {args.output / 'sheets'}. Move the best candidates into {args.output / 'picks'}.")


if __name__ == "__main__":
    run_script(main)
