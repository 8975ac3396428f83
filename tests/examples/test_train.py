"""The command line of training, from the data of users to a model that can be published."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from hub_server import running_hub
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError, run_script

SCRIPT = tiny.ROOT / "examples" / "train.py"
CONFIGS = tiny.ROOT / "examples" / "accelerate"
GOLDEN = tiny.ROOT / "tests" / "fixtures" / "golden" / "model"
UNET = "unet/diffusion_pytorch_model.safetensors"
READOUT = "readout/diffusion_pytorch_model.safetensors"
SETTINGS = {"editing": {"num_inference_steps": 2}}

# Imported by path, because examples/tiny has a script of the same name.
spec = importlib.util.spec_from_file_location("train_from_the_command_line", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # dataclasses look up their module
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    readout = UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    InstructDiffusionPipeline(**tiny.components(), readout=readout, task_settings=SETTINGS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder of a user's images in the format of `datasets`."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for number in range(4):
        for name, seed in (("before", number), ("after", 50 + number)):
            tiny.picture(48, 40, seed).save(folder / f"{name}{number}.png")
        rows.append(
            {
                "original_image_file_name": f"before{number}.png",
                "edited_image_file_name": f"after{number}.png",
                "edit_prompt": f"make it number {number}",
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def new_folder(path):
    path.mkdir(parents=True)
    return path


def arguments(init, data, output, **settings):
    settings = {"init": init, "data": data, "output_dir": output, "max_train_steps": 2, "batch_size": 2} | settings
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def call(monkeypatch, *args, more=(), **settings):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(*args, **settings), *more])
    run_script(script.main)


def refused(monkeypatch, capfd, *args, **settings):
    """The one-line error message of the script for invalid arguments."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *args, **settings)
    assert stop.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def run(*args, launch=(), env=None, **settings):
    command = [sys.executable, *launch, SCRIPT, *arguments(*args, **settings)]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_writes_a_folder_that_loads(model, table, tmp_path, monkeypatch, capfd, cached):
    settings = {"cache_samples": 4} if cached else {}
    call(monkeypatch, model, f"table={table}", tmp_path / "run", learning_rate=1e-3, ema_decay=0.5, **settings)
    trained = tmp_path / "run" / "model"
    pipe = InstructDiffusionPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**tiny.inputs()).images.shape == (1, 32, 32, 3)
    assert pipe.config.task_settings == SETTINGS
    assert (trained / READOUT).read_bytes() == (model / READOUT).read_bytes()
    before, after = load_file(model / UNET), load_file(trained / UNET)
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-4
    sheets = sorted(path.name for path in (tmp_path / "run" / "validation").iterdir())
    assert sheets == ["step-000000.png", "step-000002.png"]
    card = (trained / "README.md").read_text()
    assert '"learning_rate": 0.001' in card and f"Trained from `{model.name}`" in card
    assert re.search(r"table +4 +1 +100.0%", card)
    assert (trained / "validation.png").read_bytes() == (tmp_path / "run" / "validation" / sheets[1]).read_bytes()
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    assert config["learning_rate"] == 1e-3 and config["sources"] == ["table"]
    assert "run/model already exists" in refused(monkeypatch, capfd, model, f"table={table}", tmp_path / "run")


def test_recipes_set_defaults_that_options_override(model, table, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "run", lambda options, config: seen.append(config))
    for changes in ({}, {"recipe": "alignment"}, {"recipe": "adaptation"}, {"recipe": "alignment", "ema_decay": 0.5}):
        call(monkeypatch, model, f"table={table}", tmp_path / "run", **changes)
    assert [config.ema_decay for config in seen] == [0.9999, 0.99, 0.9999, 0.5]
    assert [config.text_to_image for config in seen] == [False, False, True, False]
    assert {(config.learning_rate, config.lr_scheduler, config.weight_decay) for config in seen} == {
        (1e-4, "constant", 0.01)
    }


