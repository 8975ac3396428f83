"""Evaluate `instructdiffusion-tiny` on generated scenes that were not used in training.

    python examples/tiny/score.py --model out/model --world out/tiny/world --samples 500 --output out/scores

The script evaluates every row defined in held_out.py; an interrupted run is resumed when it is started again. It adds
metrics that `evaluate` does not compute: whether the model segments the named object, whether it swaps left and right,
PSNR inside and outside the edited region, and whether the model segments the objects that it added. It writes the
files of `evaluate`, beyond.json (the additional metrics), scores.md (the table of the model card) and the folder "own"
with the segmentation of added objects. `examples/tiny/train.py --work_dir out/tiny` creates the folder out/tiny/world.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DModel
from edits import Change
from held_out import CHANGES, SEED, held_out_world, rows
from PIL import Image
from recipes import RECIPES, add_recipe_argument
from table import OWN, table
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import integer, load_pipeline, run_script
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.evaluation import (
    Example,
    LazyExample,
    classical_baseline,
    evaluate,
    examples_from,
    vae_reconstruction,
)
from instructdiffusion_pipeline.evaluation.baselines import inpaint
from instructdiffusion_pipeline.evaluation.metrics import Overlap
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.readout import read_answer
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, visible_colors
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

MIN_CHANGE = 16  # gray levels in one channel; pixels that the ground truth changes by less are outside the change
MIN_PAINTED = 0.01  # fraction of the image; smaller masks count as empty
TINY_MODEL = Path(__file__).parent.parent / "instructdiffusion-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world", type=Path, required=True, help="folder `world` in the work folder of examples/tiny/train.py"
    )
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    parser.add_argument(
        "--samples", type=integer(1), default=500, help="samples per row of the table (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=integer(1), default=32, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    add_recipe_argument(parser)
    args = parser.parse_args()

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    recipe = RECIPES[args.recipe]
    sources = rows(recipe, args.world, args.samples)
    cases = [case for source in sources for case in examples_from(source, args.samples)]
    baselines = {"classical": classical_baseline}
    results = evaluate(pipeline, cases, args.output, batch_size=args.batch_size, baselines=baselines)
    answers = answers_by_name(args.output)
    more_scores = beyond(cases, answers, pipeline)
    write_text(args.output / "beyond.json", json.dumps(more_scores, indent=2) + "\n")
    own = own_cases(held_out_world(recipe, args.world), sources, answers)
    own_results = evaluate(pipeline, own, args.output / "own", batch_size=32)
    scores = table(results, more_scores, own_results)
    write_text(args.output / "scores.md", scores)
    print(scores)


def answers_by_name(folder: Path) -> dict[str, Path]:
    """Return the paths of the output images that `evaluate` saved, by the names of the examples."""
    records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    return {record["name"]: folder / "answers" / answer_name(record["index"], 0) for record in records}


def beyond(
    cases: Sequence[LazyExample], answers: Mapping[str, Path], pipeline: InstructDiffusionPipeline
) -> dict[str, dict[str, float]]:
    """Return the means of the scores of `in_masks`, `in_joints` and `in_pictures`, by row."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        example = case.open()
        answer = Image.open(answers[case.name])
        (task,) = example.tasks
        if task.family == "segmentation":
            measured = in_masks(example, answer, pipeline.readout)
        elif task.family == "keypoints":
            measured = in_joints(example, answer, pipeline.readout)
        else:
            truth = task.draw(example.image, example.truth)
            (ceiling,) = vae_reconstruction(pipeline, [truth], max(truth.size))
            shown = {"": answer, ", input": example.image, ", ceiling": ceiling}
            if case.row == "objects removed":
                shown[", inpainted"] = inpaint(example.image, truth)
            measured = in_pictures(example.image, truth, shown)
        for name, value in measured.items():
            values[case.row][name] += value
    return {
        row: {name: round(float(np.mean(each)), 4) for name, each in columns.items() if each}
        for row, columns in values.items()
    }


