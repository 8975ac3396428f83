"""Evaluate a pipeline: run it on examples and compute the scores of its outputs and of the VAE upper bound."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from instructdiffusion_pipeline.ask import Answer, ask_batch, draw_overlay, size_settings
from instructdiffusion_pipeline.evaluation import report
from instructdiffusion_pipeline.evaluation.examples import Example, LazyExample
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity
from instructdiffusion_pipeline.evaluation.scoring import measure, score_key
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.fingerprint import check_run_config, content_hash, pipeline_fingerprint
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.tasks import PictureTask, Task
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Segmentation, masks_from_margins
from instructdiffusion_pipeline.views import decode_pictures

Settings = Mapping[str, Mapping[str, Any]]
Baseline = Callable[[Example], Any]  # returns a prediction, or None if the baseline does not apply
# Columns of the table that baselines cannot have.
COLUMNS = frozenset({"model", "ceiling", "input", "input through the VAE", "output alone", "decoding by color"})


@torch.no_grad()
def evaluate(
    pipeline: InstructDiffusionPipeline,
    examples: Sequence[LazyExample],
    folder: str | os.PathLike[str],
    settings_by_family: Settings | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resolution: int | None = None,
    resize_mode: str | None = None,
    clip: ClipSimilarity | None = None,
    baselines: Mapping[str, Baseline] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on `examples`, and write table.md, results.json and a contact sheet for each row of the table.

    The column "model" has the data of `ask`, at the resolution of the images. For restored and edited images a column
    "output alone" has the output of the model, enlarged. With a readout, the column "model" is decoded by the readout
    and the column "decoding by color" by `task.read`.

    An interrupted run is resumed by calling it again with the same arguments; the results are identical. The examples
    that it has scored are opened again to check that they have not changed. An example that cannot be opened, drawn or
    scored is counted and listed below the table. An exception of the pipeline ends the run.

    Args:
        pipeline: an `InstructDiffusionPipeline`.
        examples: see `examples_from`.
        folder: new, or with records of the same run.
        settings_by_family: arguments of the pipeline's call by task family, which override those of the model.
        batch_size: number of tasks per pipeline call, and of examples per write.
        seed: seed of the noise; the noise of a task depends on the seed and the index of its example.
        resolution: working size in pixels; by default the model's own, as in `ask`.
        resize_mode: "stretch" or, as in the original code, "crop"; by default the model's own, as in `ask`.
        clip: adds the CLIP similarity to the scores of edited images.
        baselines: other methods, such as `classical_baseline`, by the name of their column.

    Returns:
        The content of results.json.

    Raises:
        ValueError: if names of examples or sources are not unique, the folder has records of another run or of
            examples with other content, or no example can be scored.
    """
    settings = settings_by_family or {}
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0; got {seed}.")
    if resize_mode not in (None, "crop", "stretch"):
        raise ValueError(f'`resize_mode` must be "crop", "stretch" or None; got {resize_mode!r}.')
    if taken := sorted(COLUMNS.intersection(baselines or ())):
        raise ValueError(f"`baselines` must not have the names {', '.join(taken)}, which are other columns.")
    report.check_examples(examples)
    run = {
        "model": pipeline_fingerprint(pipeline),
        "settings": {family: dict(values) for family, values in settings.items()},
        "resolution": resolution,
        "resize_mode": resize_mode,
        "batch_size": batch_size,
        "seed": seed,
        "clip": clip and clip.name,
        "baselines": list(baselines or ()),
        "examples": hashlib.sha256(json.dumps([(one.name, one.row) for one in examples]).encode()).hexdigest()[:16],
    }
    folder = Path(folder)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    records = resume(folder, run, len(examples), batch_size)
    check_content(folder, examples, records)
    evaluator = Evaluator(
        pipeline, settings, batch_size, seed, resolution, resize_mode, clip, baselines or {}, folder / "answers"
    )
    with (
        tqdm(total=len(examples), initial=len(records), desc="examples") as bar,
        open(folder / "records.jsonl", "a") as file,
    ):
        for start in range(len(records), len(examples), batch_size):
            indices = range(start, min(start + batch_size, len(examples)))
            chunk = evaluator.run({index: examples[index] for index in indices})
            file.writelines(json.dumps(record) + "\n" for record in chunk)
            file.flush()
            os.fsync(file.fileno())
            records += chunk
            bar.update(len(chunk))
    return report.write(folder, run, examples, records)