def test_adaptation_trains_on_captions(model, tmp_path, monkeypatch):
    for number in range(3):
        tiny.picture(48, 40, number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    call(monkeypatch, model, f"captions={tmp_path}", tmp_path / "run", recipe="adaptation", learning_rate=1e-2,
         weight_decay=0, validation_num_inference_steps=2)  # fmt: skip
    before, after = (load_file(folder / UNET)["conv_in.weight"] for folder in (model, tmp_path / "run" / "model"))
    assert not (before[:, :4] == after[:, :4]).all() and (before[:, 4:] == after[:, 4:]).all()


def test_from_an_original_checkpoint_with_lora_to_the_hub(table, tmp_path, monkeypatch, capfd):
    checkpoint = GOLDEN / "tiny-original.safetensors"
    conversion = {
        "original_config_file": GOLDEN / "tiny_instruct_diffusion.yaml",
        "text_encoder": GOLDEN / "text_encoder",
        "tokenizer": GOLDEN / "tokenizer",
    }
    settings = {"lora_rank": 4, "learning_rate": 1e-2, "ema_decay": 0, "validation_num_inference_steps": 1}
    settings["resolution"] = 64
    with running_hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
        env |= {"HF_HOME": str(tmp_path / "cache")}
        said = refused(monkeypatch, capfd, checkpoint, f"table={table}", tmp_path / "run", **settings)
        assert "--init: " in said and "with --conversion" in said
        settings["conversion"] = " ".join(f"--{name} '{path}'" for name, path in conversion.items())
        published = {"push_to": "you/mine", "private": "true", "license": "cc-by-4.0"}
        done = run(checkpoint, f"table={table}", tmp_path / "run", env=env, **published, **settings)
        assert done.returncode == 0, done.stderr
        assert hub.private["you/mine"] is True
        pushed = hub.files["you/mine"]
    assert "https" in done.stdout or hub.url in done.stdout
    trained = tmp_path / "run" / "model"
    assert pushed[UNET] == (trained / UNET).read_bytes()
    card = pushed["README.md"].decode()
    assert "license: cc-by-4.0" in card
    assert '"lora_rank": 4' in card and '"resolution": 64' in card and 'from_pretrained("you/mine"' in card
    assert pushed["validation.png"] == (trained / "validation.png").read_bytes()

    # The folder has the fused LoRA layers; they are also next to it, for the initial model.
    call = tiny.inputs(image=tiny.picture(64, 64))
    whole, start, added = (InstructDiffusionPipeline.from_pretrained(path, dtype=torch.float32) for path in
                           (trained, tmp_path / "run" / "start", tmp_path / "run" / "start"))  # fmt: skip
    added.load_lora_weights(tmp_path / "run" / "lora")
    answers = []
    for pipe in (whole, start, added):
        pipe.set_progress_bar_config(disable=True)
        answers.append(pipe(**call | {"generator": tiny.generator()}).images)
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-4)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3

    for folder in ("model", "lora"):
        shutil.rmtree(tmp_path / "run" / folder)
    options = settings | {"conversion": settings["conversion"] + " --half", "resume": "latest"}
    said = refused(monkeypatch, capfd, checkpoint, f"table={table}", tmp_path / "run", **options)
    assert "start has another conversion: conversion was " in said


@pytest.mark.slow  # many seconds, most of them in new processes
def test_a_conversion_is_reused_only_for_its_own_checkpoint(tmp_path):
    checkpoint = shutil.copyfile(GOLDEN / "tiny-original.safetensors", tmp_path / "trained.safetensors")
    other = shutil.copy2(checkpoint, tmp_path / "other.safetensors")
    config = f"--original_config_file {GOLDEN / 'tiny_instruct_diffusion.yaml'}"
    options = f"{config} --text_encoder {GOLDEN / 'text_encoder'} --tokenizer {GOLDEN / 'tokenizer'}"
    start = script.converted(str(checkpoint), tmp_path / "run", options)
    written = tiny.contents(tmp_path / "run")
    assert script.converted(str(checkpoint), tmp_path / "run", options) == start
    with pytest.raises(UsageError, match=r"another conversion: init was '.*trained.*' and is '.*other.*'\. Delete"):
        script.converted(str(other), tmp_path / "run", options)
    os.utime(checkpoint, ns=(0, 0))  # as if it had been replaced with another file
    with pytest.raises(UsageError, match="another conversion: time was"):
        script.converted(str(checkpoint), tmp_path / "run", options)
    assert tiny.contents(tmp_path / "run") == written
    for content in ("{", "[1]"):
        Path(start, "conversion.json").write_text(content)
        with pytest.raises(UsageError, match="conversion.json is missing or damaged; delete .*start, or change"):
            script.converted(str(checkpoint), tmp_path / "run", options)


