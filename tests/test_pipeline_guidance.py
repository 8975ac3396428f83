"""Guidance: the weights, the branches that run, and that omitting branches does not change the output."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from hypothesis import given
from hypothesis import strategies as st

from instructdiffusion_pipeline import Guidance, InstructDiffusionPipeline

scales = st.floats(-20, 20).map(lambda scale: round(scale, 3))
BRANCHES = [((5.0, 1.25), 3), ((6.0, 0.5), 2), ((0.5, 1.5), 2), ((0.5, 0.5), 1)]


@given(scales, scales)
def test_weights_sum_to_one(text: float, image: float) -> None:
    assert sum(Guidance.from_scales(text, image)) == pytest.approx(1)


@given(scales, scales, st.integers(0, 2**32 - 1))
def test_the_combination_matches_the_formula_of_the_paper(text: float, image: float, seed: int) -> None:
    predictions = torch.randn(3, 1, 4, 2, 2, generator=tiny.generator(seed), dtype=torch.float64)
    both, no_text, no_image = predictions
    expected = (no_text + no_image) / 2 + text * (both - no_text) + image * (both - no_image)
    guidance = Guidance.from_scales(text, image)
    running = [dict(zip(guidance._fields, predictions, strict=True))[name] for name in guidance.branches]
    assert torch.allclose(guidance.combine(torch.cat(running)), expected, atol=1e-9)


def test_scales_of_one_half_disable_guidance() -> None:
    assert Guidance.from_scales(0.5, 0.5) == (1, 0, 0)


def unet_batches(pipe: InstructDiffusionPipeline) -> list[int]:
    """A list that gets the batch size of each call of the UNet."""
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


@pytest.mark.parametrize(("scales", "branches"), BRANCHES)
@pytest.mark.parametrize("samples", [1, 2])
def test_branches_of_zero_weight_do_not_run(
    pipe: InstructDiffusionPipeline, scales: tuple[float, float], branches: int, samples: int
) -> None:
    batches = unet_batches(pipe)
    pipe(**tiny.inputs(guidance_scale=scales[0], image_guidance_scale=scales[1], num_images_per_prompt=samples))
    assert batches == [branches * samples] * 2


def test_callbacks_can_change_the_scales(pipe: InstructDiffusionPipeline) -> None:
    batches = unet_batches(pipe)
    schedule = iter([(6.0, 0.5), (0.5, 0.5), (5.0, 1.25), (1.0, 1.0)])

    def change(pipe: InstructDiffusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        pipe._guidance_scale, pipe._image_guidance_scale = next(schedule)
        return tensors

    pipe(**tiny.inputs(num_inference_steps=4, callback_on_step_end=change))
    assert batches == [3, 2, 1, 3]
    assert (pipe.guidance_scale, pipe.image_guidance_scale) == (1.0, 1.0)
    pipe(**tiny.inputs(num_inference_steps=1))
    assert batches[4:] == [3]  # The next call starts with its own scales.


@pytest.mark.parametrize("prompts", [["tint the cat blue"], ["tint the cat blue", "make it winter", "remove it"]])
@pytest.mark.parametrize("several", [False, True])
def test_the_cutoff_callback_of_diffusers_ends_guidance(
    pipe: InstructDiffusionPipeline, prompts: list[str], several: bool
) -> None:
    """After the cutoff one branch runs, with each sample's own prompt, as with a custom callback."""
    batches = unet_batches(pipe)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    call = {"prompt": prompts, "num_inference_steps": 3}
    ended = pipe(
        **tiny.inputs(**call, callback_on_step_end=MultiPipelineCallbacks([callback]) if several else callback)
    ).images
    assert batches == [3 * len(prompts), len(prompts), len(prompts)]
    assert not pipe.do_classifier_free_guidance

    def end(pipeline: InstructDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> None:
        pipeline._guidance_scale = pipeline._image_guidance_scale = 0.5

    assert np.array_equal(pipe(**tiny.inputs(**call, callback_on_step_end=end)).images, ended)


@pytest.mark.parametrize(("scales", "branches"), BRANCHES)
def test_omitting_branches_does_not_change_the_output(
    pipe: InstructDiffusionPipeline, scales: tuple[float, float], branches: int
) -> None:
    """Compared with slightly different scales, for which all three branches run."""
    with_elision = pipe(**tiny.inputs(guidance_scale=scales[0], image_guidance_scale=scales[1])).images
    batches = unet_batches(pipe)
    text, image = (scale + 1e-9 if scale == 0.5 else scale for scale in scales)
    without = pipe(**tiny.inputs(guidance_scale=text, image_guidance_scale=image)).images
    assert batches == [3, 3]
    assert abs(with_elision - without).max() <= 1e-5


@pytest.mark.parametrize("small", [(1.0, 1.0), (0.9, 0.2), (0.0, 0.0), (-1.0, 0.5)])
def test_scales_below_one_guide(pipe: InstructDiffusionPipeline, small: tuple[float, float]) -> None:
    plain = pipe(**tiny.inputs(guidance_scale=0.5, image_guidance_scale=0.5)).images
    guided = pipe(**tiny.inputs(guidance_scale=small[0], image_guidance_scale=small[1])).images
    assert abs(plain - guided).max() > 1e-4


def test_inputs_of_each_branch(pipe: InstructDiffusionPipeline) -> None:
    calls: list[tuple] = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe(**tiny.inputs(negative_prompt="a dog"))
    (sample, _), conditions = calls[0]
    text, negative = pipe.encode_prompt("tint the cat blue", negative_prompt="a dog")
    assert torch.equal(conditions["encoder_hidden_states"], torch.cat([text, negative, text]))
    noisy, image = sample[:, :4], sample[:, 4:]
    assert torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy[0], noisy[2])
    assert torch.equal(image[0], image[1])
    assert image[0].abs().max() > 0
    assert image[2].abs().max() == 0
