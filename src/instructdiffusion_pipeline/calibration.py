"""Calibration of scores: a score of 0.8 means a probability of 80 % (Platt, 1999; Guo et al., 2017)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint

SMALLEST = 1e-3  # minimum distance of raw scores from 0 and 1, so that their logit is finite
BINS = 10  # of a reliability curve, of equal width


class Platt(NamedTuple):
    """Maps a raw score to the probability `sigmoid(slope * logit(score) + intercept)`; a score of 0 remains 0."""

    slope: float
    intercept: float

    def __call__(self, score: float) -> float:
        return 0.0 if score <= 0 else 1 / (1 + math.exp(-(self.slope * float(logit(score)) + self.intercept)))


def logit(score: Any) -> np.ndarray:
    """The log odds of scores from 0 to 1, which are clipped to keep the result finite."""
    clipped = np.clip(score, SMALLEST, 1 - SMALLEST)
    return np.log(clipped / (1 - clipped))


def fit_platt(scores: Sequence[float], right: Sequence[bool]) -> Platt:
    """Fit the probability that a mask or joint is right to raw scores, by maximum likelihood.

    As Platt proposed, the targets are (n + 1) / (n + 2) for the n right ones and 1 / (m + 2) for the m wrong ones, so
    that the fit exists even if the scores separate them.

    Raises:
        ValueError: if none or all are right, or the right ones do not have higher scores.
    """
    hits = np.asarray(right, dtype=bool)
    if hits.all() or not hits.any():
        raise ValueError(f"`right` must have right and wrong answers; {hits.sum()} of {hits.size} are right.")
    targets = np.where(hits, (hits.sum() + 1) / (hits.sum() + 2), 1 / ((~hits).sum() + 2))
    inputs, goals = torch.from_numpy(logit(np.asarray(scores, dtype=float))), torch.from_numpy(targets)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(weights[0] * inputs + weights[1], goals)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    slope, intercept = weights.tolist()
    if slope <= 0:
        raise ValueError(f"`scores` must be higher for right answers; the fitted slope is {slope:.3f}.")
    return Platt(slope, intercept)


def calibrate_answer(data: Any, calibration: Platt) -> Any:
    """The masks or joints with calibrated scores. The score of an empty mask is 0."""

    def calibrated(part: Mask | Joint | None) -> Mask | Joint | None:
        if isinstance(part, Mask):
            return replace(part, score=calibration(part.score) if part.pixels.any() else 0.0)
        return part and part._replace(score=calibration(part.score))

    return {name: calibrated(part) for name, part in data.items()}


class Bin(NamedTuple):
    """Masks or joints with similar scores: their number, their mean score, and the fraction of them that is right."""

    answers: int
    score: float
    right: float


def reliability(scores: Sequence[float], right: Sequence[bool]) -> list[Bin]:
    """The reliability curve: the non-empty bins of `BINS` bins of equal width, in order of the score."""
    values, hits = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    numbers = np.minimum((values * BINS).astype(int), BINS - 1)
    return [
        Bin(int(chosen.sum()), float(values[chosen].mean()), float(hits[chosen].mean()))
        for number in range(BINS)
        if (chosen := numbers == number).any()
    ]


def expected_calibration_error(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """ECE: the mean of |mean score - fraction right| over the bins, weighted by their numbers; None without scores."""
    bins = reliability(scores, right)
    return sum(part.answers * abs(part.score - part.right) for part in bins) / len(scores) if bins else None
