"""Evaluation of a model on datasets, compared with the upper bound that its VAE sets.

Needs the extra `eval` (pycocotools, scikit-image). `examples` has the inputs and the ground truth, `evaluator` the
run, `metrics` and `scoring` the scores, `report` the table, `paper` the tables of the paper, and `baselines` classical
restoration methods.
"""

from .baselines import classical_baseline
from .evaluator import evaluate, vae_reconstruction
from .examples import Example, LazyExample, every_object, examples_from, load_examples, whole_person
from .paper import evaluate_paper

__all__ = [
    "Example",
    "LazyExample",
    "classical_baseline",
    "evaluate",
    "evaluate_paper",
    "every_object",
    "examples_from",
    "load_examples",
    "vae_reconstruction",
    "whole_person",
]
