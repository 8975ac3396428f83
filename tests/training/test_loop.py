import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate.utils import LoggerType
from diffusers import DDPMScheduler
from pairs import Pairs, mixture
from PIL import Image
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import (
    ImageDataset,
    MultiSizeDataset,
    TrainingConfig,
    ValidationExample,
    cache,
    cache_samples,
    loop,
    save_lora,
    train,
)
from instructdiffusion_pipeline.training.config import LR_SCHEDULERS
from instructdiffusion_pipeline.training.encoding import FrozenEncoders, draw_step_noise
from instructdiffusion_pipeline.training.loss import denoising_loss
from instructdiffusion_pipeline.training.validation import validation_grid
from instructdiffusion_pipeline.types import Sample

TWO_PROCESSES = tiny.ROOT / "examples" / "accelerate" / "two_processes_cpu.yaml"
SCRIPT = Path(__file__).parent / "train_tiny.py"
FEW = TrainingConfig(max_train_steps=2, batch_size=2)


def command(folder, cache=None, **settings):
    return [sys.executable, SCRIPT, folder, json.dumps(settings), *filter(None, [cache])]


def weights_of(folder):
    return torch.load(folder / "weights.pt")


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


@pytest.fixture
def two_samples(pipe):
    return ImageDataset(Mixture([(Source("two", Pairs(2), Editing.from_annotation), 1)]), pipe.tokenizer)


@pytest.mark.parametrize("cached", [False, True])
def test_killed_and_resumed_gives_the_weights_of_an_uninterrupted_run(tmp_path, cached):
    """A checkpoint has the whole state: weights, EMA, optimizer, schedule, position in the data."""
    settings = {
        "max_train_steps": 9,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "train_text_encoder": not cached,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cache = tmp_path / "cache" if cached else None
    subprocess.run(command(whole, cache, **settings), check=True, capture_output=True)

    process = subprocess.Popen(command(broken, cache, **settings), stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not checkpoints(broken) and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random().uniform(0, 0.2))  # at any time during the following updates and checkpoints
    process.kill()
    process.wait()
    assert checkpoints(broken), "killed before the first checkpoint"
    assert not (broken / "weights.pt").exists(), "killed after the end"
    # Two worker processes read the images now, which must not change the result.
    subprocess.run(command(broken, cache, **settings, num_workers=2), check=True, capture_output=True)

    expected, resumed = weights_of(whole), weights_of(broken)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert checkpoints(whole) == ["checkpoint-6", "checkpoint-8", "checkpoint-9"], "older checkpoints are dropped"
    fresh = InstructDiffusionPipeline(**tiny.components())
    assert not torch.equal(expected["unet.conv_in.weight"], fresh.unet.conv_in.weight), "training moved nothing"


def test_two_processes_train_like_one_with_twice_the_accumulation(tmp_path):
    settings = {
        "max_train_steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "lr_scheduler": "cosine",
    }
    subprocess.run(command(tmp_path / "one", gradient_accumulation_steps=2, **settings), check=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    run = launch + command(tmp_path / "two", **settings)[1:]
    started = subprocess.run(run, capture_output=True, text=True)
    if started.returncode:  # accelerate 1.15 does not use the configuration's `use_cpu`, which 1.10 does
        assert "2 processes were launched, but each would train alone" in started.stderr
        subprocess.run(run, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    fresh = InstructDiffusionPipeline(**tiny.components()).unet.state_dict()
    moved = max((one[f"unet.{name}"] - tensor).abs().max() for name, tensor in fresh.items())
    assert moved > 1e-3, "training moved nothing"
    assert max((one[name] - two[name]).abs().max() for name in one) <= 1e-5


def test_two_processes_share_the_files_of_a_cache(tmp_path, monkeypatch):
    """Each encodes one of two files, with the same content as with one process."""
    settings = {"max_train_steps": 1, "batch_size": 1, "ema_decay": 0}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES]
    run = launch + command(tmp_path / "two", tmp_path / "cache", **settings)[1:]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "SHARD_SIZE": "4"}
    subprocess.run(run, check=True, env=env)
    for rank in (0, 1):
        assert (tmp_path / f"two.process-{rank}").read_text() == f"{4 * rank:09d}.safetensors\n"
    pipe = InstructDiffusionPipeline(**tiny.components())
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    cache_samples(ImageDataset(mixture(), pipe.tokenizer), 7, pipe, tmp_path / "alone")
    for name in ("000000000.safetensors", "000000004.safetensors"):
        ours, alone = (load_file(tmp_path / folder / name) for folder in ("cache", "alone"))
        assert ours.keys() == alone.keys()
        for column in ours:
            torch.testing.assert_close(ours[column], alone[column])


def losses(pipe, dataset, positions=64):
    """Mean loss of `pipe` for many timesteps, to compare before and after training."""
    batch = torch.utils.data.default_collate([dataset[position] for position in range(positions)])
    batch = FrozenEncoders(pipe.vae, pipe.text_encoder).encode(batch)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    draws = draw_step_noise(99, range(positions), batch["target_mean"].shape[1:], 1000)
    with torch.no_grad():
        return denoising_loss(
            pipe.unet,
            scheduler,
            pipe.vae.config.scaling_factor * batch["target_mean"].float(),
            batch["image_latents"].float(),
            batch["prompt_embeds"].float(),
            draws.noise,
            draws.timesteps,
        ).mean()


WAYS = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "LoRA": {"lora_rank": 8, "learning_rate": 1e-2},
    "LoRA in bf16": {"lora_rank": 8, "learning_rate": 1e-2, "mixed_precision": "bf16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "cached": {},
    "velocity": {},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way == "LoRA in bf16" else way for way in WAYS]
)
def test_all_training_settings_lower_the_loss_on_two_samples(way, pipe, two_samples, tmp_path):
    others = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    embeds = pipe.encode_prompt("make it number 0")[0]
    if way == "velocity":
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
    dataset = cache_samples(two_samples, 2, pipe, tmp_path / "cache") if way == "cached" else two_samples
    before = losses(pipe, dataset)
    # Few samples, because a CPU without instructions for bfloat16 computes it slowly.
    config = TrainingConfig(max_train_steps=60, batch_size=2, learning_rate=1e-3, ema_decay=0.5)
    train(pipe, dataset, dataclasses.replace(config, **WAYS[way]), tmp_path)
    # LoRA in the attention of random weights lowers the loss less.
    assert losses(pipe, dataset) < (0.95 if "LoRA" in way else 0.85) * before
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert torch.equal(embeds, pipe.encode_prompt("make it number 0")[0])
    assert all(torch.equal(tensor, others[name]) for name, tensor in pipe.vae.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [{"mixed_precision": "fp16"}, {"optimizer": "adamw8bit"}])
