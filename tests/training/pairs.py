"""A few in-memory edits as a mixture, for tests of training."""

import tiny

from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.types import Edit


class Pairs:
    """`count` noise images, each with another noise image as its edited image."""

    skipped: list[tuple[str, str]] = []

    def __init__(self, count: int, first: int = 0, side: int = 32):
        self.count, self.first, self.side = count, first, side

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        number = self.first + index
        image, edited = (tiny.picture(self.side, self.side, seed) for seed in (number, 500 + number))
        return image, Edit(f"make it number {number}", edited)

    def name(self, index):
        return f"pair {self.first + index}"


def mixture(count: int = 5, seed: int = 0, side: int = 32) -> Mixture:
    """Two sources, one with `count` pairs and one with two."""
    sources = [
        Source("many", Pairs(count, side=side), Editing.from_annotation),
        Source("two", Pairs(2, 100, side), Editing.from_annotation),
    ]
    return Mixture([(source, 1) for source in sources], seed)
