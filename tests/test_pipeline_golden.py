"""The pipeline compared with the original code: the same seed gives the same image.

The original code ran on a CPU in float32; its final latents in float64 differ by up to 2.1e-4.

Largest differences over all cases: noise levels 5.0e-5, predictions 2.6e-5, final latents 5.6e-4 (values reach 30),
images one gray level in 0.13 % of the values. Heun, with diffusers' own scheduler: noise levels 3.8e-6, predictions
4.1e-6, final latents 9.4e-5, one gray level in 0.012 % of the values; so it needs no separate tolerances.
"""

import json
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from safetensors.torch import load_file

from instructdiffusion_pipeline import InstructDiffusionPipeline

CASES = [
    "cli_128x128_s10",
    "cli_150x100_s20",
    "cli_100x150_gray_s20",
    "cli_97x130_rgba_s10",
    "cli_200x90_longprompt_s10",
    "cli_ema_128x128_s10",
    "app_euler_150x100_s10",
    "app_stochastic8_128x128_s20",
    "app_heun_128x128_s10",
]
SIGMAS, EPS, FINAL_LATENT, GREY_LEVELS = 7e-5, 3e-5, 1e-3, 1


class Run:
    """A golden case, run by the pipeline: inputs and outputs of the UNet, latents, and image."""

    def __init__(self, folder: Path, pipe: InstructDiffusionPipeline):
        self.meta = json.loads((folder / "meta.json").read_text())
        self.golden = load_file(folder / "tensors.safetensors")
        self.golden_picture = PIL.Image.open(folder / "output.png")
        if self.meta["sampler"] == "sample_heun":
            pipe = InstructDiffusionPipeline(**pipe.components)
            pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.unet = pipe.unet
        self.calls: list[tuple] = []
        self.latents: list[torch.Tensor] = []
        hook = self.unet.register_forward_hook(lambda *call: self.calls.append(call[1:]), with_kwargs=True)
        # The demo app resizes images to another size than the command line, and does not fit them back.
        from_command_line = self.meta["resize_back"]
        steps, skipped = self.meta["steps"], self.meta.get("stochastic_steps", 0)
        image = PIL.Image.open(folder / ("input.png" if from_command_line else "model_input.png"))
        resolution = self.meta["resolution"] if from_command_line else 0
        pixels, _ = pipe.preprocess_image(image, resolution, "crop")
        with torch.no_grad():
            self.exact_image_latents = deepcopy(pipe.vae).double().encode(pixels.double()).latent_dist.mode()
        self.picture = pipe(
            self.meta["prompt"],
            image,
            num_inference_steps=steps,
            guidance_scale=self.meta["cfg_text"],
            image_guidance_scale=self.meta["cfg_image"],
            resolution=resolution,
            strength=(steps - skipped) / steps,
            generator=torch.Generator("cpu").manual_seed(self.meta["seed"]),
            callback_on_step_end=self.watch,
            callback_on_step_end_tensor_inputs=["latents", "image_latents", "prompt_embeds", "negative_prompt_embeds"],
        ).images[0]
        hook.remove()
        self.sigmas = pipe.scheduler.sigmas[skipped:]
        if self.meta["sampler"] == "sample_heun":
            self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1::2]])  # diffusers has each of the others twice

    def watch(self, pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.latents.append(tensors["latents"])
        self.conditions = tensors
        return {}


@pytest.fixture(scope="module", params=CASES)
def run(
    request: pytest.FixtureRequest,
    golden: Path,
    golden_pipe: InstructDiffusionPipeline,
    golden_ema_pipe: InstructDiffusionPipeline,
) -> Run:
    if request.param == "cli_97x130_rgba_s10" and version("pillow") < "13":
        pytest.skip("Pillow before 13 enlarges an image of 97 x 130 pixels in another way")
    pipe = golden_ema_pipe if "ema" in request.param else golden_pipe
    return Run(golden / "inference" / request.param, pipe)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_noise_levels(run: Run) -> None:
    assert distance(run.sigmas, run.golden["sigmas"]) <= SIGMAS


def test_conditions(run: Run) -> None:
    assert distance(run.conditions["prompt_embeds"], run.golden["prompt_embeds"]) <= 1e-5
    assert distance(run.conditions["negative_prompt_embeds"], run.golden["null_embeds"]) <= 1e-5
    # Compared in float64, because float32 is rounded in another way on each processor: by 1.2e-5 on an AMD EPYC.
    assert distance(run.exact_image_latents, run.golden["image_latents"]) <= 1e-5
    assert distance(run.exact_image_latents, run.conditions["image_latents"]) <= 2e-5


def test_initial_latents(run: Run) -> None:
    (sample, _), _, _ = run.calls[0]
    noisy, sigma = run.golden["first.x"], run.golden["sigmas"][0]
    assert distance(sample[:1, :4] * (sigma**2 + 1) ** 0.5, noisy) <= 1e-4


@pytest.mark.parametrize("call", ["first", "last"])
def test_predictions_of_each_branch(run: Run, call: str) -> None:
    """The predictions at the original code's latents, with the conditions of the pipeline. The order is the same."""
    (sample, timestep), conditions, _ = run.calls[0 if call == "first" else -1]
    branches = len(sample)
    assert branches == (2 if run.meta["cfg_image"] == 0.5 else 3)
    assert distance(timestep.expand(3), run.golden[f"{call}.t"]) <= 1e-3
    noisy = run.golden[f"{call}.x"] / (run.golden[f"{call}.sigma"] ** 2 + 1) ** 0.5
    with torch.no_grad():
        predictions = run.unet(
            torch.cat([noisy.expand(branches, -1, -1, -1), sample[:, 4:]], 1), timestep, **conditions
        )
    assert distance(predictions[0], run.golden[f"{call}.eps"][:branches]) <= EPS


def test_final_latents(run: Run) -> None:
    assert distance(run.latents[-1], run.golden["final_latent"]) <= FINAL_LATENT


def test_output_image(run: Run) -> None:
    assert run.picture.size == run.golden_picture.size
    ours, theirs = (np.asarray(picture).astype(int) for picture in (run.picture, run.golden_picture))
    assert np.abs(ours - theirs).max() <= GREY_LEVELS
