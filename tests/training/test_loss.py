"""The training step compared with two recorded steps of the original code."""

import json
from copy import deepcopy

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.training.data import tokenize
from instructdiffusion_pipeline.training.encoding import drop_conditioning
from instructdiffusion_pipeline.training.loss import denoising_loss, loss_weights

# The names in diffusers' UNet of the weights whose gradients were recorded.
GRADIENTS = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "time_embed.0.weight": "time_embedding.linear_1.weight",
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ),
    "output_blocks.7.0.in_layers.2.weight": "up_blocks.3.resnets.1.conv1.weight",
    "out.2.weight": "conv_out.weight",
}


@pytest.fixture(params=["step_a", "step_b"])
def step(request, golden):
    folder = golden / "training"
    return load_file(folder / f"{request.param}.safetensors"), json.loads(
        (folder / f"{request.param}.json").read_text()
    )


@pytest.fixture(scope="module")
def exact_pipe(golden_pipe):
    """The golden model in float64, because float32 is rounded in another way on each processor."""
    components = {name: deepcopy(getattr(golden_pipe, name)).double() for name in ("unet", "vae", "text_encoder")}
    return InstructDiffusionPipeline(**golden_pipe.components | components)


def golden_losses(pipe, tensors, about, **options):
    tensors = {
        name: tensor.to(pipe.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    tokenizer, scheduler = pipe.tokenizer, DDPMScheduler.from_config(pipe.scheduler.config)
    target_mean, target_logvar = tensors["target_posterior_parameters"].chunk(2, dim=1)
    latents = pipe.vae.config.scaling_factor * (
        target_mean + torch.exp(0.5 * target_logvar) * tensors["posterior_noise"]
    )
    input_ids, image_latents = drop_conditioning(
        torch.stack([tokenize(tokenizer, prompt) for prompt in about["prompts"]]),
        tensors["source_posterior_parameters"].chunk(2, dim=1)[0],
        tokenize(tokenizer, ""),
        tensors["dropout_random"],
    )
    prompt_embeds = pipe.text_encoder(input_ids).last_hidden_state
    return denoising_loss(
        pipe.unet, scheduler, latents, image_latents, prompt_embeds, tensors["noise"], tensors["t"], **options
    )


def test_loss_and_gradients_match_the_original_code(golden_pipe, exact_pipe, step):
    tensors, about = step
    exact, losses = (golden_losses(pipe, tensors, about) for pipe in (exact_pipe, golden_pipe))
    torch.testing.assert_close(exact, tensors["loss_per_sample"], atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.mean(), tensors["loss"][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses, exact, atol=1e-6, rtol=0)
    for theirs, ours in GRADIENTS.items():
        expected = tensors[f"grad.model.diffusion_model.{theirs}"]
        parameter = golden_pipe.unet.get_parameter(ours)
        (gradient,) = torch.autograd.grad(losses.mean(), parameter, retain_graph=True)
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), ours


def test_min_snr_weights_each_sample_by_its_clipped_snr(golden_pipe, step):
    tensors, about = step
    with torch.no_grad():
        plain = golden_losses(golden_pipe, tensors, about)
        weighted = golden_losses(golden_pipe, tensors, about, min_snr_gamma=5.0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, dim=0)[tensors["t"]]
    snr = signal / (1 - signal)
    torch.testing.assert_close(weighted, plain * (snr.clamp(max=5.0) / snr).float(), rtol=1e-4, atol=1e-7)


class Ideal(torch.nn.Module):
    """Predicts the exact velocity from the noisy latents and t, using the true `latents`."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents

    def forward(self, inputs, timesteps, prompt_embeds):
        noisy, _ = inputs.chunk(2, dim=1)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = torch.cumprod(1 - betas, dim=0)[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt().float(), (1 - signal).sqrt().float()
        epsilon = (noisy - alpha * self.latents) / sigma
        return UNet2DConditionOutput(alpha * epsilon - sigma * self.latents)


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
def test_the_velocity_loss_is_the_weighted_error_of_the_latents(min_snr_gamma):
    draw = torch.Generator().manual_seed(0)
    latents, image_latents, noise, wrong = torch.randn(4, 6, 4, 8, 8, generator=draw)
    timesteps = torch.tensor([20, 100, 300, 500, 800, 999])
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )

    def losses(believed):
        return denoising_loss(
            Ideal(believed), scheduler, latents, image_latents, None, noise, timesteps, min_snr_gamma
        )

    torch.testing.assert_close(losses(latents), torch.zeros(6), atol=1e-4, rtol=0)
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weights = snr + 1 if min_snr_gamma is None else snr.clamp(max=min_snr_gamma)
    errors = (wrong - latents).square().mean((1, 2, 3))
    torch.testing.assert_close(losses(wrong), weights * errors, atol=1e-4, rtol=1e-3)


def test_changed_latents_have_a_higher_weight_and_the_mean_weight_is_one():
    image = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    target = image.clone()
    target[0, :, 2:4, 5:7] += 1
    target[1] += 1
    weights = loss_weights(target, image, 10.0)
    assert weights.shape == (3, 1, 16, 16)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(3))
    changed = torch.zeros(16, 16, dtype=torch.bool)
    changed[2:4, 5:7] = True
    inside, outside = weights[0, 0][changed], weights[0, 0][~changed]
    torch.testing.assert_close(inside / outside[0], torch.full((4,), 10.0))
    assert (weights[1:] == 1).all(), "changed everywhere, or nowhere"


def test_loss_weights_multiply_the_squared_errors(exact_pipe, golden):
    tensors = load_file(golden / "training" / "step_a.safetensors")
    about = json.loads((golden / "training" / "step_a.json").read_text())
    left = torch.zeros_like(tensors["noise"][:, :1])
    left[..., : left.shape[-1] // 2] = 2
    halves = [golden_losses(exact_pipe, tensors, about, weights=weights) for weights in (left, 2 - left)]
    torch.testing.assert_close(sum(halves) / 2, tensors["loss_per_sample"], atol=1e-6, rtol=0)
    assert not torch.allclose(*halves)
