"""One module per dataset format. Datasets return `(image, annotation)`.

`transforms` crops, resizes and flips images with their annotations; `mixture` makes training samples from them;
`specs` has the table of all datasets for training and evaluation.
"""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Sized
from contextlib import suppress
from os import PathLike
from pathlib import Path, PurePath
from typing import IO, Any, Protocol, TypeVar

from PIL import ExifTags, Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import is_text, upright_rgb

A_co = TypeVar("A_co", covariant=True)
Skipped = list[tuple[str, str]]
LARGEST_NUMBER = 1e6  # in an annotation; no image has that many pixels along a side
REDUCING_GAP = 2  # minimum ratio of the side at which a JPEG is decoded to the side that it is resized to


class UnreadableSample(Exception):
    """Raised if a sample cannot be read. `what` is the file and annotation, `cause` the reason."""

    def __init__(self, what: str | PathLike[str], cause: object):
        super().__init__(str(what), str(cause))
        self.what, self.cause = str(what), str(cause)

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}"


class AnnotatedImages(Protocol[A_co]):
    """A dataset as read from disk. See `types` for the annotation of each task family.

    Attributes:
        skipped: (what, why) of each entry that cannot be used, filled on construction.
    """

    skipped: Skipped

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, A_co]:
        """An RGB image and its annotation. Raises an `UnreadableSample` if a file is damaged."""

    def name(self, index: int) -> str:
        """The file, and the annotation if a file has several; for reports."""


def read_image(
    source: str | PathLike[str] | IO[bytes],
    name: str | None = None,
    turn: bool = True,
    size: tuple[int, int] | None = None,
    resized_to: int | None = None,
) -> Image.Image:
    """Read an image in 8-bit RGB. Raises an `UnreadableSample` with `name` (default: the path) if it is damaged.

    By default the EXIF orientation is applied. Use `turn=False` for datasets whose annotations refer to the stored
    pixels (COCO). If `size` is given, an image of another size raises `UnreadableSample`. With `resized_to`, the side
    in pixels of the square that the image is resized to, a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which
    is faster; each of its sides is still at least twice that side.
    """
    try:
        with Image.open(source) as picture:
            if resized_to:
                picture.draft("RGB", (REDUCING_GAP * resized_to,) * 2)
            picture.load()  # outside the block below, so that a damaged file raises an error
            if not turn:
                with suppress(Exception):  # a damaged EXIF block can raise any exception
                    picture.getexif().pop(ExifTags.Base.Orientation, None)
            image = upright_rgb(picture)
            image.info.clear()  # so that the caller does not apply the EXIF orientation that is ignored here
    except Exception as error:  # a damaged file can raise any exception
        raise UnreadableSample(name or str(source), f"{type(error).__name__}: {error}") from error
    if size and image.size != size:
        raise UnreadableSample(name or str(source), f"is of {image.size} pixels, but of {size} in its annotations")
    return image


class ReducibleImages:
    """A dataset whose annotations have no coordinates, so that its images can be decoded at a smaller size."""

    _resized_to: int | None = None

    def reduce_to(self, size: int) -> None:
        """Decode large JPEGs at a smaller size, for a transform that resizes images to `size` x `size` pixels."""
        self._resized_to = size

    def _read_image(self, source: str | PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
        return read_image(source, name, resized_to=self._resized_to)


def read_annotations(path: Path, expected: str, parse: Callable[[str], Any] = json.loads) -> Any:
    """Read and parse a text file (JSON by default). Raises a ValueError with the description `expected`."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}; it must be {expected}.") from error
    except (OSError, ValueError, RecursionError) as error:  # too deeply nested JSON
        raise ValueError(f"{path} must be {expected}; got {type(error).__name__}: {error}") from error


def list_records(content: Any, file: str | PathLike[str], name: str = "") -> list[dict[str, Any]]:
    """Return the list of JSON objects in `content`, or in `content[name]`. Raises a ValueError otherwise."""
    found = (isinstance(content, dict) and content.get(name)) if name else content
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        under = name and f" under {name!r}"
        raise ValueError(f"{file} must contain a list of objects{under}; got {reprlib.repr(content)}.")
    return found


def named_entries(content: Any, file: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in the content of a file. Raises a ValueError if the content is something else."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain an object of named entries; got {reprlib.repr(content)}.")
    return content


def is_id(value: Any) -> bool:
    """Whether a value of a file is a 64-bit integer, as ids are."""
    return type(value) is int and abs(value) < 2**63


def is_number(value: Any, largest: float = LARGEST_NUMBER) -> bool:
    """Whether a value of a file is a number from -largest to largest, and not NaN, which JSON may contain."""
    return type(value) in (int, float) and abs(value) <= largest


def is_size(value: Any) -> bool:
    """Whether a value of a file can be the width or height of an image."""
    return type(value) is int and 0 < value <= LARGEST_NUMBER


def is_list_of(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """A check for a list, of `length` if that is given, of values that each pass `check`."""
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(check, value))


def is_file_name(value: Any) -> bool:
    """Whether a value of a file is a relative path that stays in its folder."""
    if not is_text(value) or "\0" in value:
        return False
    return not PurePath(value).is_absolute() and ".." not in PurePath(value).parts


def wrong_field(entry: dict[str, Any], **checks: Callable[[Any], bool]) -> str:
    """The first field that an entry lacks or that fails its check, as a reason to skip the entry; empty if none."""
    for field, check in checks.items():
        if entry.get(field) is None:
            return f"no {field!r}"
        if not check(entry[field]):
            return f"a malformed {field!r}"
    return ""


def coco_image_folder(root: str | PathLike[str], split: str) -> Path:
    """The folder of the images of a split of COCO: {split}/ or images/{split}/."""
    folder = Path(root, split)
    return folder if folder.is_dir() else Path(root, "images", split)


def coco_pictures(content: Any, file: str | PathLike[str], skipped: Skipped) -> dict[Any, dict[str, Any]]:
    """The images of a COCO JSON by id; entries without an id or a file name are added to `skipped`.

    Raises a ValueError if two different images have the same id.
    """
    pictures: dict[Any, dict[str, Any]] = {}
    for picture in list_records(content, file, "images"):
        if why := wrong_field(picture, id=is_id, file_name=is_file_name):
            skipped.append((f"image {picture.get('file_name') or picture.get('id')}", why))
        elif (known := pictures.setdefault(picture["id"], picture))["file_name"] != picture["file_name"]:
            raise ValueError(f"{file}: {known['file_name']} and {picture['file_name']} have the id {picture['id']}.")
    return pictures


def require_samples(folder: str | PathLike[str], samples: Sized, skipped: Skipped) -> None:
    """Raise a ValueError that counts the reasons in `skipped` if a dataset has no `samples`."""
    if not len(samples):
        reasons = Counter(why for _, why in skipped)
        counts = ", ".join(f"{count} with {why}" for why, count in reasons.most_common())
        first = f"no usable samples; skipped {counts}; the first one is {skipped[0][0]}." if skipped else ""
        raise ValueError(f"{folder}: {first or 'no samples found.'}")


def files_below(folder: Path) -> set[str]:
    """The paths of all files in `folder`, relative to it, with forward slashes. Empty if there is no such folder.

    Links to folders are followed. Each folder is read once, so links cannot lead in circles.
    """
    files: set[str] = set()
    read: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in read:
            folders.clear()
            continue
        read.add(place)
        folders.sort()
        files.update(Path(root, name).relative_to(folder).as_posix() for name in names if Path(root, name).is_file())
    return files
