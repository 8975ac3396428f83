"""examples/tune.py: the settings that it chooses, and the model that it writes."""

import json
import random
import re
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import tiny
import tune
from degradations import add_blur
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError
from instructdiffusion_pipeline.evaluation import Example, LazyExample
from instructdiffusion_pipeline.tasks import EmptyAnnotation
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration

SHIPPED = tiny.ROOT / "examples" / "instructdiffusion-tiny"


@pytest.fixture
def gopro(tmp_path):
    """Blurred and sharp images in GoPro's layout."""
    root = tmp_path / "gopro"
    for index in range(4):
        sharp = tiny.picture(64, 64, index)
        for part, image in (("blur", add_blur(sharp, random.Random(index))), ("sharp", sharp)):
            folder = root / "test" / "clip" / part
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")
    return root


@pytest.fixture
def run(monkeypatch, gopro, tmp_path):
    def run(*options):
        arguments = ["tune.py", "--model", SHIPPED, "--data", f"gopro={gopro}", "--samples", 4]
        arguments += ["--output", tmp_path / "out", "--output_model", tmp_path / "model", *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        tune.main()

    return run


def test_both_halves_have_images_of_each_dataset_and_kind(run, gopro, tmp_path):
    other = shutil.copytree(gopro, tmp_path / "other")
    run("--data", f"gopro={other}", "--guidance_scale", 0.5, "--image_guidance_scale", 0.5, "--steps", 1)
    for half in ("choice", "held-out"):
        folder = next((tmp_path / "out" / half).iterdir())
        found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        assert Counter(record["row"] for record in found) == {"gopro:gopro test": 2, "gopro:other test": 2}
        assert {int(re.search(r"test (\d)", record["name"])[1]) % 2 for record in found} == {0, 1}


def test_the_best_settings_become_those_of_the_model(run, tmp_path, capsys):
    few = ["--guidance_scale", 0.5, "--image_guidance_scale", 0.5, "--steps", 1, 2, "--scheduler", "DDIMScheduler"]
    few += ["--ensemble_size", 1, 2]
    run(*few)
    output = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in output
    scores = {
        folder.name: json.loads((folder / "results.json").read_text())["rows"][0]["scores"]["PSNR"]["model"]
        for folder in (tmp_path / "out" / "choice").iterdir()
    }
    own = "EulerAncestralDiscreteScheduler-3-0.5-0.5-2"
    assert scores.keys() == {own} | {
        f"{scheduler}-{steps}-0.5-0.5-{size}"
        for scheduler in ("EulerAncestralDiscreteScheduler", "DDIMScheduler")
        for steps in (1, 2)
        for size in (1, 2)
    }
    assert len(table.splitlines()) == 2 + 9 + 5 + 4
    assert sum("mean of 2" in line for line in table.splitlines()[:11]) == 5
    with Image.open(tmp_path / "out" / "scores.png") as picture:
        assert picture.width > 500
    assert max(scores.values()) > min(scores.values())
    if "and are kept" in output:
        assert not (tmp_path / "model").exists()
        return
    scheduler, steps, _, _, size = max(scores, key=scores.get).split("-")
    tuned = InstructDiffusionPipeline.from_pretrained(tmp_path / "model")
    before = json.loads((SHIPPED / "model_index.json").read_text())["task_settings"]
    assert tuned.config.task_settings["restoration"]["num_inference_steps"] == int(steps)
    assert tuned.config.task_settings["restoration"]["ensemble_size"] == int(size)
    assert type(tuned.scheduler).__name__ == scheduler
    others = {family: settings for family, settings in tuned.config.task_settings.items() if family != "restoration"}
    assert others.items() <= before.items() and len(others) == 3


def test_a_run_that_was_stopped_is_resumed(run, tmp_path, monkeypatch):
    few = ["--guidance_scale", 0.5, "--image_guidance_scale", 0.5, "--steps", 1]
    original, calls = tune.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments[2].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(tune, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(*few)
    answers = list((tmp_path / "out" / "choice").glob("*/answers/*.png"))
    times = [path.stat().st_mtime_ns for path in answers]
    monkeypatch.setattr(tune, "evaluate", original)
    run(*few)
    assert answers and [path.stat().st_mtime_ns for path in answers] == times
    assert (tmp_path / "out" / "table.md").exists()


def test_the_front_has_the_trials_that_no_other_dominates():
    rng = random.Random(0)
    settings = {"num_inference_steps": 1, "guidance_scale": 1, "image_guidance_scale": 1, "ensemble_size": 1}
    trials = [tune.Trial("", settings, rng.random(), rng.random()) for _ in range(50)]
    line = tune.front(trials)
    for trial in trials:
        beaten = any(
            (other.score > trial.score and other.seconds <= trial.seconds)
            or (other.score == trial.score and other.seconds < trial.seconds)
            for other in trials
        )
        assert beaten != (trial in line)
    assert line[-1] is tune.best(trials)
    assert [trial.seconds for trial in line] == sorted(trial.seconds for trial in line)


def test_a_worse_choice_is_not_written(run, tmp_path, monkeypatch, capsys):
    """The held-out scores determine this, not those of the choice."""
    original = tune.Search.run

    def worse(self, images, settings, scheduler=""):
        trial = original(self, images, settings, scheduler)
        is_choice = images.name == "held-out" and scheduler  # the model's own settings are run without a scheduler
        return tune.Trial(trial.scheduler, trial.settings, -1.0, 0.1) if is_choice else trial

    monkeypatch.setattr(tune.Search, "run", worse)
    run("--guidance_scale", 0.5, "--image_guidance_scale", 0.5, "--steps", 1)
    assert "and are kept" in capsys.readouterr().out and not (tmp_path / "model").exists()


def test_settings_are_compared_with_those_of_ask(tmp_path):
    pipe = InstructDiffusionPipeline(**tiny.components())
    task = Keypoints({"nose": "red"})
    assert tune.Search(pipe, task, tmp_path, 1, 0).own == task.settings | {"ensemble_size": 1}, (
        "a model without settings has those of the task"
    )
    pipe.register_to_config(task_settings={"keypoints": {"guidance_scale": 2.0}})
    assert tune.Search(pipe, task, tmp_path, 1, 0).own == task.settings | {"guidance_scale": 2.0, "ensemble_size": 1}


def test_a_calibration_is_kept_for_other_tasks_with_the_same_scheduler_only(tmp_path):
    pipe = InstructDiffusionPipeline.from_pretrained(SHIPPED)
    search = tune.Search(pipe, Keypoints({"nose": "red"}), tmp_path, 1, 0)
    before = pipe.config.score_calibration
    assert before.keys() == {"segmentation", "keypoints"}
    for scheduler, kept in ((search.scheduler, {"segmentation"}), ("DDIMScheduler", set())):
        tune.save(SHIPPED, tmp_path / scheduler, search, tune.Trial(scheduler, search.own, 0, 0))
        index = json.loads((tmp_path / scheduler / "model_index.json").read_text())
        assert index["score_calibration"] == {family: before[family] for family in kept}


def test_a_scheduler_is_written_to_all_files_of_the_model(tmp_path):
    pipe = InstructDiffusionPipeline.from_pretrained(SHIPPED)
    search = tune.Search(pipe, Editing("make it night"), tmp_path, 1, 0)
    settings = search.own | {"num_inference_steps": 4}
    tune.save(SHIPPED, tmp_path / "model", search, tune.Trial("DDIMScheduler", settings, 0, 0))
    tuned = InstructDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(tuned.scheduler).__name__ == "DDIMScheduler"
    assert tuned.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    for made, written in (
        (search.make_scheduler("DDIMScheduler"), tuned.scheduler),  # the one that is scored, and the saved one
        (search.make_scheduler(search.scheduler), pipe.scheduler),
    ):
        assert {key: value for key, value in made.config.items() if key[0] != "_"}.items() <= written.config.items()
    assert tuned.scheduler.config.timestep_spacing == "trailing" and not tuned.scheduler.config.clip_sample
    assert tuned.config.task_settings["editing"]["num_inference_steps"] == 4
    modular = json.loads((tmp_path / "model" / "modular_model_index.json").read_text())
    assert modular["task_settings"] == tuned.config.task_settings
    assert "EulerAncestral" not in json.dumps(modular["scheduler"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "DDIM"], "--scheduler DDIM: must be one of .*DDIMScheduler"),
        (["--model", "/nowhere"], "--model: must be the folder of a pipeline"),
        (["--data", "gopro=/nowhere"], "there is no folder /nowhere"),
        (["--output_model", Path("/")], "--output_model: must be a new folder in an existing one; got /"),
        (["--output_model", Path("/nowhere/model")], "--output_model: must be a new folder in an existing one"),
    ],
)
def test_errors_name_the_option(run, options, message):
    with pytest.raises(tune.UsageError, match=message):
        run(*options)