def resume(folder: Path, run: Mapping[str, Any], count: int, batch_size: int) -> list[dict[str, Any]]:
    """The complete batches of records of this `run` in `folder`. An incomplete batch is removed from the file."""
    path = folder / "records.jsonl"
    if path.exists() and not (folder / "run.json").exists():
        raise ValueError(f"There is no run.json beside {path}, so its settings are unknown. Choose another folder.")
    check_run_config(folder, "run.json", run, "records of the same run")
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if len(lines) < count:
        lines = lines[: len(lines) // batch_size * batch_size]
    if path.exists():
        os.truncate(path, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


def check_content(folder: Path, examples: Sequence[LazyExample], records: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError if an example has other images or instructions than when its record was made."""
    for record in tqdm(records, desc="checking", disable=not records):
        example = examples[record["index"]]
        if "content" in record and example_hash(opened := example.open(), draw_truths(opened)) != record["content"]:
            raise ValueError(
                f"The folder {folder} must be new or have records of the same run; {example.name!r} has changed since."
                " Choose another folder, or delete this one."
            )


def draw_truths(example: Example) -> list[Image.Image]:
    """The ground-truth image of each task."""
    return [task.draw(example.image, example.truth) for task in example.tasks]


def example_hash(example: Example, truths: Sequence[Image.Image]) -> str:
    """A hash of the image, the instructions and the ground-truth images of an example."""
    return content_hash([example.image, *truths], [task.instruction() for task in example.tasks])


@dataclass(frozen=True)
class Question:
    """Task `number` of the example at `index`, and its ground-truth image."""

    index: int
    number: int
    example: Example
    task: Task
    truth: Image.Image


@dataclass(frozen=True)
class Evaluator:
    """Runs the pipeline on batches of examples and scores them; see `evaluate`."""

    pipeline: InstructDiffusionPipeline
    settings: Settings
    batch_size: int
    seed: int
    resolution: int | None
    resize_mode: str | None
    clip: ClipSimilarity | None
    baselines: Mapping[str, Baseline]
    folder: Path

    def run(self, batch: Mapping[int, LazyExample]) -> list[dict[str, Any]]:
        """The records of a batch of examples. They depend on the batch only, so that a run can be resumed."""
        examples: dict[int, Example] = {}
        records = {index: {"index": index, "name": lazy.name, "row": lazy.row} for index, lazy in batch.items()}
        groups: dict[tuple, list[Question]] = defaultdict(list)
        for index, lazy in batch.items():
            try:
                example = lazy.open()
                options = self.size(example.tasks[0])
                size = self.pipeline.working_size(*example.image.size, **options).size
                truths = draw_truths(example)
                if odd := [picture.size for picture in truths if picture.size != example.image.size]:
                    raise ValueError(f"the ground truth must have the image size {example.image.size}; got {odd[0]}.")
            except Exception as error:  # any exception, so that one bad example does not end the run
                records[index]["error"] = one_line(error)
                continue
            examples[index] = example
            records[index]["content"] = example_hash(example, truths)
            for number, (task, picture) in enumerate(zip(example.tasks, truths, strict=True)):
                groups[task.family, size].append(Question(index, number, example, task, picture))

        answers: dict[int, list[Answer]] = defaultdict(list)
        ceilings: dict[int, list[Image.Image]] = defaultdict(list)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                questions = group[start : start + self.batch_size]
                truths = [question.truth for question in questions]
                reconstructed = vae_reconstruction(self.pipeline, truths, **self.size(questions[0].task))
                for question, answer, picture in zip(questions, self.ask(questions), reconstructed, strict=True):
                    place = question.index, question.number
                    for part, (_, output) in enumerate(answer.outputs):
                        save_image(self.folder / report.answer_name(*place, part), output)
                    if isinstance(question.task, PictureTask):
                        save_image(self.folder / report.result_name(*place), answer.data)
                    answers[question.index].append(answer)
                    ceilings[question.index].append(picture)

        for index, example in examples.items():
            try:
                save_image(self.folder / report.overlay_name(index), draw_overlay(answers[index]))
                records[index] |= self.score(example, answers[index], ceilings[index])
            except Exception as error:
                records[index]["error"] = one_line(error)
        return list(records.values())

    def size(self, task: Task) -> dict[str, Any]:
        """`resolution` and `resize_mode` for a task: of the run, or else of its settings, or else of `ask`."""
        of_run = {"resolution": self.resolution, "resize_mode": self.resize_mode}
        given = {name: value for name, value in of_run.items() if value is not None}
        return size_settings(self.pipeline, task, {**self.settings.get(task.family, {}), **given})

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Run the pipeline on tasks of one family and one working size, each with its own seed."""
        task = questions[0].task
        keys = [np.random.SeedSequence((self.seed, question.index, question.number)) for question in questions]
        return ask_batch(
            self.pipeline,
            [question.example.image for question in questions],
            [question.task for question in questions],
            generator=[torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0])) for key in keys],
            **{**self.settings.get(task.family, {}), **self.size(task)},
        )

    def score(self, example: Example, answers: Sequence[Answer], ceilings: Sequence[Image.Image]) -> dict[str, Any]:
        """Measurements per column: model, ceiling, decoding by color or (for images) output and input, baselines."""
        box, task = answers[0].box, example.tasks[0]

        readings = {"model": merge([answer.data for answer in answers])}
        reconstructed = answers[0].reconstruction
        if isinstance(task, PictureTask) and reconstructed is not None:
            readings["ceiling"] = task.transfer(example.image, reconstructed, ceilings[0], box)
            readings["output alone"] = task.read(example.image, answers[0].picture, box)
            # The VAE alone removes some noise. These columns show its effect.
            readings["input"] = example.image
            readings["input through the VAE"] = task.read(example.image, reconstructed, box)
        else:
            pairs = zip(example.tasks, ceilings, strict=True)
            readings["ceiling"] = merge([task.read(example.image, picture, box) for task, picture in pairs])
            if self.pipeline.readout is not None and isinstance(task, Segmentation | Keypoints):
                readings["decoding by color"] = merge([decode_by_color(answer) for answer in answers])
        for name, baseline in self.baselines.items():
            if (reading := baseline(example)) is not None:
                readings[name] = reading
        measures = {name: measure(example, reading, box, self.clip) for name, reading in readings.items()}
        return {"box": box, "score_key": score_key(measures["model"]), "measures": measures}


@torch.no_grad()
def vae_reconstruction(
    pipeline: InstructDiffusionPipeline,
    pictures: Sequence[Image.Image],
    resolution: int | None = None,
    resize_mode: str = "stretch",
) -> list[Image.Image]:
    """Encode and decode images of one working size, with the same resizing as in a call. Results have working size."""
    pixels, _ = pipeline.preprocess_image(list(pictures), resolution, resize_mode)
    return decode_pictures(pipeline, pipeline.encode_image_latents(pixels, pipeline._execution_device))


def decode_by_color(answer: Answer) -> Any:
    """The data of an answer of `ask` with `use_readout=False`, without slices and calibration."""
    if isinstance(answer.task, Segmentation):
        parts = [cast(Segmentation, task).margins(answer.image, output, answer.box) for task, output in answer.outputs]
        return masks_from_margins({name: margin for part in parts for name, margin in part.items()})
    ((task, output),) = answer.outputs
    return task.read(answer.image, output, answer.box)


def one_line(error: Exception) -> str:
    """An exception as one line of text."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def merge(readings: Sequence[Any]) -> Any:
    """Merge the decoded data of an example's tasks."""
    return readings[0] if len(readings) == 1 else {name: value for part in readings for name, value in part.items()}