def test_on_cuda_half_precision_and_eight_bit_adam_lower_the_loss(settings, pipe, two_samples, tmp_path):
    before = losses(pipe, two_samples)
    config = TrainingConfig(max_train_steps=60, batch_size=8, learning_rate=1e-3, ema_decay=0.5, **settings)
    train(pipe, two_samples, config, tmp_path)
    assert losses(pipe.to("cpu"), two_samples) < 0.85 * before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["all weights", "LoRA"])
def test_a_resumed_compiled_run_gives_the_weights_of_an_eager_one(settings, samples, tmp_path):
    """Takes minutes on a CPU."""
    config = dataclasses.replace(
        FEW, max_train_steps=4, learning_rate=1e-3, ema_decay=0.5, checkpointing_steps=2, **settings
    )
    compiled = dataclasses.replace(config, torch_compile=True)

    def run(config, folder, resume=None):
        pipe = InstructDiffusionPipeline(**tiny.components())
        return train(pipe, samples, config, tmp_path / folder, resume).unet.state_dict()

    plain, whole = run(config, "plain"), run(compiled, "compiled")
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    resumed = run(compiled, "compiled", "latest")
    assert plain.keys() == whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # The compiler fuses operations, and AdamW amplifies the rounding errors of gradients that are nearly zero.
    differences = torch.cat([(whole[name] - plain[name]).abs().flatten() for name in plain])
    assert differences.mean() < 1e-6 and (differences > 1e-5).float().mean() < 1e-3


