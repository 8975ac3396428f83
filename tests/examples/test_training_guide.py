"""All commands of docs/training.md run in the guide's order, on small data in the folders of the guide."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hub_server import running_hub
from PIL import Image
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline

GUIDE = (tiny.ROOT / "docs" / "training.md").read_text().replace("\\\n", " ")
GOLDEN = "tests/fixtures/golden/model"
COMMAND = re.compile(r"^((?:ACCELERATE_USE_CPU=true )?(?:python|accelerate|bash) .*)$|`(python examples/[^`]+)`", re.M)
COMMANDS = [first or second for first, second in COMMAND.findall(GUIDE)]
TWO_PROCESSES = next(command for command in COMMANDS if "two_processes_cpu.yaml" in command)

# Replacements in the commands for the runs in this test, as (expression, replacement).
REPLACED = (
    (
        # The converter knows the architecture of Stable Diffusion, and gets that of a tiny model.
        r"--init v1-5-pruned-emaonly-adaption-task.ckpt",
        f"--init {GOLDEN}/tiny-original.safetensors --resolution 64 --conversion"
        f" '--original_config_file {GOLDEN}/tiny_instruct_diffusion.yaml --text_encoder {GOLDEN}/text_encoder"
        f" --tokenizer {GOLDEN}/tokenizer'",
    ),
    (r"--init examples/instructdiffusion-tiny", "--init stable-diffusion-v1-5/stable-diffusion-v1-5"),
    (r"examples/train.py(.*) --max_train_steps \d+", r"examples/train.py\1 --max_train_steps 2"),
    (r"--batch_size 8", ""),
    (r"examples/train.py(?! --help)", "examples/train.py --validation_num_inference_steps 1 --batch_size 3"),
    (r"--cache_samples 200", "--cache_samples 8"),
    (r"examples/evaluate.py", "examples/evaluate.py --steps 1 --resolution 64"),
    (r"--samples 1000", "--samples 2 --steps 1"),
    (r"examples/train_readout.py(.*) --samples 2000", r"examples/train_readout.py\1 --samples 2 --max_train_steps 2"),
    (r"accelerate launch --config_file examples/accelerate/several_gpus.yaml", "python"),
)


def save_picture(path, seed=0, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(*size, seed).save(path)


def write_table(folder, first):
    rows = []
    for number in range(first, first + 3):
        for name, seed in (("before", number), ("after", 50 + number)):
            save_picture(folder / f"{number:04d}-{name}.png", seed)
        rows.append(
            {
                "original_image_file_name": f"{number:04d}-before.png",
                "edited_image_file_name": f"{number:04d}-after.png",
                "edit_prompt": f"make it number {number}",
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_start(folder):
    """A model with the layout of Stable Diffusion 1.5."""
    config = dict(tiny.components()["unet"].config) | {"in_channels": 4}
    parts = tiny.components() | {
        "unet": UNet2DConditionModel.from_config(config),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear"),
    }
    StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)


@pytest.fixture
def clone(tmp_path, monkeypatch, coco):
    """A folder like a clone of this repository, with small versions of all models and data of the guide."""
    for part in ("examples", "conversion", "tests"):
        (tmp_path / part).symlink_to(tiny.ROOT / part)
    write_start(tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    write_table(tmp_path / "my-pictures", 1)
    write_table(tmp_path / "my-test-pictures", 11)
    data = tmp_path / "data"
    data.mkdir()
    coco.rename(data / "coco")
    for number in range(2):
        save_picture(tmp_path / "laion-part" / f"{number}.png", number)
        (tmp_path / "laion-part" / f"{number}.txt").write_text(f"picture {number}")
        for kind in ("blur", "sharp"):
            save_picture(data / "GoPro" / "train" / "clip" / kind / f"{number}.png", number)
        for kind in ("input", "output1"):
            save_picture(data / "MagicBrush" / "train" / "images" / str(number) / f"{number}-{kind}.png", number)
        for split in ("train2017", "val2017"):
            save_picture(data / "coco-stuff" / "images" / split / f"{number}.jpg", number)
            label = np.full((40, 48), 255, np.uint8)
            label[10:30, 10:40] = 1
            (data / "coco-stuff" / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(data / "coco-stuff" / "annotations" / split / f"{number}.png")
    (data / "coco-stuff" / "labels.txt").write_text("0: unlabeled\n1: person\n2: bicycle\n")
    turns = [
        {"input": f"{number}-input.png", "output": f"{number}-output1.png", "instruction": "add a cat"}
        for number in range(2)
    ]
    (data / "MagicBrush" / "train" / "edit_turns.json").write_text(json.dumps(turns))
    (data / "clip-filtered-dataset").mkdir()
    with zipfile.ZipFile(data / "clip-filtered-dataset" / "shard-00.zip", "w") as shard:
        for prompt in range(2):
            shard.writestr(f"shard-00/{prompt}/prompt.json", json.dumps({"edit": "make it winter"}))
            for number in range(2):
                shard.write(data / "GoPro" / "train" / "clip" / "blur" / "0.png", f"shard-00/{prompt}/7_{number}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def run_here(monkeypatch, command):
    """Run a Python command in this process, to avoid the seconds for imports in a new one."""
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have set the precision
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, command
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def run_alone(command, env):
    """Run a command in a separate process."""
    done = subprocess.run(
        command.replace("python ", f"{sys.executable} ").replace(
            "accelerate launch", f"{sys.executable} -m accelerate.commands.launch"
        ),
        shell=True,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def between(command):
    """Do the manual steps of the guide before a command, and set models to one denoising step."""
    if "preferences=" in command:
        for path in sorted(Path("out/candidates/candidates").iterdir())[::20]:
            shutil.move(path, "out/candidates/picks")
    if "train_readout.py" in command:
        file = Path("out/multitask/model/model_index.json")
        one_step = dict.fromkeys(("segmentation", "keypoints"), {"num_inference_steps": 1})
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task_settings": one_step}))


def with_small_data(command):
    for pattern, replacement in REPLACED:
        command = re.sub(pattern, replacement, command)
    return command


def test_all_replacements_match_the_guide():
    assert len(COMMANDS) == 10 and TWO_PROCESSES in COMMANDS
    for pattern, _ in REPLACED:
        assert any(re.search(pattern, command) for command in COMMANDS), pattern


def test_every_command_of_the_guide_runs(clone, monkeypatch):
    with running_hub() as hub:
        for command in COMMANDS:
            if command == TWO_PROCESSES:
                continue
            between(command)
            if "push_to_hub.py" in command:
                online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
                run_alone(command, online | {"HF_ENDPOINT": hub.url})
            else:
                run_here(monkeypatch, with_small_data(command))
        pushed = hub.files["you/winter"]
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert pushed[unet] == Path("out/winter/model", unet).read_bytes()
    assert (clone / "out" / "winter" / "validation" / "step-000002.png").is_file()
    assert any((clone / "out" / "winter" / "logs").rglob("events.out.tfevents*"))
    assert InstructDiffusionPipeline.from_pretrained("out/multitask/model").readout is not None
    start, trained = (load_file(clone / "out" / name / "model" / unet) for name in ("multitask", "aligned"))
    assert any(not torch.equal(start[key], trained[key]) for key in start)

    # The same in Python, from the model that the first command converted.
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    for part, small in (("256", "64"), ("max_train_steps=1000", "max_train_steps=2")):
        assert part in code
        code = code.replace(part, small)
    exec(code, {})
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (clone / "out" / "run" / "model" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_command_for_two_processes_runs(clone):
    run_alone(with_small_data(TWO_PROCESSES), {})
    assert (clone / "out" / "two" / "model" / "model_index.json").is_file()
