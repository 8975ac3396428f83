"""The tables of the paper (Geng et al., CVPR 2024, tables 2 to 5): scores of a model next to the paper's figures."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from instructdiffusion_pipeline.datasets.keypoints import AP10K_SIGMAS, COCO_SIGMAS
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, KEYPOINTS, SEGMENTATION
from instructdiffusion_pipeline.datasets.transforms import EvaluationPersonCrop
from instructdiffusion_pipeline.evaluation import report
from instructdiffusion_pipeline.evaluation.evaluator import Settings, evaluate
from instructdiffusion_pipeline.evaluation.examples import MakeTasks, every_object, examples_from, whole_person
from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline


class Figure(NamedTuple):
    """A figure of the paper, in percent or dB: the score on a `split` of the dataset `key` of `DATASETS`.

    `ceiling` is the score of the ground truth after VAE encoding and decoding, if the paper states it.
    """

    name: str
    key: str
    split: str
    score: float
    ceiling: float | None = None


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, with one metric for all figures."""

    title: str
    metric: str
    figures: Sequence[Figure]


PAPER_TABLES = (
    PaperTable(
        "Table 2: keypoints, ground-truth boxes",
        "AP",
        [
            Figure("COCO", "coco", "val2017", 71.2),
            Figure("HumanArt", "humanart", "validation", 51.4),
            Figure("AP-10K", "ap10k", "test-split1", 15.9),
        ],
    ),
    PaperTable(
        "Table 3: referring segmentation",
        "cIoU",
        [
            Figure("gRefCOCO", "grefcoco", "val", 67.36),
            Figure("RefCOCO", "refcoco", "val", 61.74),
            Figure("RefCOCO", "refcoco", "testA", 65.20),
            Figure("RefCOCO", "refcoco", "testB", 60.17),
            Figure("RefCOCO+", "refcoco+", "val", 46.57),
            Figure("RefCOCO+", "refcoco+", "testA", 52.32),
            Figure("RefCOCO+", "refcoco+", "testB", 39.04),
            Figure("G-Ref (UMD)", "refcocog", "val", 51.17),
            Figure("G-Ref (UMD)", "refcocog", "test", 52.02),
            Figure("G-Ref (Google)", "refcocog-google", "val", 52.18),
            Figure("RefClef", "refclef", "val", 49.58),
            Figure("RefClef", "refclef", "testA", 54.73),
            Figure("RefClef", "refclef", "testB", 54.82),
            Figure("RefClef", "refclef", "testC", 40.34),
        ],
    ),
    PaperTable(
        "Table 4: semantic segmentation",
        "mcIoU",
        [
            Figure("ADE-847", "ade20k-847", "validation", 19.68),
            Figure("PC-459", "pascal-context-459", "validation", 28.29),
            Figure("ADE-150", "ade20k-150", "validation", 33.62),
            Figure("PC-59", "pascal-context-59", "validation", 59.00),
            Figure("VOC", "voc", "val", 72.55),
            Figure("COCO-Stuff", "coco-stuff", "val2017", 53.17),
        ],
    ),
    PaperTable(
        "Table 5: restoration",
        "PSNR",
        [
            Figure("GoPro", "gopro", "test", 23.58, 29.54),
            Figure("SIDD", "sidd", "val", 34.26, 36.56),
            Figure("CLWD", "clwd", "test", 23.60, 24.80),
        ],
    ),
)
PAPER_FOLDERS = sorted({str(DATASETS[figure.key].folder) for table in PAPER_TABLES for figure in table.figures})
# The paper's OKS on AP-10K uses only the joints of COCO. GoPro is scored at its own resolution, not cropped.
SHARED_SIGMAS = {name: sigma for name, sigma in AP10K_SIGMAS.items() if name in COCO_SIGMAS}
TRANSFORMS = {"ap10k": EvaluationPersonCrop(sigmas=SHARED_SIGMAS), "gopro": None}
OWN_RESOLUTION = ("gopro",)
ALL_TASKS: dict[Any, MakeTasks] = {KEYPOINTS: whole_person, SEGMENTATION: every_object}
NOTES = """\
The ceiling, in parentheses, is the score of the ground truth after VAE encoding and decoding. In table 5 the score and
its ceiling are those of the restored image at the resolution of the input, and "output alone" is the PSNR of the
model's output. The paper's figures are those of the output alone.
"""