def test_lora_weights_load_in_a_pipeline_and_change_its_output(pipe, two_samples, tmp_path):
    plain = pipe(**tiny.inputs()).images
    config = TrainingConfig(max_train_steps=5, batch_size=2, learning_rate=1e-2, lora_rank=4, ema_decay=0.5)
    trained = train(pipe, two_samples, config, tmp_path)
    answer = trained(**tiny.inputs()).images
    save_lora(trained, tmp_path / "lora")
    fresh = InstructDiffusionPipeline(**tiny.components())
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path / "lora")
    loaded = fresh(**tiny.inputs()).images
    assert np.abs(loaded - plain).max() > 0.01
    np.testing.assert_allclose(loaded, answer, atol=1e-5)


def test_adapters_that_a_pipeline_has_are_not_trained_with_it(pipe, two_samples, tmp_path):
    trained = train(pipe, two_samples, dataclasses.replace(FEW, lora_rank=2), tmp_path / "lora")
    for rank in (None, 2):
        with pytest.raises(ValueError, match="must not have LoRA layers, but its unet has. Call fuse_lora"):
            train(trained, two_samples, dataclasses.replace(FEW, lora_rank=rank), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    trained.fuse_lora()
    trained.unload_lora_weights()
    train(trained, two_samples, FEW, tmp_path / "again")
    InstructDiffusionPipeline.from_pretrained(tmp_path / "again" / "checkpoint-2")


def test_text_to_image_does_not_use_the_input(pipe, two_samples, tmp_path):
    config = dataclasses.replace(FEW, text_to_image=True, max_train_steps=4, learning_rate=1e-2, weight_decay=0)
    before = pipe.unet.conv_in.weight.clone()
    train(pipe, two_samples, config, tmp_path)
    moved = (pipe.unet.conv_in.weight - before).abs()
    assert moved[:, :4].max() > 0 and moved[:, 4:].max() == 0, "zero latents give no gradient"


def test_a_loss_that_is_not_finite_stops_and_reports_the_samples(pipe, samples, tmp_path):
    class Poisoned(torch.utils.data.Dataset):
        sources = samples.sources

        def __len__(self):
            return len(samples)

        def __getitem__(self, position):
            item = FrozenEncoders(pipe.vae, pipe.text_encoder).encode(
                torch.utils.data.default_collate([samples[position]])
            )
            item = {name: column[0] for name, column in item.items()}
            if position == 9:
                item["target_mean"] = item["target_mean"] * float("nan")
            return item

    config = dataclasses.replace(FEW, max_train_steps=9, checkpointing_steps=3)
    source = samples.sources[samples[9]["source"]]
    with pytest.raises(FloatingPointError) as stop:
        train(pipe, Poisoned(), config, tmp_path)
    message = str(stop.value)
    assert message.startswith(f"update 4: the loss is not finite for {source} at position 9. Its samples are from ")
    assert message.endswith(f"The last good checkpoint is {tmp_path / 'checkpoint-3'}.")
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    stored = load_file(tmp_path / "checkpoint-3" / "state" / "trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_gradients_that_are_not_finite_stop_the_run(pipe, two_samples, tmp_path):
    pipe.unet.conv_out.register_full_backward_hook(lambda module, into, out: (into[0] * float("inf"),))
    with pytest.raises(FloatingPointError, match="update 0: the norm of the gradients is (nan|inf).* from two"):
        train(pipe, two_samples, FEW, tmp_path)


@pytest.fixture
def samples(pipe):
    return ImageDataset(mixture(), pipe.tokenizer)


def test_checkpoints_of_another_run_raise_an_error(pipe, two_samples, tmp_path):
    train(pipe, two_samples, FEW, tmp_path)
    other = dataclasses.replace(FEW, learning_rate=1e-2, seed=3)
    with pytest.raises(ValueError, match="another run: learning_rate was 0.0001 and is 0.01, seed was 0 and is 3"):
        train(pipe, two_samples, other, tmp_path, resume="latest")
    with pytest.raises(ValueError, match="`output_dir` has .*checkpoint-2 of an earlier run. Set `resume` to latest"):
        train(pipe, two_samples, FEW, tmp_path)
    with pytest.raises(ValueError, match='`resume` must be "latest" or the folder of a checkpoint; .*checkpoint-7'):
        train(pipe, two_samples, FEW, tmp_path, resume=tmp_path / "checkpoint-7")
    shorter = dataclasses.replace(FEW, max_train_steps=1)
    with pytest.raises(ValueError, match="`max_train_steps` must be at least the 2 updates of .*checkpoint-2; got 1"):
        train(pipe, two_samples, shorter, tmp_path, resume="latest")


def test_a_run_can_be_made_longer_and_its_other_batches(pipe, two_samples, tmp_path):
    train(pipe, two_samples, dataclasses.replace(FEW, checkpoints_total_limit=2), tmp_path)
    assert json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())["samples_per_step"] == 2
    longer = dataclasses.replace(
        FEW, max_train_steps=3, batch_size=1, gradient_accumulation_steps=2, checkpoints_total_limit=2
    )
    train(pipe, two_samples, longer, tmp_path, resume="latest")
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    ended = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    again = train(InstructDiffusionPipeline(**tiny.components()), two_samples, longer, tmp_path, resume="latest")
    assert all(torch.equal(ended[name], tensor) for name, tensor in again.unet.state_dict().items())


def test_images_of_several_sizes_are_trained_in_separate_batches(tmp_path):
    def run(folder, steps, sides, cached=False):
        pipe = InstructDiffusionPipeline(**tiny.components())
        datasets = [
            ImageDataset(
                Mixture([(Source(f"side {side}", Pairs(4, side=side), Editing.from_annotation), 1)]), pipe.tokenizer
            )
            for side in sides
        ]
        if cached:
            datasets = [cache_samples(each, 4, pipe, tmp_path / each.sources[0]) for each in datasets]
        dataset = datasets[0] if len(sides) == 1 else MultiSizeDataset(datasets, 2, seed=1)
        config = TrainingConfig(max_train_steps=steps, batch_size=2, checkpointing_steps=1)
        return train(pipe, dataset, config, tmp_path / folder, resume="latest").unet.state_dict()

    whole = run("whole", 4, (32, 48))
    run("resumed", 2, (32, 48))
    # A run is made longer with the same data, so its checkpoint must fit.
    resumed = run("resumed", 4, (32, 48))
    small = run("small", 4, (32,))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], small[name]) for name in whole)
    cached = run("cached", 4, (32, 48), cached=True)
    assert max((whole[name] - cached[name]).abs().max() for name in whole) < 1e-3


