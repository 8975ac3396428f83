"""A pipeline and its scheduler have the state of one call, so a second call at the same time raises an error."""

import copy
import threading

import numpy as np
import pytest
import tiny
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from peft import LoraConfig

from instructdiffusion_pipeline import InstructDiffusionPipeline


def sibling(pipe: InstructDiffusionPipeline) -> InstructDiffusionPipeline:
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = InstructDiffusionPipeline.from_pipe(pipe, scheduler=scheduler)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_call_in_its_own_callback_raises_and_later_calls_work(pipe):
    expected = pipe(**tiny.inputs()).images

    def callback(pipeline, step, timestep, tensors):
        pipeline(**tiny.inputs())

    with pytest.raises(RuntimeError, match="already running"):
        pipe(**tiny.inputs(callback_on_step_end=callback))
    assert np.array_equal(pipe(**tiny.inputs()).images, expected)


def test_concurrent_calls_with_one_scheduler_raise_an_error(pipe):
    other = InstructDiffusionPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="its scheduler is already running"):
        pipe(**tiny.inputs(callback_on_step_end=lambda *_: other(**tiny.inputs()) and {}))


def test_concurrent_calls_with_separate_schedulers_work(pipe):
    expected, other, found = pipe(**tiny.inputs()).images, sibling(pipe), []

    def callback(pipeline, step, timestep, tensors):
        found.append(other(**tiny.inputs()).images)

    assert np.array_equal(pipe(**tiny.inputs(callback_on_step_end=callback)).images, expected)
    assert len(found) == 2 and all(np.array_equal(images, expected) for images in found)


def test_a_second_pipeline_leaves_the_precision_of_each_model(pipe):
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.float16)
    for other in (sibling(pipe), InstructDiffusionPipeline.from_pipe(pipe, dtype=None)):
        assert type(other) is InstructDiffusionPipeline and other.unet is pipe.unet
        dtypes = [model.dtype for model in (other.unet, other.text_encoder, other.vae)]
        assert dtypes == [torch.bfloat16, torch.float16, torch.float32]
    assert InstructDiffusionPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def lora_scale(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return {"cross_attention_kwargs": {"scale": 0.5}}


def attention_broadcast(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    return {}


@pytest.mark.parametrize("change", [lora_scale, attention_broadcast])
@pytest.mark.parametrize("changing_call", ["first", "second"])
def test_concurrent_calls_of_a_unet_that_one_of_them_changes_raise_an_error(pipe, change, changing_call):
    settings, other = change(pipe), sibling(pipe)
    first, second = (settings, {}) if changing_call == "first" else ({}, settings)

    def callback(pipeline, step, timestep, tensors):
        other(**tiny.inputs(**second))

    with pytest.raises(RuntimeError, match="`unet` or `text_encoder` is already running in another call"):
        pipe(**tiny.inputs(callback_on_step_end=callback, **first))
    expected = pipe(**tiny.inputs(**settings)).images
    if change is lora_scale:  # the cache asks `pipe` for the current timestep
        assert np.array_equal(other(**tiny.inputs(**settings)).images, expected), "one after the other they work"
        other.unet = copy.deepcopy(pipe.unet)
        pipe(**tiny.inputs(callback_on_step_end=callback, **first))


@pytest.mark.parametrize("settings", [{"scale": 1.0}, {"ip_adapter_masks": None}])
def test_attention_arguments_that_change_no_model_allow_concurrent_calls(pipe, settings):
    lora_scale(pipe)
    other, found = sibling(pipe), []

    def callback(pipeline, step, timestep, tensors):
        found.append(other(**tiny.inputs()).images)
        return {}

    pipe(**tiny.inputs(callback_on_step_end=callback, cross_attention_kwargs=settings))
    assert len(found) == 2


def test_a_scale_of_the_text_encoder_excludes_concurrent_calls_too(pipe):
    """With a UNet of its own, the second pipeline shares the scaled layers of the text encoder."""
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    other = sibling(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    settings = {"cross_attention_kwargs": {"scale": 0.5}, "callback_on_step_end": lambda *_: other(**tiny.inputs())}
    with pytest.raises(RuntimeError, match="`unet` or `text_encoder` is already running"):
        pipe(**tiny.inputs(**settings))


def test_layerwise_casting_allows_concurrent_calls(pipe):
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    other = sibling(pipe)
    pipe(**tiny.inputs(callback_on_step_end=lambda *_: other(**tiny.inputs()) and {}))


def test_calls_in_threads_return_the_exact_image_or_raise_an_error(pipe):
    expected, wrong, refused = pipe(**tiny.inputs()).images, [], []

    def call() -> None:
        for _ in range(10):
            try:
                if not np.array_equal(pipe(**tiny.inputs()).images, expected):
                    wrong.append(1)
            except RuntimeError:
                refused.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and refused and len(refused) < 40
