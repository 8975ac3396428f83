"""What a model is worth: its answers read, scored, and laid beside what its autoencoder alone would allow.

Needs the extra `eval` (pycocotools, scikit-image). `cases` says what is asked, `runner` asks it, `metrics` has the
scores, `scoring` applies them to readings, and `report` writes the table. `classical` is what one had before.
"""

from .baselines import classical
from .evaluator import evaluate, through_vae
from .examples import Case, Example, examples_from, whole_person

__all__ = [
    "Case",
    "Example",
    "examples_from",
    "classical",
    "evaluate",
    "through_vae",
    "whole_person",
]