def in_masks(example: Example, answer: Image.Image, readout: UNet2DModel | None = None) -> dict[str, list[float]]:
    """Score a mask, decoded with the readout if there is one.

    If the object is absent: whether the mask is a false positive. If it is present: the IoU. If there are several
    objects: also the IoU of a mask of all objects, and whether the IoU with the named object is higher than the IoU
    with the others.
    """
    (task,) = example.tasks
    ((name, found),) = read_answer(task, example.image, answer, readout=readout).items()
    if not example.truth[name].any():
        return {"painted though absent": [found.pixels.mean() > MIN_PAINTED]}
    everything = np.logical_or.reduce(list(example.truth.values()))
    rest = everything & ~example.truth[name]
    overlap = Overlap.of(name, example.truth[name], found.pixels).iou
    values = {"mIoU where present": [overlap]}
    if rest.any():
        values["mIoU among several"] = [overlap]
        values["mIoU among several, all objects painted"] = [Overlap.of(name, example.truth[name], everything).iou]
        values["the asked one of several"] = [overlap > Overlap.of(name, rest, found.pixels).iou]
    return values


def in_joints(example: Example, answer: Image.Image, readout: UNet2DModel | None = None) -> dict[str, list[float]]:
    """Score joints: swapped with the joint on the other side, not detected, or detected but outside the image.

    They are decoded with the readout if there is one.
    """
    (task,) = example.tasks
    swaps = {"left": "right", "right": "left"}
    confused, missed, invented = [], [], []
    for name, found in read_answer(task, example.image, answer, readout=readout).items():
        truth = example.truth[name]
        if truth is None:
            invented.append(found is not None)
            continue
        missed.append(found is None)
        side, _, part = name.partition(" ")
        other = example.truth.get(f"{swaps.get(side)} {part}")
        if found and other:
            confused.append(distance(found, other) < distance(found, truth))
    return {"left and right confused": confused, "no disc": missed, "disc on what is outside": invented}


def in_pictures(before: Image.Image, truth: Image.Image, shown: dict[str, Image.Image]) -> dict[str, list[float]]:
    """Return the PSNR in dB of each image in `shown`, inside and outside the region that the ground truth changes."""
    right = np.asarray(truth, dtype=np.float32)
    changed = np.abs(right - np.asarray(before, dtype=np.float32)).max(-1) >= MIN_CHANGE
    values: dict[str, list[float]] = {}
    for name, pixels in (("inside", changed), ("outside", ~changed)):
        if pixels.sum() >= 10:
            for column, picture in shown.items():
                error = ((np.asarray(picture, dtype=np.float32) - right)[pixels] ** 2).mean()
                values[f"PSNR {name} the change{column}"] = [min(100.0, 10 * np.log10(255**2 / max(error, 1e-9)))]
    return values


def own_cases(world: World, sources: Sequence[Source], answers: Mapping[str, Path]) -> list[LazyExample]:
    """Return segmentation examples for the objects that the model has added in its output images."""

    def open_case(change: Callable[[World, random.Random], Change], index: int, path: Path) -> Example:
        rng = random.Random(f"{SEED} {index}")  # the seed of `GeneratedDataset`
        after = change(world, rng).after
        name, mask = after.things[-1].name, after.masks[-1]
        picture = Image.open(path).convert("RGB")
        color = rng.choice(visible_colors(picture, mask, MASK_COLORS))
        return Example(picture, [Segmentation({name: color})], {name: mask})

    cases = []
    for what in ("replaced", "added"):
        (source,) = (source for source in sources if source.name == f"objects {what}")
        for index in range(len(source.dataset)):
            name = f"{source.name} {index}: {source.dataset.name(index)}"
            if name in answers:
                read = partial(open_case, CHANGES[what], index, answers[name])
                cases.append(LazyExample(name, OWN.format(what), read))
    return cases


def distance(a: Any, b: Any) -> float:
    """Return the distance of two joints in pixels."""
    return float(np.hypot(a.x - b.x, a.y - b.y))


if __name__ == "__main__":
    run_script(main)
