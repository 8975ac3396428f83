"""What an evaluation leaves to look at: a table, JSON, and a contact sheet for each row."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from instructdiffusion_pipeline.evaluation.examples import Case
from instructdiffusion_pipeline.evaluation.scoring import Scores, summarize, truth_picture
from instructdiffusion_pipeline.files import save_image, write_text
from instructdiffusion_pipeline.image_grid import stack, strip

IN_THEIR_UNIT = {"PSNR": 2, "SSIM": 3, "CLIP similarity": 3}  # with so many decimals; all others in percent
NOTES = """\
In brackets: the ceiling, which is the score of the true answer passed through the VAE alone. AP, PCK, IoU and N-acc
in percent, PSNR in dB. PCK is of labelled joints; the side is the picture's long one. mIoU is the mean over samples,
where an empty truth counts 1 if nothing is painted (at most one pixel in 1,000), else 0; N-acc is the share of the
empty truths where nothing is. Scores are in pixels of the input: masks and joints on all of it (what lies outside the
part that answers show is missed), pictures on that part alone.
"""


def write(folder: Path, run: Mapping[str, Any], cases: Sequence[Case], records: Sequence[dict[str, Any]]) -> dict:
    """Write results.json, table.md and ROW.png into `folder`; return the results."""
    rows = [
        summary(name, [record for record in records if record["row"] == name])
        for name in dict.fromkeys(case.row for case in cases)
    ]
    results = {"run": run, "rows": rows}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.md", table(rows))
    for row in rows:
        if scored := [record for record in records if record["row"] == row["row"] and "measures" in record]:
            save_image(folder / f"{file_name(row['row'])}.png", contact_sheet(folder / "answers", cases, scored))
    if not any(row["samples"] for row in rows):
        raise ValueError(
            f"`cases` must hold one that can be scored; all {len(records)} failed, see {folder}/table.md."
        )
    return results


def summary(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the results: how many were scored and which were not, and each score of model, ceiling and input."""
    scored = [record for record in records if "measures" in record]
    failed = [{"name": record["name"], "error": record["error"]} for record in records if "error" in record]
    scores: dict[str, Scores] = {}
    for of in scored[0]["measures"] if scored else ():
        for metric, value in summarize([record["measures"][of] for record in scored]).items():
            scores.setdefault(metric, {})[of] = value
    return {"row": name, "samples": len(scored), "scores": scores, "failed": failed}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, with a column for everything that has a score, and below them what could not be scored."""
    scored = [of for row in rows for values in row["scores"].values() for of in values]
    columns = [
        of for of in dict.fromkeys(["input", "input through the VAE", *scored]) if of not in ("model", "ceiling")
    ]
    lines = [f"| | metric | score (ceiling) | {' | '.join(columns)} | samples | failed |"]
    lines += [f"| --- | --- | --: |{' --: |' * len(columns)} --: | --: |"]
    for row in rows:
        counts = f"{row['samples']} | {len(row['failed'])}"
        if not row["scores"]:
            lines.append(f"| {row['row']} | - | - | {'- | ' * len(columns)}{counts} |")
        for metric, values in row["scores"].items():
            model, ceiling, *rest = (number(metric, values.get(of)) for of in ("model", "ceiling", *columns))
            lines.append(f"| {row['row']} | {metric} | {model} ({ceiling}) | {' | '.join(rest)} | {counts} |")
    failed = [f"- {failure['name']}: {failure['error']}" for row in rows for failure in row["failed"]]
    return "\n".join([*lines, "", NOTES, *(["Not scored:", "", *failed, ""] if failed else [])])


def number(metric: str, value: float | None) -> str:
    """A score as the table shows it."""
    if value is None:
        return "-"
    return f"{value:.{IN_THEIR_UNIT[metric]}f}" if metric in IN_THEIR_UNIT else f"{100 * value:.1f}"


def contact_sheet(answers: Path, cases: Sequence[Case], records: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Best, median and worst of `records`: input, each question's answer, the reading, and the truth."""
    ranked = sorted(records, key=lambda record: -record["score_key"])
    picks = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    strips = []
    for rank, record in picks.items():
        example = cases[record["index"]].open()
        panels, overlay = [("input", example.image)], example.image
        for index, task in enumerate(example.tasks):
            answer = Image.open(answers / answer_name(record["index"], index))
            panels.append((f'"{task.instruction()}"', answer))
            overlay = task.overlay(overlay, task.read(example.image, answer, tuple(record["box"])))
        panels += [("reading", overlay), ("truth", truth_picture(example))]
        metric, value = next(iter(summarize([record["measures"]["model"]]).items()))
        strips.append(strip(f"{rank}: {metric} {number(metric, value)}, {record['name']}", panels))
    return stack(strips)


def check_names(cases: Sequence[Case]) -> None:
    """Raise a ValueError unless there are cases, all names are unique, and no two rows would share a contact sheet."""
    if not cases:
        raise ValueError("`cases` must hold at least one case; got none.")
    for what, names in (
        ("names", [case.name for case in cases]),
        ("rows' file names", [file_name(row) for row in dict.fromkeys(case.row for case in cases)]),
    ):
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            raise ValueError(f"`cases` must have unique {what}; these come more than once: {', '.join(twice[:5])}.")


def file_name(row: str) -> str:
    """What a row's contact sheet is called, without the ending."""
    return re.sub(r"[^\w+]+", "-", row.lower()).strip("-")


def answer_name(index: int, number: int) -> str:
    """The file of the answer to question `number` of the case at `index`."""
    return f"{index:06d}-{number}.png"