@pytest.mark.slow  # many seconds, most of them in new processes
def test_two_processes_of_a_configuration_file_train_like_one(model, table, tmp_path):
    settings = {"learning_rate": 1e-3, "ema_decay": 0.5, "max_train_steps": 3}
    one = run(model, f"table={table}", tmp_path / "one", gradient_accumulation_steps=2, **settings)
    assert one.returncode == 0, one.stderr
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "two_processes_cpu.yaml"))
    two = run(model, f"table={table}", tmp_path / "two", launch=launch, env={"ACCELERATE_USE_CPU": "true"}, **settings)
    assert two.returncode == 0, two.stderr
    single, both, before = (load_file(folder / UNET) for folder in (
        tmp_path / "one" / "model", tmp_path / "two" / "model", model))  # fmt: skip
    assert max((single[name] - before[name]).abs().max() for name in before) > 1e-3
    # The two runs sum their gradients in another order. Where a gradient is nearly zero, AdamW divides the rounding
    # error by it: on some processors, 10 of 986,596 weights then differ by more than 1e-5, at most by 7.4e-5.
    differences = torch.cat([(single[name] - both[name]).abs().flatten() for name in before])
    assert differences.mean() <= 1e-7 and (differences > 1e-5).float().mean() <= 1e-4
    assert differences.max() <= 2e-4, "a fifth of the learning rate, which one update moves a weight by"