def test_a_single_sample_is_an_error_before_the_search(run, gopro, tmp_path):
    for path in sorted(gopro.rglob("test/*/*/*.png")):
        if path.stem != "0":
            path.unlink()
    with pytest.raises(tune.UsageError, match="none of the 0 samples of the half 'held-out' can be used"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_half_without_a_usable_sample_is_an_error_before_the_search(run, gopro, tmp_path):
    first, *others = sorted(gopro.rglob("test/*/blur/*.png"))
    for path in others:
        path.write_bytes(b"damaged")
    with pytest.raises(tune.UsageError, match=r"--data: none of the \d+ samples of the half '.*' can be used"):
        run()
    assert not (tmp_path / "out").exists()


def test_samples_with_nothing_to_ask_for_are_left_out():
    def empty():
        raise EmptyAnnotation("nothing to ask for")

    image = tiny.picture(64, 64)
    usable = LazyExample("1", "row", partial(Example, image, [Restoration("blur")], image))
    assert [example.image for example in tune.readable([LazyExample("0", "row", empty), usable])] == [image]


def test_datasets_of_two_tasks_raise_an_error(run, coco):
    with pytest.raises(tune.UsageError, match="datasets of one task"):
        run("--data", f"coco={coco}")


def test_seconds_are_per_output(tmp_path):
    pipe = InstructDiffusionPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    search = tune.Search(pipe, Restoration("blur"), tmp_path, 2, 0)
    image = tiny.picture(64, 64)
    wide = tiny.picture(96, 64)  # of another working size
    examples = [
        LazyExample(str(i), "row", partial(Example, shown, [Restoration("blur")], shown))
        for i, shown in enumerate((image, wide))
    ]
    few, many = (
        min(search.seconds(examples, search.own | {"num_inference_steps": steps}) for _ in range(2))
        for steps in (1, 12)
    )
    assert 0 < 2 * few < many


def test_images_that_cannot_be_read_are_left_out(run, gopro, tmp_path, capsys):
    broken = gopro / "test" / "clip" / "blur" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    run("--guidance_scale", 0.5, "--image_guidance_scale", 0.5, "--steps", 1)
    assert (tmp_path / "out" / "table.md").is_file()
    for path in gopro.rglob("blur/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UsageError, match="--data: no sample of gopro test can be read"):
        run("--output", tmp_path / "other", "--output_model", tmp_path / "other-model")
