"""Pack the files that a machine with one GPU and no network needs, besides a checkout, to train a model.

    python examples/tiny/pack.py --work_dir out/tiny --output build/tiny

The folder gets train_gpu.sh, the world of `fetch`, and wheels for Python 3.12 on x86-64 Linux. PyTorch, transformers,
accelerate and scikit-image must be installed on the machine.
"""

import argparse
import shutil
from pathlib import Path

from fetch import MERGES_FILE, fetch
from wheels import check_size, download_wheels

from instructdiffusion_pipeline.cli import UsageError, run_script
from instructdiffusion_pipeline.files import atomic_write

WORLD = ("photographs", "objects", MERGES_FILE, "CREDITS.md")  # without the downloaded packages
LIMIT = 25  # MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="work folder of examples/tiny/train.py")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    if args.output.exists():
        raise UsageError(f"--output: {args.output} exists; delete it, or choose another folder.")
    fetch(args.work_dir / "world")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as partial:
        (partial / "world").mkdir(parents=True)
        for name in WORLD:
            source = args.work_dir / "world" / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, partial / "world" / name)
        shutil.copy(Path(__file__).parent / "train_gpu.sh", partial)
        download_wheels(partial / "wheels")
        size = check_size(partial, LIMIT)
    print(f"{args.output} has {size:.1f} MB. In a checkout or next to one, on a machine with a GPU: bash train_gpu.sh")


if __name__ == "__main__":
    run_script(main)
