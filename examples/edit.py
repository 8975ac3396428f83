"""Edit one picture: ask a model in words, get its answer and a side-by-side picture.

python examples/edit.py --model path/to/model --image photo.jpg --instruction "make it winter"

The defaults are the full-size model's. The small model that ships wants other scales, see its presets.json.
"""

import argparse
import textwrap
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from instructdiffusion_pipeline import InstructDiffusionPipeline, model_resolution, upright_rgb, working_size

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
MARGIN, PANEL_HEIGHT, FONT_SIZE = 12, 320, 16  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the model that ships)")
    parser.add_argument("--output", type=Path, default=Path("edited.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="how much the instruction counts")
    parser.add_argument("--image_guidance_scale", type=float, default=1.25, help="how much the input picture counts")
    parser.add_argument("--resolution", type=int, help="working size (default: the one the model was trained at)")
    args = parser.parse_args()
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        parser.error(f"--output: no picture can be written with the ending {args.output.suffix!r}; try .png or .jpg")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")

    try:
        image = open_picture(args.image)
    except (OSError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        parser.error(f"--image: {args.image} cannot be read as a picture ({error})")
    pipeline = load(args.model)
    resolution = args.resolution or model_resolution(pipeline)
    box = working_size(*image.size, resolution, pipeline.vae_scale_factor).box
    answer = pipeline(
        args.instruction,
        image,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        resolution=resolution,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    beside = args.output.with_stem(args.output.stem + "-side-by-side")
    save(answer, args.output)
    # Working sizes are multiples of 64, so what does not fit is cropped; the input is shown as the answer sees it.
    shown = image.resize(image.size, box=box)
    save(side_by_side({"input": shown, args.instruction: answer}), beside)
    print(f"{args.output}: the answer\n{beside}: beside the input")
    if box != (0, 0, *image.size):
        left, top, right, bottom = (round(edge) for edge in box)
        print(f"It shows the part from ({left}, {top}) to ({right}, {bottom}) of the input, enlarged to its size.")


def open_picture(path: Path) -> Image.Image:
    """The picture in `path`, upright, RGB; one large enough to be a decompression bomb is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return upright_rgb(Image.open(path))


def load(model: str) -> InstructDiffusionPipeline:
    """The pipeline of a folder or Hub id: half precision on a GPU, float32 on a CPU."""
    cuda = torch.cuda.is_available()
    pipeline = InstructDiffusionPipeline.from_pretrained(model, dtype=torch.float16 if cuda else torch.float32)
    return pipeline.to("cuda" if cuda else "cpu")


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Pictures in a row, each brought to one height, under its caption."""
    font = ImageFont.load_default(FONT_SIZE)
    pictures = [ImageOps.contain(image, (4 * PANEL_HEIGHT, PANEL_HEIGHT)) for image in panels.values()]
    captions = [
        textwrap.fill(caption, max(8, 2 * picture.width // FONT_SIZE))
        for caption, picture in zip(panels, pictures, strict=True)
    ]
    header = max(caption.count("\n") + 1 for caption in captions) * (FONT_SIZE + 5) + MARGIN
    width = sum(picture.width + MARGIN for picture in pictures) + MARGIN
    sheet = Image.new("RGB", (width, header + PANEL_HEIGHT + 2 * MARGIN), "white")
    pen, left = ImageDraw.Draw(sheet), MARGIN
    for caption, picture in zip(captions, pictures, strict=True):
        pen.multiline_text((left, MARGIN), caption, "black", font)
        sheet.paste(picture, (left, header + MARGIN))
        left += picture.width + MARGIN
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write beside `path` and rename into place, so that a half-written picture never has its name."""
    partial = path.with_stem(path.stem + ".partial")
    picture.save(partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
