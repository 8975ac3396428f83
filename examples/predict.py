"""Run a model for one task on many images, and write the results to files.

    python examples/predict.py --task segmentation --objects "sunflower, dog" --images photos --output out
    python examples/predict.py --task keypoints --joints "left wrist, nose" --images photos --output out
    python examples/predict.py --task restoration --degradation noise --images photos --output out
    python examples/predict.py --task editing --instruction "make it night" --images photos --output out

Segmentation writes masks as PNG and coco.json (RLE, boxes, scores), keypoints writes coco.json, both with overlays;
restoration and editing write images at the resolution of the input. An interrupted run is resumed when it is started
again; it processes images that have changed, or whose results are missing. Images that cannot be read are skipped with
a message.
"""

import argparse
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from instructdiffusion_pipeline import (
    MASK_COLORS,
    Answer,
    Editing,
    InstructDiffusionPipeline,
    Joint,
    Mask,
    Restoration,
    Segmentation,
    ask_batch,
    joint_tasks,
)
from instructdiffusion_pipeline.ask import draw_overlay, size_settings
from instructdiffusion_pipeline.cli import UsageError, integer, load_pipeline, open_image, run_script, split_names
from instructdiffusion_pipeline.files import save_image, write_text
from instructdiffusion_pipeline.fingerprint import check_run_config, pipeline_fingerprint
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import assign_colors
from instructdiffusion_pipeline.tasks.restoration import Degradation

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_NAME = 245  # bytes of a file name: file systems allow 255, of which `atomic_write` needs ten
# task -> the option with its argument
QUESTIONS = {
    "segmentation": "objects",
    "keypoints": "joints",
    "restoration": "degradation",
    "editing": "instruction",
}


class Input(NamedTuple):
    """An image with its tasks, and the hash of its file."""

    image: Image.Image
    tasks: list[Task]
    sha256: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="image files, or folders of image files")
    parser.add_argument("--task", choices=QUESTIONS, required=True)
    parser.add_argument("--objects", help="names of objects, separated by commas")
    parser.add_argument("--joints", help="names of joints, separated by commas")
    parser.add_argument("--degradation", choices=get_args(Degradation), help="what to remove")
    parser.add_argument("--instruction", help='the edit, for example "make it night"')
    parser.add_argument("--slices", type=float, help="for small objects: side of overlapping slices, for example 0.56")
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    parser.add_argument(
        "--steps", type=integer(1), help="number of denoising steps (default: the model's `task_settings`)"
    )
    parser.add_argument(
        "--batch_size",
        type=integer(1),
        default=8,
        help="images per pipeline call; several objects of a segmentation need as much memory as several images"
        " (default: %(default)s)",
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="output folder; new, or of an interrupted run")
    args = parser.parse_args()

    question = check_question(args)
    paths = list(find_pictures(args.images))
    names = unique_names(paths)
    check_file_names(args.task, question, names.values())
    check_folder(args.output, paths)
    if args.task == "segmentation":
        import pycocotools  # noqa: F401 - masks are written as COCO's run lengths

    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    args.output.mkdir(parents=True, exist_ok=True)
    run = {
        "model": pipeline_fingerprint(pipe),
        "question": {args.task: question},
        "settings": {"slices": args.slices, "steps": args.steps, "seed": args.seed},
        "pictures": [str(path) for path in paths],
    }
    check_run_config(args.output, "run.json", run, "answers of the same run")
    records = args.output / "records"
    records.mkdir(exist_ok=True)
    numbers = {path: number for number, path in enumerate(paths)}
    settings = {} if args.steps is None else {"num_inference_steps": args.steps}

    found = {path: records / f"{names[path]}.json" for path in paths}
    results = {path: [args.output / file for file in result_files(args.task, question, names[path])] for path in paths}
    open_paths = [path for path in paths if not is_done(path, found[path], results[path])]
    for path in open_paths:
        # So that no results of an earlier content of the image remain if it is skipped now.
        for file in (found[path], *results[path]):
            file.unlink(missing_ok=True)
    with tqdm(total=len(paths), initial=len(paths) - len(open_paths), desc="images") as bar:
        tasks_for = partial(make_tasks, args.task, question)
        for batch in batches(pipe, open_paths, tasks_for, args.batch_size, bar):
            images, tasks, hashes = zip(*batch.values(), strict=True)
            answers = [
                ask_batch(
                    pipe,
                    images,
                    column,
                    slices=args.slices,
                    # The noise depends on the number of the image, not on its batch.
                    generator=[seeded(args.seed, numbers[path]) for path in batch],
                    **settings,
                )
                for column in zip(*tasks, strict=True)
            ]
            for path, parts, sha256 in zip(batch, zip(*answers, strict=True), hashes, strict=True):
                record = write_answer(args.output, names[path], parts) | {"sha256": sha256}
                # Written last, so that an image without a record is processed again.
                write_text(found[path], json.dumps(record) + "\n")
                bar.update()

    done = {path: json.loads(record.read_text()) for path, record in found.items() if record.exists()}
    flagged = [path for path, record in done.items() if record.get("nsfw_content_detected")]
    for path in flagged:
        del done[path]
        print(f"skipped: the safety checker replaced the output for {path}")
    if args.task in ("segmentation", "keypoints"):
        folder = common_folder(paths)
        write_text(args.output / "coco.json", json.dumps(coco(args.task, question, done, folder), indent=1) + "\n")
        print(f"coco.json: file names are relative to {folder}")
    for path in done:
        if names[path] != path.stem:
            print(f"{path}: the names of its results start with {names[path]}")
    print(f"{len(done)} of {len(paths)} images processed: {args.output}")
    if not (done or flagged):
        raise ValueError("--images: no image could be processed; the messages above have the reasons.")


