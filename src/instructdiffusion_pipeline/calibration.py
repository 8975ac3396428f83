"""Calibrated scores: of the answers with a score of 0.8, 80 % are right (Platt, 1999; Guo et al., 2017)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint

SMALLEST = 1e-3  # raw scores are kept this far from 0 and 1, because their logit must be finite
BINS = 10  # of equal width, of a reliability curve


class Platt(NamedTuple):
    """Maps a raw score to the probability `sigmoid(slope * logit(score) + intercept)`; a score of 0 remains 0."""

    slope: float
    intercept: float

    def __call__(self, score: float) -> float:
        return 0.0 if score <= 0 else 1 / (1 + math.exp(-(self.slope * float(logit(score)) + self.intercept)))


def logit(score: Any) -> np.ndarray:
    """The log odds of scores from 0 to 1, kept finite."""
    clipped = np.clip(score, SMALLEST, 1 - SMALLEST)
    return np.log(clipped / (1 - clipped))


def fit_platt(scores: Sequence[float], right: Sequence[bool]) -> Platt:
    """Fit the probability that an answer is right to raw scores, by maximum likelihood.

    As Platt proposed, the targets are not 0 and 1 but (n0 + 1) / (n0 + 2) and 1 / (n1 + 2) from them, so that the fit
    exists for scores that separate right and wrong answers.

    Raises:
        ValueError: there are no right or no wrong answers, or right answers do not have higher scores.
    """
    hits = np.asarray(right, dtype=bool)
    if hits.all() or not hits.any():
        raise ValueError(f"`right` must have right and wrong answers; {hits.sum()} of {hits.size} are right.")
    targets = np.where(hits, (hits.sum() + 1) / (hits.sum() + 2), 1 / ((~hits).sum() + 2))
    inputs = np.stack([logit(np.asarray(scores, dtype=float)), np.ones(hits.size)], 1)
    weights = np.zeros(2)

    def loss(weights: np.ndarray) -> float:
        outputs = inputs @ weights
        return float((np.logaddexp(0, outputs) - targets * outputs).sum())

    for _ in range(100):  # Newton's method, with halved steps where it would overshoot
        shares = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (shares - targets)
        curvature = (inputs * (shares * (1 - shares))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) + 1e-12 and np.abs(step).max() > 1e-9:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    slope, intercept = map(float, weights)
    if slope <= 0:
        raise ValueError(f"`scores` must be higher for right answers; the fitted slope is {slope:.3f}.")
    return Platt(slope, intercept)


def calibrate_answer(data: Any, calibration: Platt) -> Any:
    """The masks or joints of an answer with calibrated scores. The score of an empty mask is 0."""

    def calibrated(part: Mask | Joint | None) -> Mask | Joint | None:
        if isinstance(part, Mask):
            return replace(part, score=calibration(part.score) if part.pixels.any() else 0.0)
        return part and part._replace(score=calibration(part.score))

    return {name: calibrated(part) for name, part in data.items()}


class Bin(NamedTuple):
    """Answers with similar scores: their number, their mean score, and the share of them that is right."""

    answers: int
    score: float
    right: float


def reliability(scores: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """The reliability curve: the non-empty ones of `BINS` bins of equal width, by rising score."""
    values, hits = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    numbers = np.minimum((values * BINS).astype(int), BINS - 1)
    return [
        Bin(int(chosen.sum()), float(values[chosen].mean()), float(hits[chosen].mean()))
        for number in range(BINS)
        if (chosen := numbers == number).any()
    ]


def expected_calibration_error(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """ECE: the mean distance of score and share of right answers over the bins, by count; None without answers."""
    bins = reliability(scores, right)
    return sum(part.answers * abs(part.score - part.right) for part in bins) / len(scores) if bins else None
