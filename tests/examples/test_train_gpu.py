"""The recipe for a GPU in a small run on a CPU, from the pack to the table. Wheels are not downloaded."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pack
import pytest
import score
import tiny
from recipes import RECIPES
from safetensors.torch import load_file

# The interpreter of the small run: scripts have small settings, and the time of a stage ends with its first
# checkpoint. The command `timeout` then gets SIGALRM.
PYTHON = f"""#!{sys.executable}
import dataclasses, os, runpy, signal, sys, threading, time
from pathlib import Path

sys.argv = sys.argv[1:]
script = Path(sys.argv[0])
sys.path.insert(0, str(script.parent))


def end_the_stretch():
    work = Path(sys.argv[sys.argv.index("--work_dir") + 1])
    while not any(work.glob("checkpoints/checkpoint-*/config.json")):
        time.sleep(0.1)
    os.kill(os.getppid(), signal.SIGALRM)


if script.name != "wheels.py":
    import model, recipes

    few = {{"num_inference_steps": 1, "guidance_scale": 0.5, "image_guidance_scale": 0.5}}
    model.SETTINGS = dict.fromkeys(model.SETTINGS, few)
    gpu = recipes.RECIPES["gpu"]
    config, tuning = (
        dataclasses.replace(each, batch_size=2, lr_warmup_steps=1, checkpointing_steps=2, mixed_precision="no")
        for each in (gpu.config, gpu.tuning)
    )
    recipes.RECIPES["gpu"] = dataclasses.replace(
        gpu, names=NAMES, unet_widths=(32, 32, 64), text_width=32, config=config, tuning=tuning
    )
if script.name == "train.py":
    threading.Thread(target=end_the_stretch, daemon=True).start()
runpy.run_path(str(script), run_name="__main__")
"""


@pytest.fixture
def run_pack(world_folder, tmp_path, monkeypatch):
    """A function that runs pack.py and returns the folder it writes, in the build folder of a checkout."""
    for part in ("src", "examples"):
        (tmp_path / part).symlink_to(tiny.ROOT / part)
    output = tmp_path / "build" / "tiny"
    monkeypatch.setattr(pack, "download_wheels", lambda folder: folder.mkdir())
    monkeypatch.setattr(sys, "argv", ["pack.py", "--work_dir", str(world_folder.parent), "--output", str(output)])

    def run():
        pack.main()
        return output

    return run


def test_two_training_stages_and_the_table(run_pack, world_folder, tiny_recipe, tmp_path, monkeypatch):
    (world_folder / "packages").mkdir()
    folder = run_pack()
    assert {path.name for path in folder.iterdir()} == {"train_gpu.sh", "wheels", "world"}
    assert {path.name for path in (folder / "world").iterdir()} == set(pack.WORLD)
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("NAMES", repr(tiny_recipe.names)))
    python.chmod(0o755)

    def run(*command):
        ended = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    def unpack(name):
        parts = sorted((tmp_path / name).glob("model.tar.*"))
        (tmp_path / f"{name}.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
        shutil.unpack_archive(tmp_path / f"{name}.tar", tmp_path / f"{name}-model")
        return tmp_path / f"{name}-model"

    run("bash", folder / "train_gpu.sh", "600", tmp_path / "first")
    run("bash", folder / "train_gpu.sh", "600", tmp_path / "second", tmp_path / "first")
    first, second = unpack("first"), unpack("second")
    assert "128 x 128 pixels" in (second / "README.md").read_text()
    before, after = (load_file(model / "unet" / "diffusion_pytorch_model.safetensors") for model in (first, second))
    largest = max((before[name].float() - after[name].float()).abs().max() for name in before)
    assert 0 < largest < 0.01, "the second stretch starts from the weights of the first"
    for model in (tiny.ROOT / "examples" / "instructdiffusion-tiny", first):
        vae = "vae/diffusion_pytorch_model.safetensors"
        assert (model / vae).read_bytes() == (second / vae).read_bytes()

    scores = tmp_path / "scores"
    options = {"--model": second, "--world": folder / "world", "--samples": 1, "--output": scores}
    arguments = [str(each) for option in options.items() for each in option]
    monkeypatch.setitem(RECIPES, "gpu", dataclasses.replace(RECIPES["gpu"], names=tiny_recipe.names))
    monkeypatch.setattr(sys, "argv", ["score.py", "--recipe", "gpu", *arguments])
    score.main()
    table = (scores / "scores.md").read_text()
    assert "| segmentation, a drawing style not used in training: mIoU" in table and "| color edits: PSNR" in table


@pytest.mark.parametrize(
    ("trained", "size", "status"), [(3, 100, 3), (124, 100, 0), (137, 100, 0), (0, 61_000_000, 1)]
)
def test_the_model_is_saved_though_training_failed_and_has_four_parts_at_most(
    run_pack, tmp_path, trained, size, status
):
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
        case "$1" in
        *train.py) exit {trained} ;;
        *export.py) mkdir "$3" && head -c {size} /dev/zero > "$3/weights" ;;
        esac"""
    )
    python.chmod(0o755)
    command = ["bash", run_pack() / "train_gpu.sh", "60", tmp_path / "out"]
    ended = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert len(list((tmp_path / "out").glob("model.tar.*"))) == (5 if size > 60_000_000 else 1)


def test_a_pack_has_a_limit(run_pack, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 0.01)
    with pytest.raises(ValueError, match="tiny has .* MB, more than 0.01 MB"):
        run_pack()


def test_an_existing_pack_is_not_replaced(run_pack):
    folder = run_pack()
    with pytest.raises(pack.UsageError, match=f"--output: {folder} exists"):
        run_pack()
