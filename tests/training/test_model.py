"""Loading a model to train: InstructDiffusion, and Stable Diffusion with input channels added."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.training import TrainingConfig, expand_conv_in, load_for_training
from instructdiffusion_pipeline.training.loop import gather_unet
from instructdiffusion_pipeline.training.model import Denoiser


def four_channels(**changes):
    torch.manual_seed(1)
    config = dict(tiny.components()["unet"].config) | {"in_channels": 4} | changes
    return UNet2DConditionModel.from_config(config).eval()


def answers(dtype, size, seed=0):
    """Outputs of a UNet with 4 input channels, and of the expanded one, for the same noisy latents."""
    unet = four_channels().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    noisy, image = torch.randn(2, 3, 4, size, size, generator=generator).to(dtype)
    inputs = torch.tensor([5, 500, 999]), torch.randn(3, 77, 32, generator=generator).to(dtype)
    with torch.no_grad():
        narrow = unet(noisy, *inputs).sample
        return narrow, expand_conv_in(unet)(torch.cat([noisy, image], dim=1), *inputs).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_an_expanded_unet_returns_the_same_output(dtype, size):
    narrow, wide = answers(dtype, size)
    assert torch.equal(narrow, wide)


def test_expanding_copies_the_bias_and_sets_the_new_weights_to_zero():
    unet = four_channels()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    wide = expand_conv_in(unet)
    after = wide.state_dict()
    assert wide.config.in_channels == 8
    assert torch.equal(after["conv_in.weight"][:, :4], before.pop("conv_in.weight"))
    assert not after["conv_in.weight"][:, 4:].any()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert expand_conv_in(wide) is wide
    with pytest.raises(ValueError, match="4 input channels .* or 8 .* got 9"):
        expand_conv_in(four_channels(in_channels=9))


def test_the_new_channels_are_trained():
    unet = expand_conv_in(four_channels()).requires_grad_(True)
    unet(torch.randn(1, 8, 16, 16), 10, torch.randn(1, 77, 32)).sample.square().mean().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().max() > 0


def test_training_starts_from_a_stable_diffusion_folder(tmp_path):
    parts = tiny.components() | {"unet": four_channels(), "scheduler": DDIMScheduler(beta_schedule="scaled_linear")}
    StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(tmp_path / "sd")
    pipe = load_for_training(tmp_path / "sd")
    assert isinstance(pipe, InstructDiffusionPipeline) and pipe.unet.config.in_channels == 8
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert pipe.scheduler.config.timestep_spacing == "linspace"
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(
        score_calibration={"segmentation": [2, 1]}, task_settings={"editing": {"ensemble_size": 2}}
    )
    pipe.save_pretrained(tmp_path / "wide")
    again = load_for_training(tmp_path / "wide")
    again.set_progress_bar_config(disable=True)
    assert not again.config.score_calibration, "it is for the weights before training"
    assert again.config.task_settings == pipe.config.task_settings
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "tuned")
    assert isinstance(load_for_training(tmp_path / "tuned").scheduler, DDIMScheduler), "the settings are for it"
    pipe.scheduler = again.scheduler
    first, second = (one(**tiny.inputs()).images for one in (pipe, again))
    assert first.shape == (1, 32, 32, 3) and (first == second).all()


def test_half_precision_models_are_loaded_in_float32(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    loaded = load_for_training(tmp_path / "half")
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}


def test_a_sharded_unet_is_gathered(pipe):
    """The weights at the end of FSDP, which are not sharded here, because accelerate does not shard on a CPU."""
    denoiser = Denoiser(pipe, TrainingConfig(max_train_steps=1))
    whole = gather_unet(Accelerator(), denoiser, pipe.unet)
    ours, theirs = whole.state_dict(), pipe.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
