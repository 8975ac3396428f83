"""Make the bundle of the CUDA acceptance run: the files that a machine with one GPU and no network needs.

    python tests/cuda/bundle.py --output build/cuda

The folder gets run.sh, wheels for Python 3.12 on x86-64 Linux (PyTorch, transformers, accelerate, scikit-image and
pytest must be installed on the machine), and a small dataset in COCO-Stuff's layout, of scikit-image's photographs
with a sunflower. It is used with a checkout.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from instructdiffusion_pipeline.cli import UsageError, run_script
from instructdiffusion_pipeline.files import atomic_write

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT / "examples" / "tiny"))

from wheels import check_size, download_wheels  # noqa: E402

LIMIT = 20  # MB
SPLITS = {"train2017": 64, "val2017": 16}  # images
SIZE = (640, 480)
LABELS = "0: unlabeled\n1: horse\n2: sunflower\n"  # no image shows a horse
SUNFLOWER, UNLABELED = 1, 255  # pixel values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the bundle")
    args = parser.parse_args()
    if args.output.exists():
        raise UsageError(f"--output: {args.output} exists; delete it, or choose another folder.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as partial:
        partial.mkdir()
        shutil.copy(HERE / "run.sh", partial)
        write_data(partial / "data", SPLITS)
        download_wheels(partial / "wheels")
        size = check_size(partial, LIMIT)
    print(f"{args.output} has {size:.1f} MB. In a checkout or next to one, on a machine with a GPU: bash run.sh")


def write_data(folder: Path, splits: dict[str, int]) -> None:
    """Write a dataset in COCO-Stuff's layout: photographs with a sunflower in the center square."""
    rng = random.Random(0)
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    sprite = Image.open(ROOT / "examples" / "demo" / "sunflower.png").convert("RGBA")
    for split, count in splits.items():
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for number in range(count):
            image = crop(Image.fromarray(photographs[number % len(photographs)]), rng)
            side = rng.randint(160, 280)
            flower = sprite.resize((side, side), Image.Resampling.LANCZOS)
            margin = (SIZE[0] - SIZE[1]) // 2
            place = margin + rng.randint(0, SIZE[1] - side), rng.randint(0, SIZE[1] - side)
            image.paste(flower, place, flower)
            label = Image.new("L", SIZE, UNLABELED)
            label.paste(SUNFLOWER, place, Image.fromarray(np.asarray(flower.getchannel("A")) > 127))
            image.save(folder / "images" / split / f"{number:06d}.jpg", quality=90)
            label.save(folder / "annotations" / split / f"{number:06d}.png")
    (folder / "labels.txt").write_text(LABELS)


def crop(photograph: Image.Image, rng: random.Random) -> Image.Image:
    """A random part of a photograph, `SIZE` pixels."""
    scale = rng.uniform(0.7, 1) * min(photograph.width / SIZE[0], photograph.height / SIZE[1])
    width, height = round(scale * SIZE[0]), round(scale * SIZE[1])
    left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
    return photograph.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + width, top + height))


if __name__ == "__main__":
    run_script(main)
