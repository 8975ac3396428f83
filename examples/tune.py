"""Find call settings for one task of a model, by scores on annotated images.

    python examples/tune.py --model out/model --data coco-stuff=data/coco-stuff --output out/tune \\
        --output_model out/model-tuned

First the guidance scales are compared, with the model's own number of steps; then the numbers of denoising steps, the
ensemble sizes and the schedulers, with the best scales. The settings with the best score are compared with the model's
own on samples that were not used for the choice. If their score is at least as good, a copy of the model in which they
are the default settings of the task (`task_settings`) is written to --output_model. The scheduler is used for all
tasks of a model. The copy has no calibration of scores for the task, and none at all with another scheduler;
calibrate.py makes a new one.

OUTPUT/table.md and OUTPUT/scores.png have all scores and the seconds per output. An interrupted run is resumed when it
is started again. Needs `pip install ".[eval]"`.
"""

import argparse
import contextlib
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import diffusers
import matplotlib.pyplot as plt
import torch

from instructdiffusion_pipeline import InstructDiffusionPipeline, ask_batch
from instructdiffusion_pipeline.ask import settings_of
from instructdiffusion_pipeline.cli import (
    UsageError,
    add_data_argument,
    check_model_folder,
    finite,
    integer,
    load_pipeline,
    run_script,
)
from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_test_sources
from instructdiffusion_pipeline.evaluation import Example, LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.files import atomic_write, update_json, write_text
from instructdiffusion_pipeline.tasks import EmptyAnnotation, Task

