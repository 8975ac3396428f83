import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.sample import Sample
from instructdiffusion_pipeline.training import TrainingConfig, encode_samples, train

SCRIPT = Path(__file__).parent / "train_tiny.py"
STEPS = 9


def run(folder, *options):
    return subprocess.run(
        [sys.executable, SCRIPT, folder, str(STEPS), *options], check=True, capture_output=True, text=True
    )


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_killed_and_resumed_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole)

    process = subprocess.Popen([sys.executable, SCRIPT, broken, str(STEPS)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not checkpoints(broken) and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert checkpoints(broken), "killed before the first checkpoint"
    assert not (broken / "weights.pt").exists(), "killed after the end"
    run(broken)

    expected, resumed = (torch.load(folder / "weights.pt") for folder in (whole, broken))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert checkpoints(whole) == [f"checkpoint-{STEPS}"], "older checkpoints are dropped"
    fresh = InstructDiffusionPipeline(**tiny.components())
    assert not torch.equal(expected["unet.conv_in.weight"], fresh.unet.conv_in.weight), "training moved nothing"


@pytest.fixture
def two_samples(pipe):
    samples = [Sample(tiny.picture(seed=i), tiny.picture(seed=50 + i), f"sample {i}") for i in range(2)]
    return encode_samples(samples, pipe.vae, pipe.tokenizer)


def test_a_loss_that_is_not_finite_stops_with_the_step(pipe, two_samples, tmp_path):
    two_samples.tensors["target_mean"][:] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 0"):
        train(pipe, two_samples, TrainingConfig(max_train_steps=2, batch_size=2), tmp_path)
    assert not checkpoints(tmp_path)


def test_checkpoints_of_another_run_are_refused(pipe, two_samples, tmp_path):
    config = TrainingConfig(max_train_steps=1, batch_size=2)
    train(pipe, two_samples, config, tmp_path)
    with pytest.raises(ValueError, match="another run: learning_rate was 0.0001 and is 0.01, seed was 0 and is 3"):
        train(pipe, two_samples, dataclasses.replace(config, learning_rate=1e-2, seed=3), tmp_path)


def test_fp16_on_a_cpu_is_refused_and_leaves_other_precisions_open(pipe, two_samples, tmp_path):
    config = TrainingConfig(max_train_steps=1, batch_size=2, mixed_precision="fp16")
    with pytest.raises(ValueError, match='mixed_precision: got "fp16" on a CPU'):
        train(pipe, two_samples, config, tmp_path)
    train(pipe, two_samples, dataclasses.replace(config, mixed_precision="no"), tmp_path)


def test_a_pipeline_stored_in_half_precision_is_trained_in_float32(pipe, two_samples, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path / "half")
    loaded = train(loaded, two_samples, TrainingConfig(max_train_steps=1, batch_size=2), tmp_path)
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float32}
    assert loaded(**tiny.inputs()).images.shape == (1, 32, 32, 3)


def test_training_lowers_the_loss_and_leaves_the_text_encoder_alone(pipe, two_samples, tmp_path):
    embeds = pipe.encode_prompt("sample 0")[0]

    def mean_loss():
        from diffusers import DDPMScheduler

        from instructdiffusion_pipeline.training.loss import epsilon_loss

        generator = torch.Generator().manual_seed(5)
        batch = {name: tensor.repeat_interleave(32, 0).float() for name, tensor in two_samples.tensors.items()}
        with torch.no_grad():
            return epsilon_loss(
                pipe.unet,
                DDPMScheduler.from_config(pipe.scheduler.config),
                pipe.vae.config.scaling_factor * batch["target_mean"],
                batch["image_latents"],
                pipe.text_encoder(batch["input_ids"].long()).last_hidden_state,
                torch.randn(batch["target_mean"].shape, generator=generator),
                torch.randint(0, 1000, (64,), generator=generator),
            ).mean()

    before = mean_loss()
    config = TrainingConfig(max_train_steps=60, batch_size=8, learning_rate=1e-3, ema_decay=0.5)
    train(pipe, two_samples, config, tmp_path)
    assert mean_loss() < 0.8 * before
    assert torch.equal(embeds, pipe.encode_prompt("sample 0")[0])