def test_several_datasets_of_one_size_train_like_one(pipe, two_samples, tmp_path):
    single = train(pipe, two_samples, FEW, tmp_path / "single").unet.state_dict()
    other = InstructDiffusionPipeline(**tiny.components(), score_calibration={"segmentation": [2, 1]})
    grouped = train(other, MultiSizeDataset([two_samples], 2), FEW, tmp_path / "grouped").unet.state_dict()
    assert other.config.score_calibration == {}, "it was for the weights before training"
    assert all(torch.equal(single[name], grouped[name]) for name in single)


def test_unsupported_settings_raise_before_files_are_written(pipe, two_samples, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    for settings, words in (
        ({"mixed_precision": "fp16"}, '`mixed_precision` must be "bf16" or "no" on a CPU'),
        ({"optimizer": "adamw8bit"}, '`optimizer` must be "adamw" on cpu, because "adamw8bit" needs CUDA'),
        ({"report_to": "wandb"}, r"`report_to` must be .* installed tracker .*\(tensorboard\); got 'wandb'"),
        ({"report_to": "tensorbord"}, "`report_to` must be .* got 'tensorbord'"),
    ):
        with pytest.raises(ValueError, match=words):
            train(pipe, two_samples, dataclasses.replace(FEW, **settings), tmp_path / "out")
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3}))
    for variable, value, clipping in (
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "0.5"),
        ("ACCELERATE_GRADIENT_CLIPPING", "auto", "auto"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file), "0.3"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"configuration, {clipping}; got 2\."):
            patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            patch.setenv(variable, value)
            train(pipe, two_samples, dataclasses.replace(FEW, max_grad_norm=2.0), tmp_path / "out")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="on a CPU with .* ACCELERATE_DYNAMO_BACKEND=inductor"),
    ):
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
        train(pipe, two_samples, dataclasses.replace(FEW, mixed_precision="bf16"), tmp_path / "out")
    with pytest.raises(ValueError, match='must be "no" on a CPU with `torch_compile`'):
        compiled = dataclasses.replace(FEW, mixed_precision="bf16", torch_compile=True)
        train(pipe, two_samples, compiled, tmp_path / "out")
    cached = cache_samples(two_samples, 2, pipe, tmp_path / "cache")
    with pytest.raises(ValueError, match="embeddings=False"):
        train(pipe, cached, dataclasses.replace(FEW, train_text_encoder=True), tmp_path / "out")
    odd = ImageDataset(Mixture([(Source("odd", Pairs(2, side=34), Editing.from_annotation), 1)]), pipe.tokenizer)
    with pytest.raises(ValueError, match="34 x 34 pixels; both must be multiples of 4"):
        train(pipe, odd, FEW, tmp_path / "out")
    with pytest.raises(ValueError, match="34 x 34 pixels; both must be multiples of 4"):
        train(pipe, MultiSizeDataset([two_samples, odd], 2), FEW, tmp_path / "out")
    with pytest.raises(ValueError, match="`batch_size` must be 4, as in `dataset`, .*; got 2"):
        train(pipe, MultiSizeDataset([two_samples], 4), FEW, tmp_path / "out")
    clean = InstructDiffusionPipeline(**tiny.components())
    clean.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match='prediction_type "epsilon" or "v_prediction"; got \'sample\''):
        train(clean, two_samples, FEW, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train(pipe, two_samples, FEW, tmp_path / "out")  # an error does not set the precision of the process


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"max_train_steps": 125.0}, "`max_train_steps` must be an integer; got 125.0"),
        ({"learning_rate": "fast"}, "`learning_rate` must be a number; got 'fast'"),
        ({"max_grad_norm": None}, "`max_grad_norm` must be a number; got None"),
        ({"lora_rank": 4.0}, "`lora_rank` must be an integer; got 4.0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"min_snr_gamma": 0.0}, "`min_snr_gamma` must be above 0; got 0.0"),
        ({"timestep_bias": 0.0}, "`timestep_bias` must be above 0; got 0.0"),
        ({"change_weight": -1.0}, "`change_weight` must be above 0; got -1.0"),
        ({"change_weight": 10.0, "text_to_image": True}, "`change_weight` must be None with `text_to_image`"),
        ({"ema_decay": 1.0}, "`ema_decay` must be at least 0 and below 1"),
        ({"max_train_steps": None}, "Either `max_train_steps` or `num_train_epochs` must be given"),
        ({"num_train_epochs": 2}, "Either `max_train_steps` or `num_train_epochs` must be given"),
        ({"max_train_steps": None, "num_train_epochs": 0}, "`num_train_epochs` must be above 0; got 0"),
        ({"conditioning_dropout_prob": 0.6}, "`conditioning_dropout_prob` must be from 0 to 0.5; got 0.6"),
        ({"lr_scheduler": "piecewise_constant"}, "`lr_scheduler` must be one of linear, .*; got 'piecewise_constant'"),
        ({"lr_warmup_steps": 5}, '`lr_warmup_steps` must be 0 with lr_scheduler "constant"'),
        ({"lr_warmup_steps": -1, "lr_scheduler": "linear"}, "`lr_warmup_steps` must be at least 0; got -1"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0; got -0.1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0; got -1"),
        ({"weight_decay": math.inf}, "`weight_decay` must be at least 0; got inf"),
        ({"learning_rate": math.inf}, "`learning_rate` must be above 0; got inf"),
        ({"seed": -1}, "`seed` must be from 0 to 4294967295; got -1"),
        ({"seed": 2**32}, "`seed` must be from 0 to 4294967295; got 4294967296"),
        ({"lora_rank": 0}, "`lora_rank` must be at least 1"),
        ({"lora_rank": 4, "train_text_encoder": True}, "`train_text_encoder` must be False"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no, bf16, fp16; got 'fp8'"),
        ({"optimizer": "sgd"}, "`optimizer` must be one of"),
    ],
)
def test_settings_out_of_range_raise_errors(settings, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FEW, **settings)


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_training_runs_with_each_learning_rate_scheduler(name, pipe, two_samples, tmp_path):
    warmup = 0 if name == "constant" else 1
    config = dataclasses.replace(FEW, max_train_steps=3, batch_size=1, lr_scheduler=name, lr_warmup_steps=warmup)
    train(pipe, two_samples, config, tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-3"]


def test_numbers_of_other_libraries_and_texts_are_converted():
    """PyYAML reads 1e-4 as a text. A checkpoint stores the settings as JSON."""
    given = {"max_train_steps": np.int64(4), "learning_rate": "1e-4", "ema_decay": torch.tensor(0.5), "lora_rank": 4}
    config = TrainingConfig(**given, min_snr_gamma=np.float32(5))
    values = config.max_train_steps, config.learning_rate, config.ema_decay, config.min_snr_gamma
    assert values == (4, 1e-4, 0.5, 5.0) and [type(value) for value in values] == [int, float, float, float]
    json.dumps(dataclasses.asdict(config))


def test_a_refused_call_does_not_change_the_pipeline(pipe, two_samples, tmp_path):
    pipe.register_to_config(score_calibration={"keypoints": [1.0, 0.0]})
    train(InstructDiffusionPipeline(**tiny.components()), two_samples, FEW, tmp_path / "used")
    settings = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    with pytest.raises(ValueError, match="of an earlier run"):
        train(pipe, two_samples, dataclasses.replace(FEW, lora_rank=2), tmp_path / "used")
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == settings
    assert pipe.config.score_calibration and not pipe.unet.training
    pipe.check_no_adapters()


def test_lora_has_its_own_default_learning_rate():
    assert (FEW.learning_rate, TrainingConfig(max_train_steps=1, lora_rank=4).learning_rate) == (1e-4, 1e-3)
    assert TrainingConfig(max_train_steps=1, lora_rank=4, learning_rate=0.5).learning_rate == 0.5


def test_the_length_of_a_run_can_be_given_in_epochs(pipe, samples, tmp_path):
    assert len(samples) == 7
    config = TrainingConfig(num_train_epochs=1.5, batch_size=2)
    train(pipe, samples, config, tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-6"], "1.5 epochs of 7 samples in pairs"
    assert TrainingConfig(num_train_epochs=3, batch_size=2).for_samples(8, 2).max_train_steps == 6


def test_validation_images_have_fixed_noise_and_do_not_change_training(pipe, samples, tmp_path):
    sample = samples.mixture[0]
    example = ValidationExample("editing", sample, {"num_inference_steps": 2})
    config = dataclasses.replace(FEW, max_train_steps=4, learning_rate=1e-3, validation_steps=2, ema_decay=0.5)
    train(pipe, samples, config, tmp_path / "shown", validation=[example, example])
    grids = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "shown" / "validation").iterdir())]
    # Before the first update, and after each second one.
    assert len(grids) == 3 and (grids[0] != grids[1]).any() and (grids[1] != grids[2]).any()
    for grid in grids:
        upper, lower = np.split(grid, 2)
        assert (upper == lower).all(), "the same example with the same noise"

    still = InstructDiffusionPipeline(**tiny.components())
    train(still, samples, config, tmp_path / "hidden")
    shown, hidden = pipe.unet.state_dict(), still.unet.state_dict()
    assert all(torch.equal(shown[name], hidden[name]) for name in hidden)
    # The last grid shows the averaged weights, which the run returns.
    assert (np.asarray(validation_grid(pipe, [example, example])) == grids[-1]).all()


