"""Score a small model on photographs that training never saw, each family through the product's own evaluation.

    python examples/tiny/score.py --world out/tiny/world --folder out/tiny/scores

Beside the table it prints what only a made world can tell: whether the name mattered, whether left is left, and what
became of the picture outside the edited place.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import edits
import families
import numpy as np
import torch
from families import Drawn
from PIL import Image
from pose import WholePose
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.datasets.mixture import Always, Source
from instructdiffusion_pipeline.evaluation import Case, Exam, cases_from, evaluate
from instructdiffusion_pipeline.evaluation.metrics import Overlap
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

TINY_MODEL = Path(__file__).parent.parent / "instructdiffusion-tiny"
SIGMA = 25.0  # grey levels
SEED = 7  # of the scenes; training uses 0 and 1
CHANGED = 16  # grey levels in one channel: what counts as edited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="the folder the recipe fetched its pictures to")
    parser.add_argument("--folder", type=Path, required=True, help="for the table, the answers and contact sheets")
    parser.add_argument("--model", type=Path, default=TINY_MODEL)
    parser.add_argument("--presets", type=Path, help="settings by family; default: presets.json of the model")
    parser.add_argument("--samples", type=int, default=100, help="samples a row")
    parser.add_argument("--rows", help="only those whose name begins so")
    parser.add_argument("--training_photographs", action="store_true", help="new scenes over photographs of training")
    args = parser.parse_args()

    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    presets = json.loads((args.presets or args.model / "presets.json").read_text())
    sources = [
        source
        for source in rows(args.world, args.samples, not args.training_photographs)
        if source.name.startswith(args.rows or "")
    ]
    cases = [case for source in sources for case in cases_from(source, args.samples, SEED)]
    evaluate(pipeline, cases, args.folder, presets, batch_size=20)
    (args.folder / "beyond.json").write_text(json.dumps(beyond(cases, args.folder), indent=2) + "\n")
    print((args.folder / "table.md").read_text())
    print((args.folder / "beyond.json").read_text())


def rows(folder: Path, count: int, unseen_photographs: bool = True) -> list[Source]:
    """What is asked, row by row of the table."""
    seen = World(folder, unseen_photographs)
    unseen = World(folder, unseen_photographs, unseen_objects=True)

    def source(name: str, example: Callable, world: World, pick: Callable, **options: Any) -> Source:
        return Source(name, Drawn(partial(example, world, **options), count, SEED), pick)

    return [
        source("segmentation, seen names", families.segmentation, seen, Segmentation.pick),
        source("segmentation, unseen names", families.segmentation, unseen, Segmentation.pick),
        source("keypoints, facing", families.keypoints, seen, Keypoints.pick, facing_share=1),
        source("keypoints, from behind", families.keypoints, seen, Keypoints.pick, facing_share=0),
        source("pose, facing", families.keypoints, seen, Always(WholePose()), facing_share=1),
        source("pose, from behind", families.keypoints, seen, Always(WholePose()), facing_share=0),
        source("noise", families.noisy, seen, Always(Restoration("noise")), sigmas=(SIGMA, SIGMA)),
        source("blur", families.blurred, seen, Always(Restoration("blur"))),
        source("watermark", families.watermarked, seen, Always(Restoration("watermark"))),
        source("objects removed", edits.remove, seen, Editing.pick),
        source("objects replaced", edits.replace, seen, Editing.pick),
        source("objects added", edits.add, seen, Editing.pick),
        source("grades", families.graded, seen, Editing.pick),
    ]


def beyond(cases: Sequence[Case], folder: Path) -> dict[str, dict[str, float]]:
    """Means by row of what the table does not have (see `in_masks`, `in_joints` and `in_pictures`)."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, case in enumerate(cases):
        exam = case.open()
        answer = Image.open(folder / "answers" / answer_name(index, 0))
        (task,) = exam.tasks
        measure = {"segmentation": in_masks, "keypoints": in_joints}.get(task.family, in_pictures)
        for name, value in measure(exam, answer).items():
            values[case.row][name] += value
    return {
        row: {name: round(float(np.mean(each)), 4) for name, each in columns.items() if each}
        for row, columns in values.items()
    }


def in_masks(exam: Exam, answer: Image.Image) -> dict[str, list[float]]:
    """IoU where the object is there, also if all objects asked for in this world were painted, whatever the name."""
    (task,) = exam.tasks
    ((name, found),) = task.read(exam.image, answer).items()
    if not exam.truth[name].any():
        return {"painted though absent": [found.pixels.mean() > 0.01]}
    everything = np.logical_or.reduce(list(exam.truth.values()))
    several = sum(mask.any() for mask in exam.truth.values()) > 1
    overlap = Overlap.of(name, exam.truth[name], found.pixels).iou
    blind = Overlap.of(name, exam.truth[name], everything).iou
    return {
        "mIoU where present": [overlap],
        "mIoU where present, all objects painted": [blind],
        "mIoU among several": [overlap] if several else [],
        "mIoU among several, all objects painted": [blind] if several else [],
    }


def in_joints(exam: Exam, answer: Image.Image) -> dict[str, list[float]]:
    """Of the joints on a side: found nearer to the same joint of the other side. Of all: no disc; a disc too many."""
    (task,) = exam.tasks
    swaps = {"left": "right", "right": "left"}
    confused, missed, invented = [], [], []
    for name, found in task.read(exam.image, answer).items():
        truth = exam.truth[name]
        if truth is None:
            invented.append(found is not None)
            continue
        missed.append(found is None)
        side, _, part = name.partition(" ")
        other = exam.truth.get(f"{swaps.get(side)} {part}")
        if found and other:
            confused.append(distance(found, other) < distance(found, truth))
    return {"left and right confused": confused, "no disc": missed, "disc on what is outside": invented}


def in_pictures(exam: Exam, answer: Image.Image) -> dict[str, list[float]]:
    """PSNR in dB of all that the true answer changes, and of what it leaves alone; and the same for the input."""
    (task,) = exam.tasks
    before, after, truth = (
        np.asarray(picture, dtype=np.float32) for picture in (exam.image, answer, task.draw(exam.image, exam.truth))
    )
    changed = np.abs(truth - before).max(-1) >= CHANGED
    values: dict[str, list[float]] = {}
    for name, pixels in (("inside", changed), ("outside", ~changed)):
        if pixels.sum() >= 10:
            for of, picture in (("", after), (", input", before)):
                error = ((picture - truth)[pixels] ** 2).mean()
                values[f"PSNR {name} the change{of}"] = [min(100.0, 10 * np.log10(255**2 / max(error, 1e-9)))]
    return values


def distance(a: Any, b: Any) -> float:
    """Between two joints, in pixels."""
    return float(np.hypot(a.x - b.x, a.y - b.y))


if __name__ == "__main__":
    main()
