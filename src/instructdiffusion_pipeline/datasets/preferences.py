"""Outputs of a model that people have selected, for the alignment stage; see `training.candidates`."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from instructdiffusion_pipeline.datasets import list_records, read_annotations
from instructdiffusion_pipeline.datasets.editing import EditTriples
from instructdiffusion_pipeline.pipeline_instruct_diffusion import is_text


def load_preferences(root: str | PathLike[str]) -> EditTriples:
    """Read a folder written by `make_candidates`. Images in picks/ are the targets for the images in inputs/."""
    root = Path(root)
    if not any((root / "picks").glob("*.png")):
        raise ValueError(f"{root / 'picks'} is empty; move the best of {root / 'candidates'} there.")
    file = root / "samples.jsonl"

    def parse(lines: str) -> list[Any]:
        return [json.loads(line) for line in lines.splitlines()]

    samples = list_records(read_annotations(file, "the samples of a folder of candidates", parse), file)
    words = {sample["id"]: sample.get("instruction") for sample in samples if is_text(sample.get("id"))}

    def triples() -> Iterator[tuple[str, Any, str]]:
        for path in sorted((root / "picks").glob("*.png")):
            sample = path.name.split("_")[0]
            yield f"inputs/{sample}.png", words.get(sample), f"picks/{path.name}"

    return EditTriples(root, triples())