SCALES = "guidance_scale", "image_guidance_scale"
COMPARED = "num_inference_steps", *SCALES, "ensemble_size"


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, with their score (higher is better) and the seconds per output in a batch."""

    scheduler: str
    settings: Mapping[str, Any]
    score: float
    seconds: float

    @property
    def name(self) -> str:
        steps, *scales, ensemble_size = (self.settings[name] for name in COMPARED)
        plural = "s" if steps > 1 else ""
        ensemble = f", mean of {ensemble_size}" if ensemble_size > 1 else ""
        return f"{self.scheduler}, {steps} step{plural}, scales {scales[0]:g} and {scales[1]:g}{ensemble}"


class Images(NamedTuple):
    """Examples on which settings are compared; `name` is the folder of their evaluations."""

    name: str
    examples: Sequence[LazyExample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    add_data_argument(parser, [name for name, spec in DATASETS.items() if spec.test_split])
    parser.add_argument(
        "--samples",
        type=integer(2),
        default=100,
        help="number of samples per dataset; the settings are chosen on one half (default: %(default)s)",
    )
    parser.add_argument("--guidance_scale", type=finite, nargs="+", default=[1.0, 3.0, 5.0, 7.5], help="to compare")
    parser.add_argument("--image_guidance_scale", type=finite, nargs="+", default=[0.5, 1.0, 1.5], help="to compare")
    parser.add_argument("--steps", type=integer(1), nargs="+", default=[3, 5, 10, 20, 50], help="to compare")
    parser.add_argument(
        "--ensemble_size",
        type=integer(1),
        nargs="+",
        help="to compare; each output is the mean of this number of images (default: the model's own)",
    )
    parser.add_argument(
        "--scheduler",
        nargs="+",
        default=[],
        help="schedulers of diffusers to compare with the model's own; their timestep spacing is trailing",
    )
    parser.add_argument(
        "--batch_size", type=integer(1), default=8, help="samples per pipeline call (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="seed of the noise and the choice of samples (default: 0)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for scores and outputs")
    parser.add_argument("--output_model", type=Path, help="new folder for the model with the settings")
    args = parser.parse_args()
    check_model_folder(args.model)
    if args.output_model and (args.output_model.exists() or not args.output_model.parent.is_dir()):
        raise UsageError(f"--output_model: must be a new folder in an existing one; got {args.output_model}.")

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    known = {scheduler.__name__ for scheduler in pipeline.scheduler.compatibles}
    if unknown := set(args.scheduler) - known:
        raise UsageError(f"--scheduler {unknown.pop()}: must be one of {', '.join(sorted(known))}.")
    try:
        sources = load_test_sources(args.data, pipeline.default_resolution)
    except ValueError as error:
        raise UsageError(error) from error
    rng, examples = random.Random(args.seed), []
    for source in sources:
        found = examples_from(source, args.samples, args.seed)
        # In random order, because different kinds of images can alternate in a dataset.
        examples += rng.sample(found, len(found))
    tasks = {source.name: first_task(source) for source in sources}
    families = {name: task.family for name, task in tasks.items()}
    if len(set(families.values())) > 1:
        raise UsageError(f"--data: must be datasets of one task; got {families}.")
    search = Search(pipeline, next(iter(tasks.values())), args.output, args.batch_size, args.seed)

    choice, held_out = Images("choice", examples[::2]), Images("held-out", examples[1::2])
    for half in (choice, held_out):
        if next(readable(half.examples), None) is None:
            raise UsageError(
                f"--data: none of the {len(half.examples)} samples of the half {half.name!r} can be used; add samples."
            )
    trials = [search.run(choice, search.own)]
    for scales in itertools.product(args.guidance_scale, args.image_guidance_scale):
        trials.append(search.run(choice, search.own | dict(zip(SCALES, scales, strict=True))))
    chosen = best(trials)
    schedulers = [search.scheduler, *args.scheduler]
    sizes = args.ensemble_size or [search.own["ensemble_size"]]
    for scheduler, steps, size in itertools.product(schedulers, args.steps, sizes):
        settings = {**chosen.settings, "num_inference_steps": steps, "ensemble_size": size}
        trials.append(search.run(choice, settings, scheduler))
    trials = list({trial.name: trial for trial in trials}.values())  # the model's own settings can be listed twice
    chosen = best(trials)
    before, after = search.run(held_out, search.own), search.run(held_out, chosen.settings, chosen.scheduler)
    text = report(trials, before, after)
    write_text(args.output / "table.md", text)
    plot(trials, args.output / "scores.png")
    print(text)
    if after.score < before.score:
        print("The model's own settings are better on the held-out images and are kept.")
    elif args.output_model:
        save(args.model, args.output_model, search, chosen)
        print(f"{args.output_model} has the settings of {chosen.name} for {search.family}.")


class Search:
    """Scores settings of the family of `task` with `evaluate`; `own` are the settings that `ask` uses."""

    def __init__(self, pipeline: InstructDiffusionPipeline, task: Task, folder: Path, batch_size: int, seed: int):
        self.pipeline, self.family, self.folder = pipeline, task.family, folder
        self.batch_size, self.seed = batch_size, seed
        self.own = settings_of(pipeline, task)
        self.scheduler, self.scheduler_config = type(pipeline.scheduler).__name__, pipeline.scheduler.config

    def make_scheduler(self, name: str) -> diffusers.SchedulerMixin:
        """The model's own scheduler, or another class with its configuration."""
        # With few steps and the "linspace" of the original code, DDIM and Heun leave noise in the output.
        options = {} if name == self.scheduler else {"timestep_spacing": "trailing", "clip_sample": False}
        return getattr(diffusers, name).from_config(self.scheduler_config, **options)

    def run(self, images: Images, settings: Mapping[str, Any], scheduler: str = "") -> Trial:
        """The mean of the first metric of each row. Settings are not scored twice."""
        scheduler = scheduler or self.scheduler
        self.pipeline.scheduler = self.make_scheduler(scheduler)
        values = "-".join(f"{settings[name]:g}" for name in COMPARED)
        folder = self.folder / images.name / f"{scheduler}-{values}"
        by_family = {self.family: settings}
        results = evaluate(self.pipeline, images.examples, folder, by_family, self.batch_size, self.seed)
        metrics = [next(iter(row["scores"].values())) for row in results["rows"] if row["scores"]]
        timing = folder / "seconds.json"
        if not timing.exists():
            write_text(timing, json.dumps(self.seconds(images.examples, settings)))
        return Trial(scheduler, settings, mean(metric["model"] for metric in metrics), json.loads(timing.read_text()))

    def seconds(self, examples: Sequence[LazyExample], settings: Mapping[str, Any]) -> float:
        """Seconds per image in a batch of copies of one image, because images of a batch must have one size."""
        example = next(readable(examples))
        start = time.perf_counter()
        ask_batch(self.pipeline, [example.image] * self.batch_size, [example.tasks[0]] * self.batch_size, **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.batch_size


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest score, or the fastest of several with the same score."""
    return max(trials, key=lambda trial: (trial.score, -trial.seconds))


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials for which no other is better in both score and seconds, from the fastest to the best."""
    return sorted(
        (trial for trial in trials if best([each for each in trials if each.seconds <= trial.seconds]) is trial),
        key=lambda trial: trial.seconds,
    )


def report(trials: Sequence[Trial], before: Trial, after: Trial) -> str:
    """All trials as a Markdown table, with those of the front in bold, and the scores on held-out samples."""
    bold = {id(trial) for trial in front(trials)}
    lines = ["| settings | score | seconds per output |", "| --- | --- | --- |"]
    for trial in trials:
        name = f"**{trial.name}**" if id(trial) in bold else trial.name
        lines.append(f"| {name} | {trial.score:.4f} | {trial.seconds:.3f} |")
    lines += ["", "Bold: no other settings are better and at least as fast.", ""]
    lines += ["On samples that were not used for the choice:", ""]
    lines += ["| settings | score | seconds per output |", "| --- | --- | --- |"]
    for label, trial in (("the model's own", before), ("chosen", after)):
        lines.append(f"| {label}: {trial.name} | {trial.score:.4f} | {trial.seconds:.3f} |")
    return "\n".join(lines) + "\n"


def plot(trials: Sequence[Trial], path: Path) -> None:
    """Draw score against seconds, with a color for each scheduler and a line through the front."""
    figure, axes = plt.subplots(figsize=(9, 6))
    line = front(trials)
    axes.plot([trial.seconds for trial in line], [trial.score for trial in line], color="gray", zorder=0)
    for scheduler in sorted({trial.scheduler for trial in trials}):
        group = [trial for trial in trials if trial.scheduler == scheduler]
        axes.scatter([trial.seconds for trial in group], [trial.score for trial in group], label=scheduler)
    for trial in line:
        steps, size = trial.settings["num_inference_steps"], trial.settings["ensemble_size"]
        label = f"{steps} x {size}" if size > 1 else f"{steps}"
        axes.annotate(label, (trial.seconds, trial.score), (0, 5), textcoords="offset points", ha="center")
    axes.margins(0.15)
    axes.set(xlabel="seconds per output (numbers: denoising steps x images)", ylabel="score")
    axes.legend(loc="lower right")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def readable(examples: Iterable[LazyExample]) -> Iterator[Example]:
    """Open the examples, and skip those that cannot be read or have nothing to ask for."""
    for example in examples:
        with contextlib.suppress(UnreadableSample, EmptyAnnotation):
            yield example.open()


def first_task(source: Source) -> Task:
    """The task of the first sample of a dataset that can be read."""
    for example in readable(examples_from(source, len(source.dataset))):
        return example.tasks[0]
    raise UsageError(f"--data: no sample of {source.name} can be read.")


def save(model: Path, output: Path, search: Search, trial: Trial) -> None:
    """Copy the folder of a model with the settings of `trial`, without the calibration of scores that they change."""
    with atomic_write(output) as partial:
        shutil.copytree(model, partial)
        for path in (partial / "model_index.json", partial / "modular_model_index.json"):
            if path.exists():
                index = json.loads(path.read_text())
                settings = index.get("task_settings", {}) | {search.family: dict(trial.settings)}
                index["scheduler"][1] = trial.scheduler
                for about in index["scheduler"][2:]:  # in the index of Modular Diffusers
                    about["type_hint"][1] = trial.scheduler
                changes = {"task_settings": settings, "scheduler": index["scheduler"]}
                if "score_calibration" in index:
                    kept = {} if trial.scheduler != search.scheduler else dict(index["score_calibration"] or {})
                    kept.pop(search.family, None)
                    changes["score_calibration"] = kept
                update_json(path, changes)
        search.make_scheduler(trial.scheduler).save_pretrained(partial / "scheduler")


if __name__ == "__main__":
    run_script(main)
