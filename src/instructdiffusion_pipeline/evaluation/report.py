"""The report of an evaluation: a table, JSON, and a contact sheet for each row."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from instructdiffusion_pipeline.datasets.mixture import check_source_names
from instructdiffusion_pipeline.evaluation.examples import LazyExample
from instructdiffusion_pipeline.evaluation.scoring import Scores, draw_truth, summarize
from instructdiffusion_pipeline.files import save_image, write_text
from instructdiffusion_pipeline.image_grid import labeled_grid
from instructdiffusion_pipeline.tasks.segmentation import prompted_tasks

DECIMALS = {"PSNR": 2, "SSIM": 3, "CLIP similarity": 3}  # all other scores are shown in percent
FIRST = ("model", "ceiling")  # both are in the first column of scores
NOTES = """\
The ceiling, in parentheses, is an upper bound: the score of the ground truth after VAE encoding and decoding, decoded
by color or transferred to the input. AP, PCK, IoU and N-acc are in percent, PSNR is in dB. PCK is computed over
labeled joints; "side" is the longer side of the image. For samples without the object, up to 0.1 % painted pixels are
ignored. mIoU is the mean over samples; a sample without the object counts 1 if nothing is painted, otherwise 0. N-acc
is the fraction of such samples where nothing is painted. ECE is the expected calibration error, in percent, of the
scores of the masks and joints that were found; a mask is right if its IoU is at least 0.5, a joint if it is within 5 %
of the side. Masks and joints are scored on the whole input, and those outside the part that the output shows count as
missed. Images are scored on that part only.
"""


class NothingScored(ValueError):
    """Raised if no example could be scored."""


def write(
    folder: Path,
    run: Mapping[str, Any],
    examples: Sequence[LazyExample],
    records: Sequence[dict[str, Any]],
) -> dict:
    """Write results.json, table.md and a contact sheet ROW.png for each row into `folder`, and return the results."""
    rows = [
        summary(name, [record for record in records if record["row"] == name])
        for name in dict.fromkeys(example.row for example in examples)
    ]
    results = {"run": run, "rows": rows}
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.md", table(rows))
    for row in rows:
        if scored := [record for record in records if record["row"] == row["row"] and "measures" in record]:
            sheet = contact_sheet(folder / "answers", examples, scored)
            save_image(folder / f"{file_name(row['row'])}.png", sheet)
    if not any(row["samples"] for row in rows):
        raise NothingScored(f"`examples`: none of the {len(records)} could be scored, see {folder}/table.md.")
    return results


def summary(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the results: scores by metric and column, the number of samples, and the examples that failed."""
    scored = [record for record in records if "measures" in record]
    failed = [{"name": record["name"], "error": record["error"]} for record in records if "error" in record]
    scores: dict[str, Scores] = {}
    for column in scored[0]["measures"] if scored else ():
        for metric, value in summarize([record["measures"][column] for record in scored]).items():
            scores.setdefault(metric, {})[column] = value
    return {"row": name, "samples": len(scored), "scores": scores, "failed": failed}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, followed by notes and the examples that failed."""
    scored = [column for row in rows for values in row["scores"].values() for column in values]
    columns = [name for name in dict.fromkeys(["input", "input through the VAE", *scored]) if name not in FIRST]
    lines = [f"| | metric | score (ceiling) | {' | '.join(columns)} | samples | failed |"]
    lines += [f"| --- | --- | --: |{' --: |' * len(columns)} --: | --: |"]
    for row in rows:
        counts = f"{row['samples']} | {len(row['failed'])}"
        if not row["scores"]:
            lines.append(f"| {row['row']} | - | - | {'- | ' * len(columns)}{counts} |")
        for metric, values in row["scores"].items():
            model, ceiling, *rest = (format_score(metric, values.get(name)) for name in (*FIRST, *columns))
            lines.append(f"| {row['row']} | {metric} | {model} ({ceiling}) | {' | '.join(rest)} | {counts} |")
    failed = [f"- {failure['name']}: {failure['error']}" for row in rows for failure in row["failed"]]
    return "\n".join([*lines, "", NOTES, *(["Not scored:", "", *failed, ""] if failed else [])])


def format_score(metric: str, value: float | None) -> str:
    """A score as it is shown in the table."""
    if value is None:
        return "-"
    return f"{value:.{DECIMALS[metric]}f}" if metric in DECIMALS else f"{100 * value:.1f}"


def contact_sheet(answers: Path, examples: Sequence[LazyExample], records: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The best, median and worst of `records`, each with input, output images, decoded data and ground truth."""
    ranked = sorted(records, key=lambda record: -record["score_key"])
    ranks = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for rank, record in ranks.items():
        example = examples[record["index"]].open()
        panels = [("input", example.image)]
        for number, task in enumerate(example.tasks):
            for part, prompted in enumerate(prompted_tasks(task)):
                output = Image.open(answers / answer_name(record["index"], number, part))
                panels.append((f'"{prompted.instruction()}"', output))
        overlay = Image.open(answers / overlay_name(record["index"]))
        panels += [("decoded", overlay), ("truth", draw_truth(example))]
        metric, value = next(iter(summarize([record["measures"]["model"]]).items()))
        rows.append((f"{rank}: {metric} {format_score(metric, value)}, {record['name']}", panels))
    return labeled_grid(rows)


def check_examples(examples: Sequence[LazyExample]) -> None:
    """Check the names of the examples and of the rows.

    Raises:
        ValueError: if there are no examples, two have the same name, two rows have the same file name, or a row has
            examples of two sources.
    """
    if not examples:
        raise ValueError("`examples` must have at least one example; got none.")
    sources = dict.fromkeys((example.row, id(example.source)) for example in examples)
    check_source_names(row for row, _ in sources)
    if repeated := duplicates(example.name for example in examples):
        raise ValueError(
            f"`examples` must have unique names; these are used more than once: {', '.join(repeated[:5])}."
        )
    if repeated := duplicates(file_name(row) for row, _ in sources):
        raise ValueError(f"Rows must have unique file names; these are used more than once: {', '.join(repeated)}.")


def duplicates(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def file_name(row: str) -> str:
    """The name of a row's contact sheet, without the suffix."""
    return re.sub(r"[^\w+]+", "-", row.lower()).strip("-")


def answer_name(index: int, number: int, part: int = 0) -> str:
    """The file name of an output image, at working size, for task `number` of the example at `index`.

    A segmentation of several objects has an output image for each of them, its `part`.
    """
    return f"{index:06d}-{number}-{part}.png" if part else f"{index:06d}-{number}.png"


def overlay_name(index: int) -> str:
    """The file name of the image on which the decoded data of the example at `index` are drawn."""
    return f"{index:06d}-overlay.png"


def result_name(index: int, number: int) -> str:
    """The file name of the result of a restoration or an edit: the image at the resolution of the input."""
    return f"{index:06d}-{number}-result.png"