def check_question(args: argparse.Namespace) -> Any:
    """The value of the option that belongs to --task: a list of names, or a text. The other options must be absent."""
    wanted = QUESTIONS[args.task]
    for option in QUESTIONS.values():
        if option != wanted and getattr(args, option) is not None:
            raise UsageError(f"--{option} has no effect with --task {args.task}, which needs --{wanted}.")
    value = getattr(args, wanted)
    if not value or not value.strip():
        raise UsageError(f"--{wanted} must be given with --task {args.task}.")
    if args.slices is not None and (args.task != "segmentation" or not 0.1 <= args.slices < 1):
        raise UsageError("--slices must be from 0.1 to below 1, and needs --task segmentation.")
    if wanted not in ("objects", "joints"):
        return value
    names = split_names(value)
    limit = len(MASK_COLORS) if wanted == "objects" else 100
    if not 0 < len(set(names)) == len(names) <= limit:
        raise UsageError(f"--{wanted} must be one to {limit} different names; got {value!r}.")
    return names


def find_pictures(entries: Iterable[Path]) -> Iterator[Path]:
    """The image files among `entries` and directly in the folders among `entries`, each once."""
    found: dict[Path, None] = {}
    for entry in entries:
        if entry.is_dir():
            inside = sorted(path for path in entry.iterdir() if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise UsageError(f"--images: the folder {entry} has no images ({', '.join(sorted(SUFFIXES))}).")
            found |= dict.fromkeys(inside)
        elif entry.is_file():
            found[entry] = None
        else:
            raise UsageError(f"--images: there is no file or folder {entry}.")
    return iter(found)


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name for the output files of each image: its stem, and its number if several images have the same stem."""
    counts = Counter(path.stem for path in paths)
    names = {path: path.stem for path in paths if counts[path.stem] == 1}
    taken = set(names.values())
    for number, path in enumerate(paths):
        if path not in names:
            name = f"{path.stem}-{number}"
            while name in taken:
                name += f"-{number}"
            names[path] = name
            taken.add(name)
    return names


def output_file(name: str, part: str) -> str:
    """The file name of a mask or of the overlay of an image."""
    return f"{name}-{part}.png".replace("/", " ")


def result_files(task: str, question: Any, name: str) -> list[str]:
    """The file names of the results of an image."""
    if task in ("restoration", "editing"):
        return [f"{name}.png"]
    return [output_file(name, part) for part in ("overlay", *(question if task == "segmentation" else ()))]


def check_folder(folder: Path, paths: Iterable[Path]) -> None:
    """Raise a UsageError if --output is a file, has images of `paths`, or has other files and no run.json."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--output: must be a folder, but {folder} is a file.")
    if inside := [path.name for path in paths if path.parent.samefile(folder)]:
        raise UsageError(f"--output: must not be the folder of --images; {folder} has {inside[0]}.")
    # A run that was killed before it wrote run.json leaves a hidden folder.
    others = any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not (folder / "run.json").exists():
        raise UsageError(f"--output: {folder} has files that are not of an interrupted run. Choose a new folder.")


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_done(path: Path, record: Path, results: Iterable[Path]) -> bool:
    """Whether there is a record of an image with the present content of its file, and all files of its results.

    A record that is damaged or of an earlier version does not count, nor one of an image that cannot be read now.
    """
    try:
        content = json.loads(record.read_text())
        same = content["sha256"] == file_hash(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and ("nsfw_content_detected" in content or all(file.exists() for file in results))


def check_file_names(task: str, question: Any, names: Iterable[str]) -> None:
    """Raise a UsageError if a file of an image would have a too long name, or two results the same name."""
    counts = Counter(file for name in names for file in (f"{name}.json", *result_files(task, question, name)))
    if long := [file for file in counts if len(os.fsencode(file)) > MAX_NAME]:
        option = "--objects" if task == "segmentation" else "--images"
        raise UsageError(
            f"{option}: file names of results must have at most {MAX_NAME} bytes; got {long[0]}. Rename the image"
            f"{' or the object' if task == 'segmentation' else ''}."
        )
    if repeated := [file for file, count in counts.items() if count > 1]:
        raise UsageError(
            f"--objects: several outputs would have the name {repeated[0]}: masks are called IMAGE-OBJECT.png, and"
            " there is an IMAGE-overlay.png. Rename the object or the image."
        )


def batches(
    pipe: InstructDiffusionPipeline,
    paths: Sequence[Path],
    make_tasks: Callable[[Image.Image], list[Task]],
    batch_size: int,
    bar: tqdm,
) -> Iterator[dict[Path, Input]]:
    """Batches of images of one working size, with their tasks.

    Images that cannot be used are skipped with a message.
    """
    waiting: dict[tuple[int, int], dict[Path, Input]] = defaultdict(dict)
    for path in paths:
        try:
            # Before the image is read: if the file changes meanwhile, the image is processed again by the next run.
            sha256 = file_hash(path)
            image = open_image("--images", path)
            tasks = make_tasks(image)
            size = pipe.working_size(*image.size, **size_settings(pipe, tasks[0], {})).size
        except (OSError, ValueError) as error:
            bar.write(f"skipped: {error if isinstance(error, UsageError) else f'{path}: {error}'}")
            bar.update()
            continue
        waiting[size][path] = Input(image, tasks, sha256)
        # If there are many different sizes, incomplete batches are returned, so that few images are in memory.
        if len(waiting[size]) == batch_size or sum(map(len, waiting.values())) == 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def make_tasks(task: str, question: Any, image: Image.Image) -> list[Task]:
    """The tasks for an image: one, or one for every five joints."""
    if task == "segmentation":
        return [Segmentation(assign_colors(image, question, MASK_COLORS))]
    if task == "keypoints":
        return [*joint_tasks(image, question)]
    return [Restoration(question) if task == "restoration" else Editing(question)]


def seeded(seed: int, number: int) -> torch.Generator:
    """The random generator for an image of a run."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))


def write_answer(folder: Path, name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Write the result images of one input image, and return its record for coco.json.

    If the safety checker has replaced an output, no images are written.
    """
    (answer, *_) = answers
    record: dict[str, Any] = {"width": answer.image.width, "height": answer.image.height}
    if any(part.nsfw_content_detected for part in answers):
        return record | {"nsfw_content_detected": True}
    if isinstance(answer.data, Image.Image):
        save_image(folder / f"{name}.png", answer.data)
        return record
    save_image(folder / output_file(name, "overlay"), draw_overlay(answers))
    readings = {key: reading for part in answers for key, reading in part.data.items()}
    for key, reading in readings.items():
        if isinstance(reading, Mask):
            save_image(folder / output_file(name, key), Image.fromarray(reading.pixels))
    return record | {"readings": {key: as_json(reading) for key, reading in readings.items()}}


def as_json(reading: Mask | Joint | None) -> dict[str, Any] | list[float] | None:
    """A mask as the fields of a COCO annotation, a joint as x, y and score."""
    if not isinstance(reading, Mask):
        return reading and [float(value) for value in reading]
    area, box = int(reading.pixels.sum()), reading.box
    return {
        "bbox": box and (*box[:2], box[2] - box[0], box[3] - box[1]),
        "area": area,
        "segmentation": reading.rle,
        "score": reading.score,
    }


def common_folder(paths: Sequence[Path]) -> str:
    """The folder that contains all images, directly or in folders."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def coco(task: str, names: Sequence[str], records: dict[Path, dict[str, Any]], folder: str) -> dict[str, Any]:
    """The content of coco.json: an annotation for each mask that is not empty, or for the joints of each image.

    As in COCO, file names are relative to the `folder` of the images.
    """
    images, annotations = [], []
    for number, (path, record) in enumerate(records.items(), 1):
        readings = record["readings"]
        name = Path(os.path.relpath(path, folder)).as_posix()
        images.append({"id": number, "file_name": name, "width": record["width"], "height": record["height"]})
        if task == "segmentation":
            annotations += [
                {"image_id": number, "category_id": 1 + names.index(name), "iscrowd": 0, **reading}
                for name, reading in readings.items()
                if reading["area"]
            ]
        else:
            joints = [readings[name] for name in names]
            found = [joint[2] for joint in joints if joint]
            annotations.append(
                {
                    "image_id": number,
                    "category_id": 1,
                    "keypoints": [value for joint in joints for value in ((*joint[:2], 2) if joint else (0, 0, 0))],
                    "num_keypoints": len(found),
                    "score": sum(found) / len(joints),
                }
            )
    categories = (
        [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        if task == "segmentation"
        else [{"id": 1, "name": "person", "keypoints": list(names)}]
    )
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    run_script(main)
