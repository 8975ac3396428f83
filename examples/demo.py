"""What `make demo` shows: the model that ships answers one question of each family, and its answers are read as data.

Photographs come from the scikit-image package and were never trained on. The model's world is photographs with emoji
and drawn figures laid over them, so a sunflower and a figure are laid over two of them here.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from edit import TINY_MODEL, load, save, side_by_side
from PIL import Image
from skimage import data

from instructdiffusion_pipeline import (
    Editing,
    Keypoints,
    Restoration,
    Segmentation,
    ask,
    load_presets,
    model_resolution,
)
from instructdiffusion_pipeline.image_grid import stack
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.restoration import add_noise

INPUT, OUTPUT = Path("demo-input.png"), Path("demo.png")
OVERLAYS = Path(__file__).parent / "demo"
SIDE = 256  # pixels
SIGMA = 25.0  # grey levels


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes nothing, and says so
    pipeline = load(str(TINY_MODEL))
    presets = load_presets(TINY_MODEL)
    sunflower, figure = overlaid(data.chelsea(), "sunflower", (10, 10)), overlaid(data.rocket(), "figure", (0, 0))
    # The noise is as coarse as the model's pixels.
    small = square(data.astronaut()).resize((model_resolution(pipeline),) * 2, Image.Resampling.LANCZOS)
    questions: list[tuple[Image.Image, Task]] = [
        (figure, Keypoints({"left wrist": "red", "right wrist": "blue", "left knee": "yellow"})),
        (sunflower, Segmentation({"sunflower": "blue"})),
        (add_noise(small, SIGMA, np.random.default_rng(0)), Restoration("noise")),
        (square(data.coffee()), Editing("make it night")),
    ]
    rows = []
    for image, task in questions:
        generator = torch.Generator().manual_seed(0)
        answer = ask(pipeline, image, task, generator=generator, **presets[task.family])
        panels = {
            f"{task.family}: the input": image,
            f'"{task.instruction()}"': answer.picture,
            "what is read from it": answer.overlay,
        }
        rows.append(side_by_side({caption: enlarged(picture) for caption, picture in panels.items()}))
    save(sunflower, INPUT)
    save(stack(rows), OUTPUT)
    print(f"look at {OUTPUT.resolve()}\n{INPUT} is a picture to try edit.py on")


def overlaid(photograph: np.ndarray, name: str, place: tuple[int, int]) -> Image.Image:
    """The middle of a photograph with one of the overlays on it."""
    image, overlay = square(photograph), Image.open(OVERLAYS / f"{name}.png").convert("RGBA")
    image.paste(overlay, place, overlay)
    return image


def square(pixels: np.ndarray) -> Image.Image:
    """The middle square of a photograph, `SIDE` pixels wide."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def enlarged(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
