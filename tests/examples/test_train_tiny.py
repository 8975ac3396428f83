"""The recipe of `instructdiffusion-tiny`, run for a few steps on generated material."""

import dataclasses
import json
import shutil
import sys

import ablation
import model
import numpy as np
import pytest
import torch
import vae
from PIL import Image
from recipes import RECIPES
from safetensors.torch import load_file
from sources import TRAINING_SOURCES

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.files import update_json

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))


@pytest.fixture
def run(world_folder, tiny_recipe, tmp_path, monkeypatch, tiny_train):
    """A function that runs train.py with command-line arguments, for a few steps of each stage."""
    for name, value in {"POOL": 40, "BATCH": 2, "STEPS": 3, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(vae, name, value)
    monkeypatch.setattr(tiny_train, "SAMPLES", 20)
    few = {"max_train_steps": 2, "batch_size": 2, "lr_warmup_steps": 0, "mixed_precision": "no"}
    short = dataclasses.replace(
        tiny_recipe,
        config=dataclasses.replace(tiny_recipe.config, **few),
        tuning=dataclasses.replace(tiny_recipe.tuning, **few | {"max_train_steps": 1, "lr_scheduler": "constant"}),
    )
    monkeypatch.setitem(RECIPES, "cpu", short)

    def run(name, *options):
        work = tmp_path / f"{name}-work"
        work.mkdir(exist_ok=True)
        if not (work / "world").exists():
            (work / "world").symlink_to(world_folder)
        arguments = ["train.py", "--work_dir", str(work), "--output_dir", str(tmp_path / name), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        tiny_train.main()
        return tmp_path / name

    return run


def test_the_recipe_writes_a_folder_that_loads_and_runs(run, tmp_path):
    notes = tmp_path / "first-work" / "vae.partial" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    output = run("first")
    assert notes.read_text() == "mine"
    assert {"README.md", "CREDITS.md", "model_index.json"} <= {path.name for path in output.iterdir()}
    weights = list(output.glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in weights) < 40e6
    pipe = InstructDiffusionPipeline.from_pretrained(output)
    assert pipe.config.task_settings == model.task_settings(RECIPES["cpu"]) and pipe.readout is None
    answer = pipe("mark the cat in red", Image.new("RGB", (64, 64)), num_inference_steps=1).images[0]
    assert answer.size == (64, 64)

    with pytest.raises(SystemExit):  # the folder exists
        run("first")

    update_json(output / "unet" / "config.json", {"sample_size": 16})  # as in a model for 64 x 64 pixels
    second = run("second", "--init", str(output))
    assert InstructDiffusionPipeline.from_pretrained(second).default_resolution == RECIPES["cpu"].side
    first_unet, second_unet = (load_file(folder / UNET) for folder in (output, second))
    step = max((first_unet[name].float() - second_unet[name].float()).abs().max() for name in first_unet)
    assert 0 < step < 0.01, "one training step apart"
    assert (second / VAE).read_bytes() == (output / VAE).read_bytes()


def test_images_of_keypoints_have_their_own_size(run, tiny_recipe, world_folder, tiny_train):
    run("first")
    tokenizer = model.build_tokenizer(world_folder / "bpe_simple_vocab_16e6.txt.gz")
    samples = tiny_train.training_samples(tiny_recipe, world_folder, tokenizer, batch_size=2)
    assert set(samples.sources) == TRAINING_SOURCES.keys()
    keypoints = {"pose", "keypoints", "few keypoints"}
    for index in range(len(samples)):
        name = samples.sources[samples[index]["source"]]
        side = 64 if name in keypoints else 96
        assert samples[index]["image"].shape == (3, side, side)


def test_a_longer_run_continues_from_the_last_checkpoint(run, monkeypatch, capsys):
    init = str(run("first"))
    output = run("second", "--init", init)
    before = load_file(output / UNET)
    tuning = dataclasses.replace(RECIPES["cpu"].tuning, max_train_steps=2)
    monkeypatch.setitem(RECIPES, "cpu", dataclasses.replace(RECIPES["cpu"], tuning=tuning))
    shutil.rmtree(output)
    after = load_file(run("second", "--init", init) / UNET)
    assert "checkpoint-1" in capsys.readouterr().out
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.slow  # many seconds, most of them in new processes
def test_ablation_trains_a_model_for_all_families_and_one_for_each(run, tmp_path, monkeypatch):
    run("first")
    monkeypatch.setattr(ablation, "SAMPLES", 20)
    output = tmp_path / "ablation"
    options = ["--work_dir", tmp_path / "first-work", "--output_dir", output, "--steps", 1, "--samples", 1]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, options)])
    ablation.main()
    models = {name: load_file(output / name / UNET) for name in ("all", *ablation.SOURCES)}
    assert len({weights["conv_in.weight"].float().numpy().tobytes() for weights in models.values()}) == 5
    together = json.loads((output / "all-scores" / "results.json").read_text())["rows"]
    alone = [
        row
        for name in ablation.SOURCES
        for row in json.loads((output / f"{name}-scores" / "results.json").read_text())["rows"]
    ]
    assert {row["row"] for row in alone} == {row["row"] for row in together} and len(alone) == len(together)
    assert all(row["samples"] == 1 for row in alone + together)
    markdown = (output / "ablation.md").read_text()
    noise = [
        next(row["scores"]["PSNR"]["model"] for row in rows if row["row"] == "noise") for rows in (together, alone)
    ]
    assert f"| noise | PSNR | {noise[0]:.2f} | {noise[1]:.2f} |" in markdown
    assert markdown.count("\n") == 2 + len(together)
    assert set().union(*ablation.SOURCES.values()) == TRAINING_SOURCES.keys()

    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, options), "--steps", "2"])
    with pytest.raises(ValueError, match="models of the same number of steps; steps was 1 and is 2"):
        ablation.main()


def test_standardizing_latents_does_not_change_decoded_images():
    torch.manual_seed(0)
    autoencoder = vae.build(64)
    pictures = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    def encode_and_decode():
        with torch.no_grad():
            posterior = autoencoder.encode(pixels).latent_dist
            return posterior, autoencoder.decode(posterior.mean).sample

    before, picture_before = encode_and_decode()
    vae.standardize_latents(autoencoder, pictures)
    after, picture_after = encode_and_decode()
    torch.testing.assert_close(picture_after, picture_before, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
    # the standard deviation of the posterior is divided by the same factor as its mean
    torch.testing.assert_close(after.std, before.std / before.mean.std((0, 2, 3))[:, None, None], rtol=1e-4, atol=0)


def test_tokenizer_applies_the_merges_and_falls_back_to_letters(world_folder):
    tokenizer = model.build_tokenizer(world_folder / "bpe_simple_vocab_16e6.txt.gz")
    assert tokenizer.tokenize("The cat") == ["the</w>", "cat</w>"]
    assert tokenizer.tokenize("car") == ["ca", "r</w>"]
    ids = tokenizer("the", padding="max_length").input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id and set(ids[2:]) == {tokenizer.eos_token_id}
