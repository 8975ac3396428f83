"""Score a model on data sets as they are published, and write a table, JSON and contact sheets.

python examples/evaluate.py --data coco=/data/coco --data gopro=/data/GoPro --samples 500 --output out/scores

Killed, it goes on where it was when started again. Layouts of the folders: see docs/datasets.md.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset
from edit import TINY_MODEL, load

from instructdiffusion_pipeline import FAMILIES, InstructDiffusionPipeline, load_presets, model_resolution
from instructdiffusion_pipeline.datasets.coco_stuff import CocoStuff
from instructdiffusion_pipeline.datasets.editing import HubTable, InstructPix2Pix, gier, gqa_inpaint, magicbrush
from instructdiffusion_pipeline.datasets.keypoints import aic, coco, crowdpose, mpii
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.datasets.referring_expressions import ReferringExpressions
from instructdiffusion_pipeline.datasets.restoration import clwd, gopro, reds, sidd
from instructdiffusion_pipeline.datasets.specs import ORIGINAL
from instructdiffusion_pipeline.datasets.transforms import Resize, SquareCrop
from instructdiffusion_pipeline.evaluation import (
    Case,
    EvaluationPersonCrop,
    classical,
    evaluate,
    examples_from,
    whole_person,
)
from instructdiffusion_pipeline.evaluation.metrics import AIC_SIGMAS, COCO_SIGMAS, CROWDPOSE_SIGMAS, ClipSimilarity
from instructdiffusion_pipeline.readout import LearnedReading
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints


def refer(references: str) -> Callable[[Path, str], ReferringExpressions]:
    """A reader of references in COCO's folder of 2014."""
    return lambda root, split: ReferringExpressions(root / references, root / "images" / "train2014", split)


# Reader, the split that is not for training, and what is cut out of a picture for a working size (None: all is asked).
DATA: dict[str, tuple[Callable[..., Any], str, Callable[[int], Any] | None]] = {
    "coco": (coco, "val2017", partial(EvaluationPersonCrop, sigmas=COCO_SIGMAS)),
    "crowdpose": (crowdpose, "test", partial(EvaluationPersonCrop, sigmas=CROWDPOSE_SIGMAS)),
    "aic": (aic, "val", partial(EvaluationPersonCrop, sigmas=AIC_SIGMAS)),
    "mpii": (mpii, "valid", EvaluationPersonCrop),
    "coco-stuff": (CocoStuff, "val2017", None),
    "refcoco": (refer("refcoco/refs(unc).p"), "val", None),
    "refcoco+": (refer("refcoco+/refs(unc).p"), "val", None),
    "refcocog": (refer("refcocog/refs(umd).p"), "val", None),
    "grefcoco": (refer("grefcoco/grefs(unc).json"), "val", None),
    "gopro": (gopro, "test", SquareCrop),
    "reds": (reds, "val", SquareCrop),
    "sidd": (sidd, "val", partial(SquareCrop, resize=False)),
    "clwd": (clwd, "test", SquareCrop),
    "instructpix2pix": (InstructPix2Pix, "test", Resize),
    "gier": (gier, "test", Resize),
    "gqa-inpaint": (gqa_inpaint, "test", Resize),
    "magicbrush": (magicbrush, "dev", Resize),
    "table": (lambda folder, split: HubTable(load_dataset(str(folder), split=split)), "train", Resize),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the model that ships)")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=FOLDER", help=f"repeatable; tiny, {', '.join(DATA)}"
    )
    parser.add_argument("--split", help="of every --data (default: the one for validation or tests)")
    parser.add_argument("--samples", type=int, default=500, help="of each data set")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's or the task's preset)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, help="working size (default: the one the model was trained at)")
    parser.add_argument("--clip", help="folder or Hub id of a CLIP model, to compare edited pictures")
    parser.add_argument("--output", type=Path, default=Path("evaluation"))
    args = parser.parse_args()

    pipeline = load(args.model)
    resolution = args.resolution or model_resolution(pipeline)
    cases: list[Case] = []
    try:
        for entry in args.data:
            name, _, folder = entry.partition("=")
            cases += cases_of(name, Path(folder), args.split, args.samples, args.seed, resolution)
        presets = load_presets(args.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options = {"clip": ClipSimilarity(args.clip) if args.clip else None, "reading": LearnedReading.beside(args.model)}
    if any(entry.startswith("tiny=") for entry in args.data):
        options["baselines"] = {"classical": classical}
    run(pipeline, cases, args.output, presets, args.steps, args.batch_size, args.seed, resolution, **options)


def cases_of(name: str, folder: Path, split: str | None, count: int, seed: int, resolution: int) -> list[Case]:
    """`count` cases of one data set; people are asked for all their joints, other pictures as in training."""
    if name == "tiny":  # the small model's world: many rows, made by the scripts of its recipe
        sys.path.append(str(Path(__file__).parent / "tiny"))
        from held_out import rows

        return [case for source in rows(folder, count) for case in examples_from(source, count, seed)]
    if name not in DATA:
        raise ValueError(f"--data: NAME must be one of tiny, {', '.join(DATA)}; got {name!r}.")
    read, usual, geometry = DATA[name]
    split, pick = split or usual, ORIGINAL[name].from_annotation if name in ORIGINAL else Editing.from_annotation
    source = Source(f"{name} {split}", read(folder, split), pick, geometry(resolution) if geometry else None)
    return examples_from(source, count, seed, whole_person if pick == Keypoints.from_annotation else None)


def run(
    pipeline: InstructDiffusionPipeline,
    cases: Sequence[Case],
    output: Path,
    presets: Mapping[str, Mapping[str, Any]],
    steps: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resolution: int | None = None,
    **options: Any,
) -> None:
    """Evaluate with a model's `presets`, or with other `steps`, and show the table; `options` go to `evaluate`."""
    own = {"num_inference_steps": steps} if steps else {}
    settings = {family: {**presets.get(family, {}), **own} for family in FAMILIES}
    pipeline.set_progress_bar_config(disable=True)
    evaluate(pipeline, cases, output, settings, batch_size, seed, resolution, **options)
    print((output / "table.md").read_text(), f"\nContact sheets: {output}/*.png")


if __name__ == "__main__":
    main()