@pytest.mark.parametrize("repeated", [True, False])
def test_all_entries_of_data_are_trained_on(model, table, tmp_path, monkeypatch, capsys, repeated):
    """Both as `--data A --data B` and as `--data A B`."""
    cats = shutil.copytree(table, tmp_path / "cats")
    lines = (table / "metadata.jsonl").read_text().splitlines()
    (cats / "metadata.jsonl").write_text("\n".join(lines[:2]))
    gopro = tmp_path / "gopro"
    for part in ("blur", "sharp"):
        tiny.picture(40, 48).save(new_folder(gopro / "train" / "clip" / part) / "1.png")
    more = [f"table={cats}", f"gopro={gopro}"]
    more = [part for entry in more for part in ("--data", entry)] if repeated else ["--data", *more]
    call(monkeypatch, model, f"table={table}", tmp_path / "run", more=more)
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    first = f"table:{table.name}"
    assert config["sources"] == [first, "table:cats", "gopro"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # GoPro's weight is 2 as in the original code, so its one pair is two of the 4 + 2 + 2 samples of an epoch.
    start = lines.index([first, "4", "1", "50.0%"])
    assert lines[start + 1 : start + 3] == [["table:cats", "2", "1", "25.0%"], ["gopro", "1", "2", "25.0%"]]
    assert " ".join(lines[start + 3]) == "2 updates of 2 samples are 0.5 epochs of 8 samples."
    unet = load_file(model / UNET)
    numbers = sum(tensor.numel() for tensor in unet.values())
    assert f"Trained parameters: {numbers:,} of {numbers:,}".split() in lines


def test_options_set_the_columns_of_a_table(model, tmp_path, monkeypatch, capfd):
    for name in "ab":
        tiny.picture(48, 40).save(tmp_path / f"{name}.png")
    row = {"before_file_name": "a.png", "words": "turn it", "after_file_name": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    output = tmp_path.with_name(tmp_path.name + "-run")
    assert "has no column" in refused(monkeypatch, capfd, model, f"table={tmp_path}", output)
    columns = {"image_column": "before", "instruction_column": "words", "target_column": "after"}
    call(monkeypatch, model, f"table={tmp_path}", output, **columns)
    assert (output / "model").is_dir()


def test_a_run_that_is_killed_after_its_last_checkpoint_is_resumed(model, table, tmp_path, monkeypatch):
    """It is killed between the LoRA layers, the model's folder and its card. The folder is written atomically."""
    output = tmp_path / "run"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "describe", killed)
        with pytest.raises(SystemExit, match="130"):
            call(monkeypatch, model, f"table={table}", output, lora_rank=2)
    assert (output / "lora").is_dir() and not (output / "model").exists()
    call(monkeypatch, model, f"table={table}", output, lora_rank=2, resume="latest")
    assert json.loads((output / "model" / "model_index.json").read_text())["task_settings"] == SETTINGS
    assert (output / "model" / "README.md").is_file()


def test_a_changed_learning_rate_and_caption_must_be_listed(model, table, tmp_path, monkeypatch, capfd):
    data, output = shutil.copytree(table, tmp_path / "mine"), tmp_path / "run"
    call(monkeypatch, model, f"table={data}", output)
    shutil.rmtree(output / "model")
    lines = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(lines.replace("make it number 1", "make it the first"))
    changed = {"resume": "latest", "max_train_steps": 3, "learning_rate": 1e-3}
    message = refused(monkeypatch, capfd, model, f"table={data}", output, **changed)
    assert "learning_rate was 0.0001 and is 0.001, content was " in message
    assert "`resume_changes` can allow it: learning_rate content." in message
    call(monkeypatch, model, f"table={data}", output, **changed, more=["--resume_changes", "learning_rate", "content"])
    assert (output / "checkpoint-3").is_dir()


def test_validation_data_is_not_trained_on(model, table, tmp_path, monkeypatch, capsys):
    held_out = shutil.copytree(table, tmp_path / "held-out")
    lines = (table / "metadata.jsonl").read_text().splitlines()
    (table / "metadata.jsonl").write_text("\n".join(lines[:2]))
    (held_out / "metadata.jsonl").write_text("\n".join(lines[2:]))
    try:
        settings = {"validation_data": f"table={held_out}", "validation_steps": 1, "random_flip": True}
        call(monkeypatch, model, f"table={table}", tmp_path / "run", num_validation_images=1, **settings)
    finally:
        (table / "metadata.jsonl").write_text("\n".join(lines))
    losses = re.findall(r"Validation loss after (\d) updates: (\d\.\d+)", capsys.readouterr().out)
    assert [step for step, _ in losses] == ["0", "1", "2"] and losses[0][1] != losses[2][1]
    assert "of held-out samples" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_training_data_as_validation_data_raises_an_error(model, table, tmp_path, monkeypatch, capfd):
    said = refused(monkeypatch, capfd, model, f"table={table}", tmp_path, validation_data=f"table={table}")
    assert f"--validation_data: table={table} is trained on" in said
    monkeypatch.chdir(table.parent)
    said = refused(monkeypatch, capfd, model, f"table={table.name}", tmp_path, validation_data=f"table={table}")
    assert f"--validation_data: table={table.name} is trained on" in said
    said = refused(monkeypatch, capfd, model, f"table={table}", tmp_path, validation_data="table=nowhere")
    assert "--validation_data table: there is no folder nowhere." in said


def test_limited_samples_and_a_number_of_epochs(model, table, tmp_path, monkeypatch, capsys):
    arguments = ["train.py", "--init", model, "--data", f"table={table}", "--output_dir", tmp_path / "run"]
    arguments += ["--max_train_samples", 3, "--num_train_epochs", 2, "--batch_size", 2]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    run_script(script.main)
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "table 3 1 100.0%" in out and "3 updates of 2 samples are 2 epochs of 3 samples." in out
    assert any(line.startswith("Memory without activations: 0.0") for line in out)
    assert any(re.match(r"Disk space: 0\.\d+ GB per checkpoint, .* GB free", line) for line in out)


def test_invalid_arguments_raise_errors_with_their_name(model, table, tmp_path, monkeypatch, capfd):
    def says(init, data, **settings):
        return refused(monkeypatch, capfd, init, data, tmp_path / "run", **settings)

    assert "--data must be NAME=FOLDER, such as table=my-pictures; got 'photos=x'. NAME is one of mpii, " in says(
        model, "photos=x"
    )
    assert "--data table: there is no folder nowhere" in says(model, "table=nowhere")
    twice = says(model, f"table={table}", more=["--data", f"table={table}"])
    assert f"--data table={table} is given twice" in twice
    for init in ("nofile.ckpt", "some/nofile.safetensors", "/no/such/folder"):
        assert f"--init: there is no file or folder {init}" in says(init, f"table={table}")
    assert "--max_train_samples: must be at least 1; got 0" in says(model, f"table={table}", max_train_samples=0)
    assert "--resolution: must be at least 1; got 0" in says(model, f"table={table}", resolution=0)
    assert "--resolution: must be a multiple of 4; got 34." in says(model, f"table={table}", resolution=34)
    assert "`seed` must be from 0 to 4294967295; got -1" in says(model, f"table={table}", seed=-1)
    assert "--revision: has an effect with a table on the Hub" in says(model, f"table={table}", revision="v2")
    assert "`batch_size` must be at least 1; got 0" in says(model, f"table={table}", batch_size=0)
    assert "Repo id must" in says(model, f"table={table}", push_to="not/a/name")
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_hub_is_raised_before_training(model, table, tmp_path):
    refused = run(model, f"table={table}", tmp_path / "run", push_to="you/mine", env={"HF_HUB_OFFLINE": "1"})
    assert refused.returncode == 1 and "offline" in refused.stderr.splitlines()[-1].lower(), refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_license_that_the_hub_refuses_is_reported_before_training(model, table, tmp_path):
    with running_hub() as hub:
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(tmp_path / "cache"),
        }
        published = {"push_to": "you/mine", "license": "no-such-license"}
        refused = run(model, f"table={table}", tmp_path / "run", env=env, **published)
    assert refused.returncode == 2 and "license" in refused.stderr.splitlines()[-1], refused.stderr
    assert not hub.files and not (tmp_path / "run").exists()


