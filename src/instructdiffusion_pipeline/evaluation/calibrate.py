"""Calibration of the scores of masks and joints on the outputs of a model."""

import json
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from instructdiffusion_pipeline.calibration import Platt, expected_calibration_error, fit_platt, reliability
from instructdiffusion_pipeline.evaluation.evaluator import evaluate
from instructdiffusion_pipeline.evaluation.examples import LazyExample
from instructdiffusion_pipeline.evaluation.scoring import judged
from instructdiffusion_pipeline.files import update_json, write_text
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline

FAMILIES = {"masks": "segmentation", "joints": "keypoints"}  # keys: the kinds of measures
MIN_ANSWERS = 100  # a fit to fewer masks or joints causes a warning


def calibrate(
    pipeline: InstructDiffusionPipeline,
    examples: Sequence[LazyExample],
    held_out: Sequence[LazyExample],
    folder: str | PathLike[str],
    batch_size: int = 8,
) -> dict[str, Platt]:
    """Fit the pipeline's `score_calibration` on its outputs for `examples`, and measure it on those for `held_out`.

    A run that was stopped continues when it is called again with the same arguments.

    Args:
        pipeline: its setting `score_calibration` is changed for the families that have examples.
        examples: with masks or joints. Some of the masks and some of the joints must be right, and some wrong.
        held_out: the same kind, of other images.
        folder: new, or of the same run. Gets the evaluations in answers/ and held-out/, and reliability.md: the
            reliability curves of the held-out rows.
        batch_size: prompts per call of the pipeline.

    Returns:
        Slope and intercept by task family.

    Warns:
        UserWarning: if a fit has fewer than `MIN_ANSWERS` masks or joints.

    Raises:
        ValueError: if `folder` has another run, or a fit is impossible (see `fit_platt`).
    """
    folder, stored = Path(folder), pipeline.config.get("score_calibration") or {}
    pipeline.register_to_config(score_calibration={})
    try:
        evaluate(pipeline, examples, folder / "answers", batch_size=batch_size)
    finally:
        pipeline.register_to_config(score_calibration=stored)
    fits: dict[str, Platt] = {}
    for kind, family in FAMILIES.items():
        if answers := [answer for row in answers_by_row(folder / "answers", kind).values() for answer in row]:
            try:
                fits[family] = fit_platt([score for score, _ in answers], [right for _, right in answers])
            except ValueError as error:
                raise ValueError(f"the scores of {family} cannot be calibrated: {error}") from error
            if len(answers) < MIN_ANSWERS:
                warnings.warn(
                    f"The scores of {family} were calibrated with {len(answers)} {kind} only; at least {MIN_ANSWERS}"
                    " are needed for reliable scores. Use more samples.",
                    stacklevel=2,
                )
    pipeline.register_to_config(score_calibration=stored | {family: list(fit) for family, fit in fits.items()})
    evaluate(pipeline, held_out, folder / "held-out", batch_size=batch_size)
    write_text(folder / "reliability.md", reliability_table(folder / "held-out"))
    return fits


def save_calibration(fits: Mapping[str, Platt], model: str | PathLike[str]) -> None:
    """Write `score_calibration` to the model_index.json of a model. Families without a fit keep their calibration."""
    index = Path(model, "model_index.json")
    stored = json.loads(index.read_text(encoding="utf-8")).get("score_calibration") or {}
    rounded = {family: [round(value, 4) for value in fit] for family, fit in fits.items()}
    update_json(index, {"score_calibration": stored | rounded})


def answers_by_row(folder: Path, kind: str) -> dict[str, list[tuple[float, bool]]]:
    """Score and correctness of the masks or joints (`kind`) found in an evaluation in `folder`, by row."""
    rows: dict[str, list[tuple[float, bool]]] = {}
    for record in map(json.loads, (folder / "records.jsonl").read_text().splitlines()):
        if kind in record.get("measures", {}).get("model", {}):
            rows.setdefault(record["row"], []).extend(judged(record["measures"]["model"]))
    return rows


def reliability_table(folder: Path) -> str:
    """The reliability curve and the expected calibration error of each row of an evaluation, as Markdown."""
    lines = ["| | answers | mean score | right |", "| --- | --: | --: | --: |"]
    for kind in FAMILIES:
        for row, answers in answers_by_row(folder, kind).items():
            scores, right = [score for score, _ in answers], [correct for _, correct in answers]
            error = expected_calibration_error(scores, right)
            lines += [
                f"| {row} | {part.answers} | {part.score:.2f} | {part.right:.2f} |"
                for part in reliability(scores, right)
            ]
            lines.append(f"| {row}: ECE {'-' if error is None else f'{error:.3f}'} | {len(answers)} | | |")
    return "\n".join(lines) + "\n"
