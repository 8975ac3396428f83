"""Run `instructdiffusion-tiny` for one task of each family and decode its outputs.

    python examples/demo.py --overwrite

Writes demo.png, with a row of images for each task, and demo-input.png, an image to try edit.py on, into the current
folder. The photographs come from the scikit-image package; the model was not trained on them. A sunflower emoji and a
drawn figure are pasted onto two of them, because the model was trained on such objects.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import data

from instructdiffusion_pipeline import Editing, Keypoints, Restoration, Segmentation, ask
from instructdiffusion_pipeline.cli import check_output, load_pipeline, run_script
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.image_grid import labeled_grid
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.restoration import add_noise

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
OVERLAYS = Path(__file__).parent / "demo"
INPUT, OUTPUT = Path("demo-input.png"), Path("demo.png")
SIDE = 256  # pixels
NOISE_SIGMA = 25.0  # gray levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", action="store_true", help=f"replace {OUTPUT} and {INPUT} if they exist")
    args = parser.parse_args()
    for path in (INPUT, OUTPUT):
        check_output("output", path, args.overwrite)

    pipe = load_pipeline(TINY_MODEL)
    sunflower = with_overlay(square(data.chelsea(), SIDE), "sunflower", (10, 10))
    figure = with_overlay(square(data.rocket(), SIDE), "figure", (0, 0))
    # Noise is added at the working size of the model, because resizing would remove it.
    noisy = add_noise(square(data.astronaut(), pipe.default_resolution), NOISE_SIGMA, np.random.default_rng(0))
    questions: list[tuple[Image.Image, Task]] = [
        (figure, Keypoints({"left wrist": "red", "right wrist": "blue", "left knee": "yellow"})),
        (sunflower, Segmentation({"sunflower": "blue"})),
        (noisy, Restoration("noise")),
        (square(data.coffee(), SIDE), Editing("make it night")),
    ]
    rows = []
    for image, task in questions:
        answer = ask(pipe, image, task, generator=torch.Generator().manual_seed(0))
        decoded = "input | result" if isinstance(answer.data, Image.Image) else "overlay"
        panels = [("input", image), (task.instruction(), answer.picture), (decoded, answer.overlay)]
        rows.append((task.family, [(caption, enlarge(picture)) for caption, picture in panels]))
    save_image(INPUT, sunflower)
    save_image(OUTPUT, labeled_grid(rows))
    print(f"The results are in {OUTPUT.resolve()}\n{INPUT} is an image to try edit.py on.")


def square(pixels: np.ndarray, side: int) -> Image.Image:
    """The center square of a photograph, resized to `side` pixels."""
    return ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)


def with_overlay(image: Image.Image, name: str, place: tuple[int, int]) -> Image.Image:
    """The image with one of the `OVERLAYS` pasted onto it, with its top left corner at `place`."""
    image, overlay = image.copy(), Image.open(OVERLAYS / f"{name}.png").convert("RGBA")
    image.paste(overlay, place, overlay)
    return image


def enlarge(image: Image.Image) -> Image.Image:
    """Enlarge an image without interpolation."""
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    run_script(main)