KINDS = {
    "two_processes_cpu": DistributedType.MULTI_GPU,  # because accelerate's launcher has no other way to start them
    "several_gpus": DistributedType.MULTI_GPU,
    "several_machines": DistributedType.MULTI_GPU,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "fsdp": DistributedType.FSDP,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration_files(path):
    assert load_config_from_file(str(path)).distributed_type == KINDS[path.stem]
    first = path.read_text().splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in first if line.startswith("#"))
    assert ("Tested." if path.stem == "two_processes_cpu" else "Not tested") in comment
    assert set(yaml.safe_load(path.read_text())) >= {"num_processes", "mixed_precision", "num_machines"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "val"}, "--split: has an effect with a table in --data only."),
        ({"image_column": "photo"}, "--image_column: has an effect with a table in --data or --validation_data only."),
        ({"instruction_column": "text"}, "--instruction_column: has an effect with a table"),
        ({"target_column": "after"}, "--target_column: has an effect with a table"),
        ({"revision": "v2"}, "--revision: has an effect with a table on the Hub in --data or --validation_data only."),
        ({"random_flip": "true"}, "--random_flip: has an effect with a table in --data only."),
        ({"validation_split": "val"}, "--validation_split: has an effect with a table in --validation_data only."),
        ({"conversion": " --half"}, "--conversion: has an effect with a checkpoint file as --init only."),
        ({"resume_changes": "learning_rate"}, "--resume_changes: has an effect with --resume only."),
        ({"private": "true"}, "--private: has an effect with --push_to only."),
        ({"validation_num_inference_steps": 0}, "--validation_num_inference_steps: must be at least 1; got 0."),
    ],
)
def test_an_option_without_effect_is_an_error(model, tmp_path, monkeypatch, capfd, options, told):
    output = tmp_path / "out"
    assert told in refused(monkeypatch, capfd, model, f"gopro={tmp_path}", output, **options)
    assert not output.exists()


def test_table_options_have_an_effect_on_tables_for_validation(model, table, tmp_path, monkeypatch, capfd):
    options = {"validation_data": f"table={table}", "validation_split": "train[:2]", "image_column": "none"}
    message = refused(monkeypatch, capfd, model, f"gopro={tmp_path}", tmp_path / "out", **options)
    assert "has an effect" not in message, "the folder of gopro is empty"
    assert "--split: has an effect" in refused(
        monkeypatch, capfd, model, f"gopro={tmp_path}", tmp_path / "out", **options, split="val"
    )
