"""Tiny datasets in their published layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def save_image(path: Path, picture: Image.Image | None = None, **kwargs: Any) -> Path:
    """Save an image, noise by default, as PNG with any suffix, so that no pixel changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or tiny.picture(40, 30)).save(path, "PNG", **kwargs)
    return path


def write_broken(path: Path) -> Path:
    """Write an image file that is truncated in the middle."""
    save_image(path, tiny.picture(40, 30))
    path.write_bytes(path.read_bytes()[:400])
    return path


def reasons(dataset: Any) -> list[str]:
    return sorted(why for _, why in dataset.skipped)


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and bool((np.asarray(first) == np.asarray(second)).all())


class Recorded:
    """A random generator that returns recorded choices, and fails if another kind is requested."""

    def __init__(self, *choices: tuple[str, float]):
        self.choices = list(choices)

    def _next(self, kind: str) -> Any:
        recorded, value = self.choices.pop(0)
        assert recorded == kind
        return value

    def random(self) -> float:
        return self._next("random")

    def gauss(self, mean: float, deviation: float) -> float:
        return mean + deviation * self._next("gauss")

    def randint(self, first: int, last: int) -> int:
        value = self._next("randint")
        assert first <= value <= last
        return value
