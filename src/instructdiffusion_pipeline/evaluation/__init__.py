"""Evaluation: evaluate a model on a dataset and compare with the upper bound given by its VAE.

Needs the extra `eval` (pycocotools, scikit-image). `examples` has the inputs and ground truth, `evaluator` the run,
`metrics` and `scoring` the scores, `report` the table, `paper` the tables of the paper, and `baselines` classical
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
