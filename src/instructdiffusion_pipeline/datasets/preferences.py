"""The answers of a model that people prefer, for the alignment stage; see `training.candidates`."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from instructdiffusion_pipeline.datasets import read_annotations
from instructdiffusion_pipeline.datasets.editing import EditTriples


def load_preferences(root: str | PathLike[str]) -> EditTriples:
    """A folder that `make_candidates` filled: what was moved into picks/ are the edited pictures of inputs/."""
    root = Path(root)

    def parse(lines: str) -> dict[str, str]:
        return {sample["id"]: sample["instruction"] for sample in map(json.loads, lines.splitlines())}

    if not any((root / "picks").glob("*.png")):
        raise ValueError(f"{root / 'picks'} is empty; move the best of {root / 'candidates'} there.")
    words = read_annotations(root / "samples.jsonl", "the samples of a folder of candidates", parse)

    def triples() -> Iterator[tuple[str, str, str]]:
        for path in sorted((root / "picks").glob("*.png")):
            sample = path.name.split("_")[0]
            yield f"inputs/{sample}.png", words.get(sample, ""), f"picks/{path.name}"

    return EditTriples(root, triples())
