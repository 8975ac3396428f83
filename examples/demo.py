"""What `make demo` shows: the model that ships paints a named object in a photograph, and takes noise out of another.

Photographs come from the scikit-image package and were never trained on. The model's world is photographs with emoji
laid over them, so a sunflower is laid over the first one here.
"""

from pathlib import Path

import numpy as np
import torch
from edit import TINY_MODEL, load, save, side_by_side, trained_size
from PIL import Image
from skimage import data

from instructdiffusion_pipeline.tasks import restoration, segmentation

INPUT, OUTPUT = Path("demo-input.png"), Path("demo.png")
SUNFLOWER = Path(__file__).parent / "demo" / "sunflower.png"
COLOR = "blue"
SIGMA = 25.0  # grey levels
# What examples/tiny/score.py scores the model with.
SEGMENTATION = {"num_inference_steps": 20, "guidance_scale": 1.5, "image_guidance_scale": 1.0}
DENOISING = {"num_inference_steps": 20, "guidance_scale": 0.75, "image_guidance_scale": 0.75}
SIDE, PLACE = 256, (90, 20)  # pixels: the width of the pictures, and where the sunflower goes


def main() -> None:
    pipeline = load(str(TINY_MODEL))
    photograph = square(data.coffee())
    sunflower = Image.open(SUNFLOWER).convert("RGBA")
    photograph.paste(sunflower, PLACE, sunflower)
    save(photograph, INPUT)
    paint = f"mark the sunflower in {COLOR}"
    painted = ask(pipeline, paint, photograph, SEGMENTATION)
    mask = Image.fromarray(segmentation.read(photograph, painted, COLOR))

    # The noise is as coarse as the model's pixels: it works at 64 x 64.
    small = square(data.astronaut()).resize((trained_size(pipeline),) * 2, Image.Resampling.LANCZOS)
    noisy = restoration.add_noise(small, SIGMA, np.random.default_rng(0))
    clean = ask(pipeline, "remove the noise", noisy, DENOISING)

    rows = [
        {"a photograph, and an emoji laid over it": photograph, f'"{paint}"': painted, "the mask read from it": mask},
        {
            f"a photograph with noise of sigma {SIGMA:g}": noisy,
            '"remove the noise"': clean,
            "without the noise": small,
        },
    ]
    save(stack([side_by_side({caption: enlarged(image) for caption, image in row.items()}) for row in rows]), OUTPUT)
    print(f"look at {OUTPUT.resolve()}")


def ask(pipeline, instruction: str, image: Image.Image, settings: dict[str, float]) -> Image.Image:
    """The answer to one instruction, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(instruction, image, resolution=trained_size(pipeline), generator=generator, **settings).images[0]


def square(pixels: np.ndarray) -> Image.Image:
    """The middle square of a photograph, `SIDE` pixels wide."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def enlarged(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


def stack(rows: list[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


if __name__ == "__main__":
    main()