def test_the_loss_of_cached_validation_samples_is_that_of_the_images(pipe, samples, two_samples, tmp_path, capsys):
    cached = cache_samples(two_samples, 2, pipe, tmp_path / "cache")
    said = []
    for held_out in (two_samples, cached):
        fresh = InstructDiffusionPipeline(**tiny.components())
        train(fresh, samples, FEW, tmp_path / str(len(said)), validation_dataset=held_out)
        losses = re.findall(r"Validation loss after \d+ updates: (\S+)", capsys.readouterr().out)
        said.append([float(loss) for loss in losses])
    assert len(said[0]) == 2 and said[0] == pytest.approx(said[1], rel=0.02)


def test_validation_images_have_the_size_of_the_training_images(pipe):
    sizes = []

    def note(pipeline, step, timestep, tensors):
        sizes.append(tuple(tensors["latents"].shape[-2:]))
        return tensors

    image = tiny.picture(48, 48)
    settings = {"num_inference_steps": 1, "callback_on_step_end": note, "resolution": 64}
    validation_grid(pipe, [ValidationExample("editing", Sample(image, image, "paint"), settings)])
    assert pipe.default_resolution == 32 and sizes == [(48 // pipe.vae_scale_factor,) * 2]


def test_an_interrupted_validation_restores_the_trained_weights(pipe, samples, tmp_path):
    start, used = pipe.unet.conv_in.weight.detach().clone(), []

    def interrupt(pipeline, step, timestep, tensors):
        if not torch.equal(pipeline.unet.conv_in.weight, start):
            used.append(pipeline.unet.conv_in.weight.detach().clone())
            raise KeyboardInterrupt
        return tensors

    example = ValidationExample(
        "editing", samples.mixture[0], {"num_inference_steps": 2, "callback_on_step_end": interrupt}
    )
    config = dataclasses.replace(FEW, learning_rate=1e-3, ema_decay=0.5)
    with pytest.raises(KeyboardInterrupt):
        train(pipe, samples, config, tmp_path, validation=[example])
    trained = load_file(tmp_path / "checkpoint-2" / "state" / "trained.safetensors")["unet.conv_in.weight"]
    assert torch.equal(pipe.unet.conv_in.weight, trained)
    assert not torch.equal(used[0], trained), "validation uses the average"


def test_saving_checkpoints_does_not_change_other_files(pipe, two_samples, tmp_path):
    others = [tmp_path / name / "notes.txt" for name in ("partial", "checkpoint-1", ".checkpoint-2.other")]
    for path in others:
        path.parent.mkdir()
        path.write_text("mine")
    config = dataclasses.replace(FEW, max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=1)
    train(pipe, two_samples, config, tmp_path)
    assert all(path.read_text() == "mine" for path in others)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4"} | {path.parent.name for path in others}


def test_sources_with_the_same_name_raise_an_error(pipe, tmp_path):
    twins = [(Source("pairs", Pairs(2, first), Editing.from_annotation), 1) for first in (0, 50)]
    with pytest.raises(ValueError, match="different names; these are used more than once: pairs"):
        ImageDataset(Mixture(twins), pipe.tokenizer)

    class Twins(torch.utils.data.Dataset):
        sources = ["pairs", "others", "pairs"]

        def __len__(self):
            return 2

        def __getitem__(self, position):
            return ImageDataset(mixture(), pipe.tokenizer)[position]

    with pytest.raises(ValueError, match="different names; these are used more than once: pairs"):
        train(pipe, Twins(), FEW, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_dataset_have_separate_losses(pipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = ["table (a)", "table (b)"]
    twins = [(Source(name, Pairs(2, 50 * i), Editing.from_annotation), 1) for i, name in enumerate(names)]
    config = dataclasses.replace(FEW, max_train_steps=1, batch_size=4, report_to="tensorboard")
    train(pipe, ImageDataset(Mixture(twins), pipe.tokenizer), config, tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "instructdiffusion"))
    events.Reload()
    (total,), *parts = ([e.value for e in events.Scalars(tag)] for tag in ("loss", *(f"loss/{n}" for n in names)))
    assert parts[0] != parts[1] and np.mean(parts) == pytest.approx(total, rel=1e-5)


def test_trackers_get_losses_by_source_throughput_memory_and_images(pipe, samples, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(FEW, max_train_steps=4, logging_steps=2, report_to="tensorboard")
    example = ValidationExample("editing", samples.mixture[0], {"num_inference_steps": 1})
    train(pipe, samples, config, tmp_path, validation=[example])
    events = EventAccumulator(str(tmp_path / "logs" / "instructdiffusion"))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    shown = [samples.sources[samples[position]["source"]] for position in range(8)]
    for line in range(2):
        counts = Counter(shown[4 * line : 4 * line + 4])
        each = {name: values[f"loss/{name}"].pop(0) * count for name, count in counts.items()}
        assert values["loss"][line] == pytest.approx(sum(each.values()) / 4, rel=1e-5)
    assert values["learning rate"] == pytest.approx([1e-4, 1e-4])
    assert values["peak memory, GB"][0] > 0.05 and min(values["samples per second"]) > 0
    assert events.Tags()["images"] == ["validation"]
