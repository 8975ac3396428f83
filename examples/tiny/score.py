"""What only a made world can tell of a model's answers, beside the table of examples/evaluate.py.

    python examples/evaluate.py --model out/model --data tiny=out/tiny/world --samples 500 --output out/scores
    python examples/tiny/score.py --model out/model --world out/tiny/world --folder out/scores

Whether the name mattered, whether left is left, what became of the picture in and around the edited place, and whether
the model's own segmentation finds what it has put there. Writes beyond.json, the last of these into "own", and
scores.md, which has all that the model's card says.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from edits import Change
from held_out import CHANGES, SEED, rows
from PIL import Image
from table import OWN, table
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline, load_presets
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.evaluation import Example, LazyExample, evaluate, examples_from, vae_reconstruction
from instructdiffusion_pipeline.evaluation.baselines import inpaint
from instructdiffusion_pipeline.evaluation.metrics import Overlap
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.fingerprint import pipeline_fingerprint
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, visible_colors
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

CHANGED = 16  # grey levels in one channel: what counts as edited
PAINTED = 0.01  # of the picture


def main() -> None:
    sys.path.append(str(Path(__file__).parent.parent))
    from edit import TINY_MODEL, load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="the folder the recipe fetched its pictures to")
    parser.add_argument("--folder", type=Path, required=True, help="what examples/evaluate.py left")
    parser.add_argument("--model", default=str(TINY_MODEL))
    args = parser.parse_args()

    pipeline = load(args.model)  # as examples/evaluate.py does
    pipeline.set_progress_bar_config(disable=True)
    results = json.loads((args.folder / "results.json").read_text())
    if results["run"]["model"] != pipeline_fingerprint(pipeline):
        parser.error(f"--folder: {args.folder} must have the answers of {args.model}; it has those of another model")
    count = max(row["samples"] + len(row["failed"]) for row in results["rows"])
    sources = rows(args.world, count)
    cases = [case for source in sources for case in examples_from(source, count, results["run"]["seed"])]
    answers = answers_by_name(args.folder)
    if missing := [case.name for case in cases if case.name not in answers]:
        parser.error(f"--folder: {args.folder} must have answers to all cases; it has none to {missing[0]}")
    found = beyond(cases, answers, pipeline)
    (args.folder / "beyond.json").write_text(json.dumps(found, indent=2) + "\n")
    own = own_cases(World(args.world, unseen_photographs=True), sources, answers)
    own_results = evaluate(pipeline, own, args.folder / "own", load_presets(args.model), batch_size=32)
    scores = table(results, found, own_results)
    (args.folder / "scores.md").write_text(scores)
    print(scores)


def answers_by_name(folder: Path) -> dict[str, Path]:
    """The pictures that an evaluation left, by the names of its cases."""
    records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    return {record["name"]: folder / "answers" / answer_name(record["index"], 0) for record in records}


def beyond(
    cases: Sequence[LazyExample], answers: Mapping[str, Path], pipeline: InstructDiffusionPipeline
) -> dict[str, dict[str, float]]:
    """Means by row of what the table does not have (see `in_masks`, `in_joints` and `in_pictures`)."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        example = case.open()
        answer = Image.open(answers[case.name])
        (task,) = example.tasks
        if task.family == "segmentation":
            measured = in_masks(example, answer)
        elif task.family == "keypoints":
            measured = in_joints(example, answer)
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


def in_masks(example: Example, answer: Image.Image) -> dict[str, list[float]]:
    """IoU where the object is there, also if everything that may be asked for here were painted, whatever the words.

    Of several that are there, as the left and the right one: is the one that was asked for painted better than the
    others?
    """
    (task,) = example.tasks
    ((name, found),) = task.read(example.image, answer).items()
    if not example.truth[name].any():
        return {"painted though absent": [found.pixels.mean() > PAINTED]}
    everything = np.logical_or.reduce(list(example.truth.values()))
    rest = everything & ~example.truth[name]
    overlap = Overlap.of(name, example.truth[name], found.pixels).iou
    values = {"mIoU where present": [overlap]}
    if rest.any():
        values["mIoU among several"] = [overlap]
        values["mIoU among several, all objects painted"] = [Overlap.of(name, example.truth[name], everything).iou]
        values["the asked one of several"] = [overlap > Overlap.of(name, rest, found.pixels).iou]
    return values


def in_joints(example: Example, answer: Image.Image) -> dict[str, list[float]]:
    """Of the joints on a side: found nearer to the same joint of the other side. Of all: no disc; a disc too many."""
    (task,) = example.tasks
    swaps = {"left": "right", "right": "left"}
    confused, missed, invented = [], [], []
    for name, found in task.read(example.image, answer).items():
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
    """PSNR in dB of each picture in `shown`: of all that the true answer changes, and of what it leaves alone."""
    right = np.asarray(truth, dtype=np.float32)
    changed = np.abs(right - np.asarray(before, dtype=np.float32)).max(-1) >= CHANGED
    values: dict[str, list[float]] = {}
    for name, pixels in (("inside", changed), ("outside", ~changed)):
        if pixels.sum() >= 10:
            for of, picture in shown.items():
                error = ((np.asarray(picture, dtype=np.float32) - right)[pixels] ** 2).mean()
                values[f"PSNR {name} the change{of}"] = [min(100.0, 10 * np.log10(255**2 / max(error, 1e-9)))]
    return values


def own_cases(world: World, sources: Sequence[Source], answers: Mapping[str, Path]) -> list[LazyExample]:
    """The model's pictures with something new in them, and the question where that is."""

    def open_case(change: Callable[[World, random.Random], Change], index: int, path: Path) -> Example:
        rng = random.Random(f"{SEED} {index}")  # as `Drawn` has it
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
    """Between two joints, in pixels."""
    return float(np.hypot(a.x - b.x, a.y - b.y))


if __name__ == "__main__":
    main()
