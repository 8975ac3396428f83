"""Edit one picture with an instruction, and show the answer beside the input.

    python examples/edit.py --image photo.jpg --instruction "make it night"

Writes the answer to --output (edited.png) and both pictures to a second file (edited-side-by-side.png). Without
further options the model's own settings for editing are used, as `pipe(instruction, image)` uses them.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from instructdiffusion_pipeline import working_size
from instructdiffusion_pipeline.cli import (
    UsageError,
    check_output,
    finite,
    integer,
    load_pipeline,
    open_image,
    run_script,
)
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.image_grid import labeled_grid

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="the picture to edit")
    parser.add_argument("--instruction", required=True, help='what to do, for example "make it night"')
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub id (default: the model that ships)")
    parser.add_argument("--output", type=Path, default=Path("edited.png"), help="the answer (default: edited.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist; never the input")
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=0, help="seed of the noise (default: 0)")
    own = "(default: the model's own)"
    parser.add_argument("--steps", type=integer(1), help=f"number of denoising steps {own}")
    parser.add_argument("--guidance_scale", type=finite, help=f"weight of the instruction {own}")
    parser.add_argument("--image_guidance_scale", type=finite, help=f"weight of the input picture {own}")
    parser.add_argument(
        "--resolution", type=int, help=f"long side at which the model works, in pixels; 0: as the picture {own}"
    )
    args = parser.parse_args()

    # Check all arguments before the model is loaded.
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output: must end in the suffix of a picture format, such as .png, but is {args.output}")
    image = open_image("--image", args.image)
    side_by_side = args.output.with_stem(args.output.stem + "-side-by-side")
    for path in (args.output, side_by_side):
        check_output("--output", path, args.overwrite, inputs=[args.image])
    if args.resolution is not None:
        answer_box(image, args.resolution)

    pipe = load_pipeline(args.model)
    box = answer_box(image, pipe.default_resolution if args.resolution is None else args.resolution)
    # None stands for the model's own setting.
    answer = pipe(
        args.instruction,
        image,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        resolution=args.resolution,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]

    save_image(args.output, answer)
    # The input is cropped like the answer.
    shown = image.resize(image.size, box=box)
    save_image(side_by_side, labeled_grid([(args.image.name, [("input", shown), (args.instruction, answer)])]))
    print(f"{args.output}: the answer\n{side_by_side}: input and answer")
    if box != (0, 0, *image.size):
        left, top, right, bottom = (round(edge) for edge in box)
        print(f"The answer shows the part from ({left}, {top}) to ({right}, {bottom}) of the input, enlarged.")


def answer_box(image: Image.Image, resolution: int) -> tuple[float, float, float, float]:
    """The part of the input that the answer shows: (left, top, right, bottom)."""
    try:
        return working_size(*image.size, resolution).box
    except ValueError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    run_script(main)
