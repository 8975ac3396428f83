"""A pipeline over cases: every answer is scored, beside what the VAE alone would allow, and written down at once."""

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

from instructdiffusion_pipeline.ask import Answer, ask_batch, model_resolution
from instructdiffusion_pipeline.evaluation import report
from instructdiffusion_pipeline.evaluation.examples import Case, Example
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity
from instructdiffusion_pipeline.evaluation.scoring import measure, score_key
from instructdiffusion_pipeline.fingerprint import check_run_config, fingerprint, pipeline_fingerprint
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline, working_size
from instructdiffusion_pipeline.readout import LearnedReading
from instructdiffusion_pipeline.tasks import Task

Settings = Mapping[str, Mapping[str, Any]]
Baseline = Callable[[Example], Any]  # another way to answer a case, as data; None: not such a one


@torch.no_grad()
def evaluate(
    pipeline: InstructDiffusionPipeline,
    cases: Sequence[Case],
    folder: str | os.PathLike[str],
    settings_by_family: Settings | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resolution: int | None = None,
    clip: ClipSimilarity | None = None,
    reading: LearnedReading | None = None,
    baselines: Mapping[str, Baseline] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on `cases` and leave table.md, results.json and a contact sheet for each row in `folder`.

    A run may be killed at any instant and called again with the same arguments: it goes on after the last
    `batch_size` cases that are complete in records.jsonl, and ends with the same files. A case that cannot be opened,
    drawn or scored is counted and named in the table; what the pipeline itself raises ends the run.

    Args:
        folder: made if need be. Records that another run left there are refused.
        settings_by_family: what goes to the pipeline, by the task's family ("segmentation": {...}); comes
            before the task's preset.
        batch_size: cases that are answered and written down together, and questions in a call of the pipeline.
        seed: with the place of the case in `cases` and of the question in the case, it fixes the noise.
        resolution: working size in pixels (default: what the model's UNet was made for).
        clip: adds a CLIP similarity to scores of pictures.
        reading: masks and joints are also read by it; its scores get a column of their own.
        baselines: other ways to answer, such as `classical`, by the names of the columns that get their scores.

    Returns:
        What results.json holds.

    Raises:
        ValueError: if names of cases are not unique, the folder holds another run, or no case at all can be scored.
    """
    resolution = resolution or model_resolution(pipeline)
    settings = settings_by_family or {}
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more; got {batch_size}.")
    report.check_names(cases)
    run = {
        "model": pipeline_fingerprint(pipeline),
        "settings": {family: dict(values) for family, values in settings.items()},
        "resolution": resolution,
        "batch_size": batch_size,
        "seed": seed,
        "clip": clip and clip.name,
        "reading": reading and fingerprint(reading.unet),
        "baselines": list(baselines or ()),
        "cases": hashlib.sha256(json.dumps([(case.name, case.row) for case in cases]).encode()).hexdigest()[:16],
    }
    folder = Path(folder)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    records = resume(folder, run, len(cases), batch_size)
    evaluator = Evaluator(
        pipeline, settings, batch_size, seed, resolution, clip, reading, baselines or {}, folder / "answers"
    )
    with (
        tqdm(total=len(cases), initial=len(records), desc="cases") as bar,
        open(folder / "records.jsonl", "a") as file,
    ):
        for start in range(len(records), len(cases), batch_size):
            chunk = evaluator.run({index: cases[index] for index in range(start, min(start + batch_size, len(cases)))})
            file.writelines(json.dumps(record) + "\n" for record in chunk)
            file.flush()
            os.fsync(file.fileno())
            records += chunk
            bar.update(len(chunk))
    return report.write(folder, run, cases, records)


def resume(folder: Path, run: Mapping[str, Any], count: int, batch_size: int) -> list[dict[str, Any]]:
    """The records that `folder` holds of this `run`, whole batches only; what a kill left of another is cut off."""
    path = folder / "records.jsonl"
    if path.exists() and not (folder / "run.json").exists():
        raise ValueError(f"`folder` holds {path} without the run.json that says what it is of. Choose another one.")
    check_run_config(folder, "run.json", run, "records of the same run")
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if len(lines) < count:
        lines = lines[: len(lines) // batch_size * batch_size]
    if path.exists():
        os.truncate(path, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Question:
    """Question `number` of the case at `index`, and what would answer it."""

    index: int
    number: int
    example: Example
    task: Task
    drawn: Image.Image


@dataclass(frozen=True)
class Evaluator:
    """Answers and scores of a few cases at a time; see `evaluate`."""

    pipeline: InstructDiffusionPipeline
    settings: Settings
    batch_size: int
    seed: int
    resolution: int
    clip: ClipSimilarity | None
    reading: LearnedReading | None
    baselines: Mapping[str, Baseline]
    folder: Path

    def run(self, cases: Mapping[int, Case]) -> list[dict[str, Any]]:
        """The records of `cases`, by their index. Depends on nothing else, so a resumed run repeats it bit by bit."""
        examples: dict[int, Example] = {}
        records = {index: {"index": index, "name": case.name, "row": case.row} for index, case in cases.items()}
        groups: dict[tuple, list[Question]] = defaultdict(list)
        for index, case in cases.items():
            try:
                example = case.open()
                size = working_size(*example.image.size, self.resolution, self.pipeline.vae_scale_factor).size
                drawn = [task.draw(example.image, example.truth) for task in example.tasks]
                if odd := [picture.size for picture in drawn if picture.size != example.image.size]:
                    raise ValueError(f"the truth must be of the picture's size {example.image.size}; it is {odd[0]}.")
            except Exception as error:  # whatever is wrong with one case
                records[index]["error"] = in_words(error)
                continue
            examples[index] = example
            for number, (task, picture) in enumerate(zip(example.tasks, drawn, strict=True)):
                groups[task.family, size].append(Question(index, number, example, task, picture))

        answers: dict[int, list[Answer]] = defaultdict(list)
        ceilings: dict[int, list[Image.Image]] = defaultdict(list)
        for (name, _), group in groups.items():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                passed = through_vae(self.pipeline, [question.drawn for question in batch], self.resolution)
                for question, answer, picture in zip(batch, self.ask(name, batch), passed, strict=True):
                    save_image(self.folder / report.answer_name(question.index, question.number), answer.picture)
                    answers[question.index].append(answer)
                    ceilings[question.index].append(picture)

        for index, example in examples.items():
            try:
                records[index] |= self.score(example, answers[index], ceilings[index])
            except Exception as error:
                records[index]["error"] = in_words(error)
        return list(records.values())

    def ask(self, family: str, batch: Sequence[Question]) -> list[Answer]:
        """Answers to questions of one family and one working size, each from noise of its own."""
        keys = [np.random.SeedSequence((self.seed, question.index, question.number)) for question in batch]
        return ask_batch(
            self.pipeline,
            [question.example.image for question in batch],
            [question.task for question in batch],
            [question.task.instruction() for question in batch],
            self.resolution,
            generator=[torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0])) for key in keys],
            **self.settings.get(family, {}),
        )

    def score(self, example: Example, answers: Sequence[Answer], ceilings: Sequence[Image.Image]) -> dict[str, Any]:
        """Measures of the answer, of the autoencoder's copy of the truth and, for pictures, of the input both ways."""
        box, task = answers[0].box, example.tasks[0]
        read = [t.read(example.image, picture, box) for t, picture in zip(example.tasks, ceilings, strict=True)]
        readings = {"model": merge([answer.data for answer in answers]), "ceiling": merge(read)}
        if isinstance(readings["model"], Image.Image):
            # An autoencoder smooths noise all by itself: without these two a model may seem to denoise that does not.
            readings["input"] = example.image
            (passed,) = through_vae(self.pipeline, [example.image], self.resolution)
            readings["input through the VAE"] = task.read(example.image, passed, box)
        elif self.reading:
            again = [self.reading(answer.task, example.image, answer.picture, box) for answer in answers]
            readings["learned reading"] = merge(again)
        others = {name: peer(example) for name, peer in self.baselines.items()}
        readings |= {name: other for name, other in others.items() if other is not None}
        measures = {of: measure(example, reading, box, self.clip) for of, reading in readings.items()}
        return {"box": box, "score_key": score_key(measures["model"]), "measures": measures}


@torch.no_grad()
def through_vae(
    pipeline: InstructDiffusionPipeline, pictures: Sequence[Image.Image], resolution: int
) -> list[Image.Image]:
    """Pictures of one working size through the autoencoder alone, on the way that inputs and answers take."""
    pixels, sizes = pipeline.preprocess_image(list(pictures), resolution)
    latents = pipeline.encode_image_latents(pixels, pipeline._execution_device)
    decoded = pipeline.decode_latents(latents * pipeline.vae.config.scaling_factor)
    return cast(list[Image.Image], pipeline.postprocess_image(decoded, "pil", sizes, crop=True))


def in_words(error: Exception) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def merge(readings: Sequence[Any]) -> Any:
    """One reading out of those of a case's questions."""
    return readings[0] if len(readings) == 1 else {name: value for part in readings for name, value in part.items()}
