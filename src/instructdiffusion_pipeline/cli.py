"""Shared code of the command-line scripts: exit statuses, loading models and images, argument checks."""

import argparse
import errno
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError

from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline, upright_rgb

FAILURES = (OSError, ValueError, FloatingPointError, HTTPError, SafetensorError, torch.OutOfMemoryError)
# The extra of this package that installs an optional module.
EXTRAS = {
    "accelerate": "train",
    "datasets": "data",
    "matplotlib": "eval",
    "peft": "train",
    "pycocotools": "eval",
    "pywt": "eval",
    "skimage": "eval",
    "tensorboard": "train",
}
# Messages of failed writes from safetensors (Rust) and torch (C++).
FAILED_WRITES = ("No space left on device", "PytorchStreamWriter failed", "unexpected pos", "iostream error")


class UsageError(ValueError):
    """An invalid command-line argument: `run_script` ends with exit status 2."""


def run_script(main: Callable[[], None]) -> None:
    """Call `main`, and end the process with a one-line message and an exit status if it fails.

    The statuses are 2 for an invalid argument (`UsageError`, or an error of argparse), 1 for other failures such as a
    missing optional package, 130 for Ctrl-C and 141 if the output pipe was closed (SIGPIPE). Programming errors, such
    as TypeError, keep their traceback.

    ```python
    if __name__ == "__main__":
        run_script(main)
    ```
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the line of a progress bar
        fail("interrupted", 130)
    except BrokenPipeError:
        # Python flushes the standard output again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UsageError as error:
        fail(error, 2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        fail(f'{error}; `pip install ".[{extra}]"` installs it.', 1)
    except Exception as error:
        if is_disk_full(error):
            fail(f"disk full: {error}", 1)
        if not isinstance(error, FAILURES):
            raise
        fail(error, 1)


def fail(message: object, status: int) -> NoReturn:
    """End the process with one line on the standard error output."""
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    sys.exit(status)


@contextmanager
def reading(message: str) -> Iterator[None]:
    """Raise a UsageError with `message` and the cause if the block fails.

    For blocks that load a file with a library: a damaged file can raise any exception.
    """
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{message} ({type(error).__name__}: {cause}).") from error


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full, as reported by Python, C++ or Rust code."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(words in str(error) for words in FAILED_WRITES)


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in a range, both ends included."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {limits}; got {value}")
        return value

    return integer


def split_names(names: str) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number; got {text}")
    return value


def add_data_argument(
    parser: argparse._ActionsContainer, names: Iterable[str], required: bool = True, help: str = "datasets"
) -> None:
    """Add the option `--data NAME=FOLDER ...` with a NAME from `names`; see `datasets.specs.parse_entries`."""
    parser.add_argument(
        "--data",
        action="extend",
        nargs="+",
        required=required,
        metavar="NAME=FOLDER",
        help=f"{help}; may be repeated; NAME is one of {', '.join(names)}",
    )


def check_model_folder(folder: Path) -> None:
    """Raise a UsageError if `folder`, the value of `--model`, is not the folder of a pipeline."""
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"--model: must be the folder of a pipeline; there is no {folder}/model_index.json.")


def load_pipeline(model: str | Path) -> InstructDiffusionPipeline:
    """Load the model of the option `--model`: in half precision on a GPU, in float32 on a CPU.

    Args:
        model: a folder or a Hub id.

    Raises:
        UsageError: if there is no such folder or repository, or the model cannot be loaded or run.
        OSError: if the Hub cannot be reached.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(f"--model: must be the folder of a pipeline, but {model} has no model_index.json.")
    if not folder.exists():
        try:
            validate_repo_id(str(model))
        except HFValidationError:
            raise UsageError(f"--model: must be a folder or a Hub id; there is no folder {model}.") from None
    cuda = torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    if folder.exists():
        with reading(f"--model: no pipeline could be loaded from {model}"):
            pipeline = InstructDiffusionPipeline.from_pretrained(model, dtype=dtype)
    else:
        try:
            pipeline = InstructDiffusionPipeline.from_pretrained(model, dtype=dtype)
        except OSError as error:
            cause = error.__cause__ or error
            unknown = isinstance(cause, RepositoryNotFoundError | OfflineModeIsEnabled)
            message = (
                f"--model: must be a folder or a Hub id; there is no folder {model}, and the Hub answers: {cause}"
            )
            raise (UsageError if unknown else OSError)(message) from error
    pipeline.to("cuda" if cuda else "cpu")
    check_runs(pipeline, f"--model: the pipeline of {model} cannot run")
    return pipeline


def check_runs(pipeline: InstructDiffusionPipeline, message: str) -> None:
    """Run the last of twenty steps on a small image, and raise a UsageError with `message` if this fails.

    Some invalid values in configurations raise an error only when the model runs.
    """
    progress_bar = pipeline.__dict__.get("_progress_bar_config")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    side = max(64, 2 * pipeline.size_multiple)  # group norm needs more than one latent pixel at the lowest level
    picture = Image.new("RGB", (side, side))
    with reading(message):
        pipeline("", picture, 20, 0.5, 0.5, strength=0.05, resolution=0, generator=generator)
    pipeline.set_progress_bar_config(**(progress_bar or {}))


def open_image(option: str, path: Path) -> Image.Image:
    """Read an image as RGB, with its EXIF orientation applied.

    Raises:
        UsageError: if `path`, the value of the command-line option `option`, cannot be read as an image, or is large
            enough to be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return upright_rgb(Image.open(path))
    # Pillow reports a damaged PNG file as a SyntaxError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UsageError(f"{option}: {path} cannot be read as an image ({error}).") from error


def check_output(option: str, path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that the file `path`, the value of the command-line option `option`, may be written.

    Raises:
        UsageError: if the folder does not exist, the file is one of `inputs`, or it exists and `overwrite` is False.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{option}: there is no folder {path.parent}.")
    if not path.exists():
        return
    if any(path.samefile(source) for source in inputs):
        raise UsageError(f"{option}: must not overwrite the input {path}.")
    if path.is_dir():
        raise UsageError(f"{option}: must be a file, but {path} is a folder.")
    if not overwrite:
        raise UsageError(f"{option}: {path} exists; --overwrite replaces it.")
