"""Training like a new user: 200 images of mixed kinds, sizes and faults, from a model to the Hub."""

import json
import os
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from hub_server import running_hub
from PIL import ExifTags, Image
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
PAIRS = 100
TRUNCATED, EMPTY, NO_PICTURE, MISSING, LONG = 11, 23, 42, 67, 80  # pairs
LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = Image.new("RGB", (32, 32), "gray")
answer = pipe("make it winter", image=image, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
answer.images[0].save(sys.argv[2])
"""


def save_picture(folder, stem, rng):
    """Save an image of a random kind and size, and return its file name."""
    kind = rng.choice(["jpg", "progressive", "turned", "cmyk", "png", "rgba", "grey", "palette", "sixteen", "webp"])
    width, height = rng.randint(20, 600), rng.randint(20, 600)
    picture = tiny.picture(8, 8, rng.randrange(1000)).resize((width, height), Image.Resampling.BICUBIC)
    if kind == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.randint(2, 8)
        picture.save(folder / f"{stem}.jpg", exif=exif)
    elif kind in ("jpg", "progressive", "cmyk"):
        picture.convert("CMYK" if kind == "cmyk" else "RGB").save(folder / f"{stem}.jpg", progressive=kind != "jpg")
    elif kind == "webp":
        picture.save(folder / f"{stem}.webp")
    else:
        modes = {"png": "RGB", "rgba": "RGBA", "grey": "L", "palette": "P"}
        sixteen = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        (sixteen if kind == "sixteen" else picture.convert(modes[kind])).save(folder / f"{stem}.png")
    return next(folder.glob(f"{stem}.*")).name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng, rows = tmp_path_factory.mktemp("my-pictures"), random.Random(0), []
    for number in range(PAIRS):
        before, after = (save_picture(folder, f"{number:04d}-{part}", rng) for part in ("before", "after"))
        rows.append(
            {
                "original_image_file_name": before,
                "edited_image_file_name": after,
                "edit_prompt": f"make it number {number}",
            }
        )
    large = tiny.picture(8, 8).resize((4000, 3000), Image.Resampling.BICUBIC)
    (folder / rows[5]["original_image_file_name"]).unlink()
    large.save(folder / "large.jpg")
    rows[5]["original_image_file_name"] = "large.jpg"
    truncated = folder / rows[TRUNCATED]["original_image_file_name"]
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    (folder / rows[EMPTY]["edited_image_file_name"]).write_bytes(b"")
    (folder / rows[NO_PICTURE]["original_image_file_name"]).write_text("<html>404</html>")
    (folder / rows[MISSING]["edited_image_file_name"]).unlink()
    rows[LONG]["edit_prompt"] = "make the cat red and " * 40
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    InstructDiffusionPipeline(**tiny.components()).save_pretrained(folder)
    return folder


def kill_after_a_checkpoint(command, output, env):
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert list(output.glob("checkpoint-*")) and not (output / "model").exists()


def run(command, env):
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
def test_training_on_mixed_images_and_pushing_to_the_hub(pictures, start, tmp_path, lora, cached):
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    train = [sys.executable, tiny.ROOT / "examples" / "train.py", "--init", start, "--data", f"table={pictures}"]
    settings = {"batch_size": 8, "max_train_steps": 13, "checkpointing_steps": 3, "learning_rate": 1e-3}
    settings |= {"ema_decay": 0.5, "validation_num_inference_steps": 1, "num_validation_images": 1}
    settings |= {"lora_rank": 4} if lora else {}
    settings |= {"cache_samples": PAIRS} if cached else {}
    train += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    said = run([*train, "--output_dir", whole], env)
    named = {int(row) for row in re.findall(r"table: row (\d+) cannot be used and is replaced", said)}
    assert named == {TRUNCATED, EMPTY, NO_PICTURE, MISSING}
    assert said.count("more than 77 tokens is truncated") == 1

    kill_after_a_checkpoint([*train, "--output_dir", broken], broken, env)
    with running_hub() as hub:
        online = env | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        run([*train, "--output_dir", broken, "--resume", "latest", "--push_to", "you/mixed"], online)
        pushed = dict(hub.files["you/mixed"])
        run([sys.executable, "-c", LOAD, "you/mixed", tmp_path / "hub.png"], online)
    run([sys.executable, "-c", LOAD, whole / "model", tmp_path / "whole.png"], env)

    files = [f"model/{UNET}", *([f"lora/{LORA}"] * lora)]
    for file in files:
        expected, resumed = load_file(whole / file), load_file(broken / file)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert pushed[UNET] == (whole / "model" / UNET).read_bytes()
    before, after = load_file(start / UNET), load_file(whole / "model" / UNET)
    assert any(not torch.equal(before[name], after[name]) for name in before), "training changed nothing"
    answers = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("whole", "hub")]
    np.testing.assert_array_equal(*answers)
