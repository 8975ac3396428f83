"""Atomic writes of files and folders."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

JPEG = {"quality": 95, "subsampling": 0}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}}


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end of the block, and removed if the block raises.

    The block writes a file or a folder at the temporary path, which has the name of `path` inside a new hidden folder
    beside it. If the process is killed, that folder (`.NAME.*`) remains and can be deleted. An existing file at `path`
    is replaced. Raises an OSError if `path` is a folder that is not empty.

    ```python
    with atomic_write("scores.json") as partial:
        partial.write_text("{}")
    ```
    """
    path = Path(path)
    # On the same file system as the target, so that the rename does not copy files.
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch / path.name
        (scratch / path.name).replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 through `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def update_json(path: str | PathLike[str], changes: Mapping[str, Any]) -> None:
    """Replace entries of the object in a JSON file."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    write_text(path, json.dumps(content | dict(changes), indent=2) + "\n")


def save_image(path: str | PathLike[str], image: Image.Image) -> None:
    """Save an image through `atomic_write`, in the format that the suffix of `path` names.

    JPEG and WebP files are written at quality 95, JPEG without subsampling of colors.
    """
    with atomic_write(path) as partial:
        image.save(partial, **SAVE_OPTIONS.get(Path(path).suffix.lower(), {}))
