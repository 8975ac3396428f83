"""Edit one image with an instruction, at the resolution of the image.

    python examples/edit.py --image photo.jpg --instruction "make it night"

Writes the edited image to --output (edited.png). A second file (edited-side-by-side.png) shows the input, the edited
image and the output of the model. By default the model's `task_settings` for editing are used.
"""

import argparse
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from instructdiffusion_pipeline import Editing, WorkingSize, ask, working_size
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
    parser.add_argument("--image", type=Path, required=True, help="the image to edit")
    parser.add_argument("--instruction", required=True, help='what to do, for example "make it night"')
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    parser.add_argument("--output", type=Path, default=Path("edited.png"), help="output file (default: edited.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never the input")
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=0, help="seed of the noise (default: 0)")
    own = "(default: the model's `task_settings`)"
    parser.add_argument("--steps", type=integer(1), help=f"number of denoising steps {own}")
    parser.add_argument("--guidance_scale", type=finite, help=f"guidance scale of the instruction {own}")
    parser.add_argument("--image_guidance_scale", type=finite, help=f"guidance scale of the input image {own}")
    parser.add_argument(
        "--resolution",
        type=int,
        help="short side of the working size in pixels; 0 uses the image size (default: the model's resolution)",
    )
    args = parser.parse_args()

    # Check all arguments before the model is loaded.
    if not holds_rgb(args.output.suffix):
        parser.error(f"--output: must have the extension of a format for RGB images of any size; got {args.output}")
    image = open_image("--image", args.image)
    side_by_side = args.output.with_stem(args.output.stem + "-side-by-side")
    for path in (args.output, side_by_side):
        check_output("--output", path, args.overwrite, inputs=[args.image])
    if args.resolution is not None:
        check_size(image, args.resolution)

    pipe = load_pipeline(args.model)
    check_size(image, args.resolution, pipe.working_size)
    options = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "image_guidance_scale": args.image_guidance_scale,
        "resolution": args.resolution,
    }
    answer = ask(
        pipe,
        image,
        Editing(args.instruction),
        generator=torch.Generator().manual_seed(args.seed),
        **{name: value for name, value in options.items() if value is not None},
    )

    save_image(args.output, answer.data)
    panels = [("input", image), (args.instruction, answer.data), ("output of the model, enlarged", answer.picture)]
    save_image(side_by_side, labeled_grid([(args.image.name, panels)]))
    print(f"{args.output}: the edited image\n{side_by_side}: input, edited image and output of the model")


def holds_rgb(suffix: str) -> bool:
    """Whether Pillow writes and reads RGB images of any size in the format of a file name extension."""
    image, file = Image.new("RGB", (300, 200)), BytesIO()
    try:
        image.save(file, Image.registered_extensions()[suffix.lower()])
        found = Image.open(file)
    except Exception:  # the format is unknown, cannot be written or read, or has no RGB images
        return False
    return (found.size, found.mode) == (image.size, image.mode)


def check_size(image: Image.Image, resolution: int | None, rule: Callable[..., WorkingSize] = working_size) -> None:
    """Raise a UsageError if the aspect ratio of --image is too large or --resolution too small."""
    try:
        rule(*image.size, resolution, resize_mode="stretch")
    except ValueError as error:
        raise UsageError(str(error).replace("`image`", "--image").replace("`resolution`", "--resolution")) from error


if __name__ == "__main__":
    run_script(main)
