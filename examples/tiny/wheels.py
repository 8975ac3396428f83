"""Install the packages that a machine without a network lacks.

    python examples/tiny/wheels.py FOLDER TARGET

The packages in `WHEELS` that cannot be imported are installed from the wheels in FOLDER to the folder TARGET. This
script needs no package except pip. `pack.py` and the bundle of the CUDA acceptance run download the wheels.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PIP = (sys.executable, "-m", "pip", "--quiet")
# What the checkout needs besides PyTorch, transformers, accelerate, scikit-image and pytest.
WHEELS = (
    *("diffusers", "importlib_metadata", "zipp", "requests", "urllib3", "charset_normalizer"),
    *("peft", "pycocotools", "hypothesis", "sortedcontainers"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of wheels")
    parser.add_argument("target", type=Path, help="folder for the packages, to be added to PYTHONPATH")
    args = parser.parse_args()
    if missing := [name for name in WHEELS if find_spec(name) is None]:
        options = ["--no-index", "--no-deps", "--no-compile", "--find-links", args.folder, "--target", args.target]
        subprocess.run([*PIP, "install", *options, *missing], check=True)


def download_wheels(folder: Path) -> None:
    """Download the `WHEELS` for Python 3.12 on x86-64 Linux, in the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line.partition("==")[0].replace("-", "_") in WHEELS]
    platforms = [f"--platform=manylinux{version}_x86_64" for version in ("_2_28", "_2_17", "2014")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [*PIP, "download", *options, "--dest", str(folder.resolve()), *pinned]
        subprocess.run(command, check=True, cwd=elsewhere)


def check_size(folder: Path, limit: float) -> float:
    """Return the size of the files in a folder in MB, and raise a ValueError if it is above `limit`."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if size > limit:
        raise ValueError(f"{folder.name} has {size:.1f} MB, more than {limit} MB.")
    return size


if __name__ == "__main__":
    main()
