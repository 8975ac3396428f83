"""The inputs of the model and the updates of the weights, compared with an independent computation."""

import dataclasses
import math

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from pairs import Pairs, mixture

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, train
from instructdiffusion_pipeline.training.encoding import draw_step_noise
from instructdiffusion_pipeline.training.loss import denoising_loss
from instructdiffusion_pipeline.training.model import Denoiser

CONFIG = TrainingConfig(max_train_steps=1, batch_size=16, learning_rate=1e-3, ema_decay=0, seed=3)


def expected_inputs(pipe, samples, config):
    """Latents, image latents, embeddings, noise and timesteps of the first batch, computed independently."""
    draws = draw_step_noise(config.seed, range(config.batch_size), torch.Size([4, 16, 16]), 1000)
    rows = [samples.mixture[position] for position in range(config.batch_size)]
    with torch.no_grad():
        images, targets = (
            pipe.vae.encode(pipe.image_processor.preprocess([getattr(row, side) for row in rows])).latent_dist
            for side in ("image", "target")
        )
        latents = pipe.vae.config.scaling_factor * (targets.mean + targets.std * draws.posterior_noise)
        no_text, no_image = draws.random_p < 0.075, (draws.random_p >= 0.075) & (draws.random_p < 0.15)
        words = ["" if empty else row.instruction for row, empty in zip(rows, no_text, strict=True)]
        text = pipe.encode_prompt(words)[0]
    image_latents = images.mode() * ~no_image[:, None, None, None]
    assert no_text.any() and no_image.any(), "another seed: this batch drops nothing"
    return latents, image_latents, text, draws.noise, draws.timesteps


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
def test_the_first_update_matches_an_independent_computation(pipe, tmp_path, monkeypatch, min_snr_gamma):
    samples, seen = ImageDataset(mixture(), pipe.tokenizer), []
    config = dataclasses.replace(CONFIG, min_snr_gamma=min_snr_gamma, max_grad_norm=0.5)
    forward = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda self, *args: seen.append(args) or forward(self, *args))
    other = InstructDiffusionPipeline(**tiny.components())
    expected = expected_inputs(other, samples, config)
    train(pipe, samples, config, tmp_path)
    (_, *inputs, gamma, weights), *rest = seen
    assert not rest and gamma == min_snr_gamma and weights is None
    for found, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    # One step of plain AdamW on the clipped gradient.
    unet = other.unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=0.01)
    latents, image_latents, text, noise, timesteps = expected
    scheduler = DDPMScheduler.from_config(other.scheduler.config)
    denoising_loss(unet, scheduler, latents, image_latents, text, noise, timesteps, min_snr_gamma).mean().backward()
    assert torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5) > 0.5
    optimizer.step()
    # Adam's first step has an arbitrary sign if the gradient is nearly zero, as for a few weights of each tensor.
    for (name, found), wanted in zip(pipe.unet.named_parameters(), unet.parameters(), strict=True):
        close = torch.isclose(found, wanted, atol=2e-5, rtol=0).float().mean()
        assert close > 0.9 or wanted.grad.abs().max() < 1e-6, (name, close)


def learning_rates(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "instructdiffusion"))
    events.Reload()
    return [event.value for event in events.Scalars("learning rate")]


def test_the_schedule_counts_updates(pipe, tmp_path):
    samples = ImageDataset(mixture(), pipe.tokenizer)
    config = dataclasses.replace(
        CONFIG, max_train_steps=6, batch_size=1, gradient_accumulation_steps=2, lr_scheduler="cosine",
        lr_warmup_steps=2, logging_steps=1, report_to="tensorboard",
    )  # fmt: skip
    train(pipe, samples, config, tmp_path)
    after = [0.5, 1] + [0.5 * (1 + math.cos(math.pi * done / 4)) for done in (1, 2, 3, 4)]
    assert learning_rates(tmp_path) == pytest.approx([1e-3 * share for share in after], abs=1e-9)


def test_a_resumed_run_may_split_its_updates_into_other_batches(tmp_path):
    def run(folder, resume=None, **changes):
        pipe = InstructDiffusionPipeline(**tiny.components())
        config = TrainingConfig(
            max_train_steps=4, batch_size=4, learning_rate=1e-3, lr_scheduler="cosine", ema_decay=0.5,
            checkpointing_steps=1, checkpoints_total_limit=9,
        )  # fmt: skip
        config = dataclasses.replace(config, **changes)
        samples = ImageDataset(mixture(), pipe.tokenizer)
        return train(pipe, samples, config, folder, resume).unet.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts")
    for late in (2, 3, 4):
        (tmp_path / "parts" / f"checkpoint-{late}").rename(tmp_path / f"checkpoint-{late}-moved")
    again = run(tmp_path / "parts", "latest", batch_size=2, gradient_accumulation_steps=2)
    assert max((whole[name] - again[name]).abs().max() for name in whole) < 1e-5
    with pytest.raises(
        ValueError, match="must be the newest checkpoint in .*checkpoint-4; got .*checkpoint-3. To resume"
    ):
        run(tmp_path / "parts", tmp_path / "parts" / "checkpoint-3")


def test_a_changed_dataset_of_the_same_size_is_another_run(pipe, tmp_path):
    def samples(first):
        return ImageDataset(
            Mixture([(Source("same name", Pairs(3, first), Editing.from_annotation), 1)]), pipe.tokenizer
        )

    config = dataclasses.replace(CONFIG, batch_size=1)
    train(pipe, samples(0), config, tmp_path)
    with pytest.raises(ValueError, match="another run: content was"):
        train(pipe, samples(3), config, tmp_path, resume="latest")