def evaluate_paper(
    pipeline: InstructDiffusionPipeline,
    root: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    samples: int,
    settings_by_family: Settings | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resolution: int | None = None,
) -> str:
    """Score a pipeline on the paper's datasets below `root`, and write their tables to paper.md in `folder`.

    Each split of a dataset is a resumable run of `evaluate` in a separate folder. There is one prompt for each
    expression and for each class of an image, and prompts for all joints. GoPro's images are processed at their own
    resolution.

    Args:
        pipeline: an `InstructDiffusionPipeline`.
        root: folder with the folders of the datasets, see `PAPER_FOLDERS`. Datasets that are missing or cannot be read
            are listed below the tables.
        folder: new, or with results of the same run.
        samples: number of samples of each split, chosen at random.
        settings_by_family, batch_size, seed, resolution: as in `evaluate`.

    Returns:
        The content of paper.md.

    Raises:
        ValueError: if none of the datasets can be read, or `folder` has results of another run.
    """
    root, folder = Path(root), Path(folder)
    rows: dict[Figure, Mapping[str, Any]] = {}
    missing: dict[Figure, str] = {}
    for figure in (figure for table in PAPER_TABLES for figure in table.figures):
        try:
            source = open_source(figure, root, resolution or pipeline.default_resolution)
        except ValueError as error:
            missing[figure] = str(error)
        else:
            try:
                (rows[figure],) = evaluate(
                    pipeline,
                    examples_from(source, samples, seed, ALL_TASKS.get(source.make_task)),
                    folder / report.file_name(source.name),
                    settings_by_family,
                    batch_size,
                    seed,
                    0 if figure.key in OWN_RESOLUTION else resolution,
                )["rows"]
            except report.NothingScored as error:
                missing[figure] = str(error)
        if rows:
            write_text(folder / "paper.md", paper_tables(rows, missing))
    if not rows:
        raise ValueError(f"`root`: no dataset of the paper can be read in {root}: {'; '.join(missing.values())}")
    return paper_tables(rows, missing)


def open_source(figure: Figure, root: Path, size: int) -> Source:
    """The samples for a figure, as in the paper's evaluation. `size` is the largest side of crops in pixels.

    Raises a ValueError if the dataset is not in `root` or cannot be read.
    """
    spec = DATASETS[figure.key]
    spec = replace(spec, test_transform=TRANSFORMS.get(figure.key, spec.test_transform))
    path = root / str(spec.folder)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}.")
    return spec.test_source(figure.key, path, size, figure.split)


def paper_tables(rows: Mapping[Figure, Mapping[str, Any]], missing: Mapping[Figure, str]) -> str:
    """The tables in Markdown, from the rows of results.json, followed by the `missing` datasets and the reasons."""
    parts = []
    for table in PAPER_TABLES:
        alone = " output alone |" if table.metric == "PSNR" else ""
        lines = [f"| {table.metric} | split | samples | failed | score (ceiling) |{alone} paper |"]
        lines.append("| --- | --- | --: | --: | --: | --: |" + " --: |" * bool(alone))
        for figure in table.figures:
            row = rows.get(figure)
            values = row["scores"].get(table.metric, {}) if row else {}
            columns = [values.get(column) for column in ("model", "ceiling", "output alone")]
            score, ceiling, output = (report.format_score(table.metric, value) for value in columns)
            paper = f"{figure.score} ({figure.ceiling})" if figure.ceiling else figure.score
            counts = f"{row['samples']} | {len(row['failed'])}" if row else "- | -"
            output = f" {output} |" if alone else ""
            lines.append(f"| {figure.name} | {figure.split} | {counts} | {score} ({ceiling}) |{output} {paper} |")
        parts.append(f"## {table.title}\n\n" + "\n".join(lines) + "\n")
    if missing:
        lines = [f"- {figure.name} {figure.split}: {why}" for figure, why in missing.items()]
        parts.append("Not evaluated:\n\n" + "\n".join(lines) + "\n")
    return "\n".join([*parts, NOTES])
