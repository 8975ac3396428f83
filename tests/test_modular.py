"""The blocks return exactly the images of the pipeline, each can run alone, and guiders can be exchanged."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    ModularPipeline,
    ModularPipelineBlocks,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import FasterCacheConfig, LayerSkipConfig, apply_faster_cache
from diffusers.modular_pipelines.modular_pipeline import BlockState
from hypothesis import given
from hypothesis import strategies as st

from instructdiffusion_pipeline import (
    Editing,
    Guidance,
    InstructDiffusionBlocks,
    InstructDiffusionGuidance,
    InstructDiffusionPipeline,
    Keypoints,
    Restoration,
    Segmentation,
    export,
)
from instructdiffusion_pipeline.modular_instruct_diffusion import (
    InstructDiffusionDenoiseStep,
    InstructDiffusionInputStep,
    InstructDiffusionPrepareLatentsStep,
    InstructDiffusionSetTimestepsStep,
    InstructDiffusionTextEncoderStep,
    InstructDiffusionVaeDecoderStep,
    InstructDiffusionVaeEncoderStep,
)

SCALES = {1: (0.5, 0.5), 2: (6.0, 0.5), 3: (5.0, 1.25)}
TASKS = [
    Segmentation({"cat": "blue"}),
    Keypoints({"left wrist": "red", "nose": "blue"}),
    Restoration("noise"),
    Editing("make it winter"),
]


def modular(
    pipe: InstructDiffusionPipeline, blocks: ModularPipelineBlocks | None = None, **scales: float
) -> ModularPipeline:
    """A modular pipeline with the components of `pipe`."""
    made = (blocks or InstructDiffusionBlocks()).init_pipeline()
    made.update_components(**{name: pipe.components[name] for name in made.component_names if name != "guider"})
    if scales:
        made.update_components(guider=InstructDiffusionGuidance(**scales))
    made.set_progress_bar_config(disable=True)
    return made


def named(scales: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("guidance_scale", "image_guidance_scale"), scales, strict=True))


# --- equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.family)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("branches", SCALES)
def test_the_blocks_return_the_image_of_the_pipeline(
    pipe: InstructDiffusionPipeline, task: Any, samples: int, branches: int
) -> None:
    prompts, images = [task.instruction(), "a dog"], [tiny.picture(seed=1), tiny.picture(seed=2)]
    generators = [tiny.generator(seed) for seed in range(2 * samples)]
    call = {"prompt": prompts[:samples], "image": images[:samples], "num_images_per_prompt": 2}
    expected = pipe(**tiny.inputs(**call, generator=generators, **named(SCALES[branches]))).images
    blocks = modular(pipe, **named(SCALES[branches]))
    generators = [tiny.generator(seed) for seed in range(2 * samples)]
    assert np.array_equal(blocks(**tiny.inputs(**call, generator=generators), output="images"), expected)
    generators = [tiny.generator(seed) for seed in range(4 * samples)]
    ensembles = {**call, "num_images_per_prompt": 4, "ensemble_size": 2}
    expected = pipe(**tiny.inputs(**ensembles, generator=generators, **named(SCALES[branches]))).images
    generators = [tiny.generator(seed) for seed in range(4 * samples)]
    assert np.array_equal(blocks(**tiny.inputs(**ensembles, generator=generators), output="images"), expected)
    assert blocks.guider.num_conditions == branches
    settings = task.settings
    scales = {name: settings[name] for name in ("guidance_scale", "image_guidance_scale")}
    blocks.update_components(guider=blocks.guider.new(**scales))
    expected = pipe(**tiny.inputs(prompt=task.instruction(), **scales)).images
    assert np.array_equal(blocks(**tiny.inputs(prompt=task.instruction()), output="images"), expected)


@pytest.mark.parametrize(
    "call",
    [
        {"negative_prompt": "fog", "clip_skip": 1},
        {"strength": 0.5, "num_inference_steps": 4},
        {"output_type": "pil", "image": tiny.picture(51, 32), "resolution": 64, "resize_mode": "stretch"},
        {"output_type": "pil", "image": tiny.picture(70, 40), "resolution": None},
        {"output_type": "pt", "latents": torch.randn(1, 4, 16, 16, generator=tiny.generator(3))},
        {"image": torch.randn(1, 4, 16, 16, generator=tiny.generator(4))},
        {"prompt": ["a cat", "a dog"]},
        {"image": [tiny.picture(seed=1), tiny.picture(seed=2)], "negative_prompt": ["fog", "rain"]},
    ],
    ids=lambda call: "-".join(call),
)
def test_all_arguments_work_as_in_the_pipeline(pipe: InstructDiffusionPipeline, call: dict) -> None:
    expected = pipe(**tiny.inputs(**call)).images
    found = modular(pipe)(**tiny.inputs(**call), output="images")
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("kind", [DDIMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_all_schedulers_work_as_in_the_pipeline(pipe: InstructDiffusionPipeline, kind: type) -> None:
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 4, "strength": 0.75, "eta": 0.5}
    expected = pipe(**tiny.inputs(**call)).images
    assert np.array_equal(modular(pipe)(**tiny.inputs(**call), output="images"), expected)


def test_half_precision_works_as_in_the_pipeline(pipe: InstructDiffusionPipeline) -> None:
    pipe.to(torch.bfloat16)
    expected = pipe(**tiny.inputs()).images
    assert np.array_equal(modular(pipe)(**tiny.inputs(), output="images"), expected)


def test_the_defaults_are_the_settings_of_the_model_for_editing(pipe: InstructDiffusionPipeline) -> None:
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    pipe.register_to_config(task_settings={"editing": settings})
    blocks = modular(pipe)
    blocks.update_components(task_settings={"editing": settings})
    call = {"num_inference_steps": None}
    expected = pipe(**tiny.inputs(**call)).images
    assert np.array_equal(blocks(**tiny.inputs(**call), output="images"), expected)
    assert blocks.guider.guidance == Guidance.from_scales(2.0, 1.25)


@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_the_safety_checker_runs(pipe: InstructDiffusionPipeline, threshold: float) -> None:
    checked = InstructDiffusionPipeline(**pipe.components | tiny.safety_checker(threshold))
    state = modular(checked)(**tiny.inputs())
    assert state.get("nsfw_content_detected") == [threshold == -1.0]
    assert np.array_equal(state.get("images"), checked(**tiny.inputs()).images)


@pytest.mark.parametrize("write", [InstructDiffusionPipeline.save_pretrained, export])
def test_a_folder_loads_without_trust_remote_code(
    pipe: InstructDiffusionPipeline, tmp_path: Path, write: Callable
) -> None:
    editing = {"num_inference_steps": 3, "guidance_scale": 2.0, "ensemble_size": 2}
    pipe.register_to_config(task_settings={"editing": editing})
    write(pipe, tmp_path / "model")
    blocks = InstructDiffusionBlocks().init_pipeline(str(tmp_path / "model"))
    blocks.load_components()
    assert blocks.null_component_names == ["safety_checker", "feature_extractor"]
    call = tiny.inputs(num_inference_steps=None)
    expected = pipe(**call).images
    assert np.array_equal(blocks(**call | {"generator": tiny.generator()}, output="images"), expected)


def test_saved_blocks_can_be_loaded(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    blocks = modular(pipe, guidance_scale=2.0, image_guidance_scale=1.0)
    blocks.save_pretrained(str(tmp_path))
    loaded = InstructDiffusionBlocks().init_pipeline(str(tmp_path))
    loaded.load_components()
    loaded.update_components(guider=blocks.guider)
    assert np.array_equal(loaded(**tiny.inputs(), output="images"), blocks(**tiny.inputs(), output="images"))


# --- each block alone -----------------------------------------------------------------------------------------------


def test_each_block_runs_alone_with_its_own_components(pipe: InstructDiffusionPipeline) -> None:
    """The outputs of each block are the inputs of the next one, which has a separate pipeline."""
    expected = pipe(**tiny.inputs(num_images_per_prompt=2, ensemble_size=2)).images
    steps = [
        (InstructDiffusionTextEncoderStep(), {"text_encoder", "tokenizer"}),
        (InstructDiffusionVaeEncoderStep(), {"vae"}),
        (InstructDiffusionInputStep(), set()),
        (InstructDiffusionSetTimestepsStep(), {"scheduler"}),
        (InstructDiffusionPrepareLatentsStep(), {"scheduler"}),
        (InstructDiffusionDenoiseStep(), {"guider", "unet", "scheduler"}),
        (InstructDiffusionVaeDecoderStep(), {"vae", "safety_checker", "feature_extractor"}),
    ]
    known = tiny.inputs(num_images_per_prompt=2, ensemble_size=2)
    for block, components in steps:
        alone = modular(pipe, block)
        assert set(alone.component_names) == components
        given = {name: known[name] for name in block.input_names if name in known}
        found = alone(**given, output=block.output_names)
        assert found.keys() == {output.name for output in block.intermediate_outputs}
        known |= found
    assert np.array_equal(known["images"], expected)


def test_the_denoising_loop_stores_its_latents(pipe: InstructDiffusionPipeline) -> None:
    state = modular(pipe)(**tiny.inputs())
    latent = pipe(**tiny.inputs(output_type="latent")).images
    assert torch.equal(state.get("latents"), latent)
    alone = modular(pipe, InstructDiffusionVaeDecoderStep())
    assert np.array_equal(alone(latents=latent, output_type="np", output="images"), state.get("images"))
    # A single block does not use the model's default for editing: it does not know how many images an output has.
    alone.update_components(task_settings={"editing": {"ensemble_size": 2}})
    two = torch.cat([latent, latent.flip(-1)])
    assert len(alone(latents=two, output_type="np", output="images")) == 2
    assert len(alone(latents=two, output_type="np", ensemble_size=2, output="images")) == 1
    with pytest.raises(
        ValueError, match="`latents` must be a tensor whose first dimension is a multiple of .* size 2"
    ):
        alone(latents=latent, ensemble_size=2)
    # Without the sizes of the inputs, PIL images have the working size.
    assert alone(latents=latent, output="images")[0].size == (32, 32)


def test_a_block_can_be_omitted(pipe: InstructDiffusionPipeline) -> None:
    blocks = InstructDiffusionBlocks()
    blocks.sub_blocks.pop("text_encoder")
    assert {"prompt_embeds", "negative_prompt_embeds"} <= set(blocks.required_inputs)
    without_text = modular(pipe, blocks)
    assert "text_encoder" not in without_text.component_names
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a cat"), strict=True))
    call = tiny.inputs()
    del call["prompt"]
    expected = pipe(**tiny.inputs(prompt="a cat")).images
    assert np.array_equal(without_text(**call, **embeds, output="images"), expected)


def test_the_vae_encoder_alone_needs_a_resolution(pipe: InstructDiffusionPipeline) -> None:
    alone = modular(pipe, InstructDiffusionVaeEncoderStep())
    with pytest.raises(ValueError, match="`resolution` must be given, because there is no `unet`"):
        alone(image=tiny.picture())
    with pytest.raises(ValueError, match='`resize_mode` must be "crop" and .* because there is no `unet`'):
        alone(image=tiny.picture(), resolution=32, resize_mode="stretch")
    assert alone(image=tiny.picture(), resolution=64, output="image_latents").shape == (1, 4, 32, 32)


# --- guiders --------------------------------------------------------------------------------------------------------


@given(st.floats(-20, 20), st.floats(-20, 20), st.integers(0, 2**32 - 1))
def test_the_guider_follows_the_formula_of_the_paper(text: float, image: float, seed: int) -> None:
    guider = GUIDER.new(guidance_scale=text, image_guidance_scale=image)
    both, no_text, no_image = torch.randn(3, 1, 4, 2, 2, generator=tiny.generator(seed), dtype=torch.float64)
    data = {"latents": (both, no_text, no_image)}
    state = BlockState(both=both, no_text=no_text, no_image=no_image)
    batches = guider.prepare_inputs(data)
    names = guider.prepare_inputs_from_block_state(state, {"latents": ("both", "no_text", "no_image")})
    assert len(batches) == len(names) == guider.num_conditions
    for batch, other in zip(batches, names, strict=True):
        assert batch.latents is other.latents
        batch.noise_pred = batch.latents
    expected = (no_text + no_image) / 2 + text * (both - no_text) + image * (both - no_image)
    assert torch.allclose(guider(batches).pred, expected, atol=1e-9)


GUIDER = InstructDiffusionGuidance()


def test_guidance_can_be_disabled_for_some_steps(pipe: InstructDiffusionPipeline) -> None:
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    blocks = modular(pipe, start=0.25, stop=0.75)
    blocks(**tiny.inputs(num_inference_steps=4))
    assert batches == [1, 3, 3, 1]
    blocks.guider.disable()
    found = blocks(**tiny.inputs(), output="images")
    assert np.array_equal(found, pipe(**tiny.inputs(**named(SCALES[1]))).images)


def test_the_guider_saves_and_loads_its_scales(tmp_path: Path) -> None:
    InstructDiffusionGuidance(guidance_scale=3.0, stop=0.5).save_pretrained(tmp_path)
    loaded = InstructDiffusionGuidance.from_pretrained(tmp_path)
    assert (loaded.guidance_scale, loaded.image_guidance_scale, loaded._stop) == (3.0, None, 0.5)


def test_classifier_free_guidance_of_diffusers_can_be_used(pipe: InstructDiffusionPipeline) -> None:
    """Its formula, no_text + s (both - no_text), is that of `Guidance` with the scales (s - 1/2, 1/2)."""
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    blocks = modular(pipe)
    blocks.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
    found = blocks(**tiny.inputs(), output="images")
    assert batches == [2, 2]
    expected = pipe(**tiny.inputs(guidance_scale=3.5, image_guidance_scale=0.5)).images
    assert abs(found - expected).max() <= 1e-5
    assert abs(found - pipe(**tiny.inputs()).images).max() > 1e-4
    blocks.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert np.array_equal(blocks(**tiny.inputs(), output="images"), pipe(**tiny.inputs(**named(SCALES[1]))).images)


def test_the_unet_is_called_for_each_prediction_if_the_guider_changes_it(pipe: InstructDiffusionPipeline) -> None:
    batches: list[int] = []
    skipped: list[bool] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.to_q.register_forward_hook(lambda *_: skipped.append(False))
    layers = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks", skip_ff=False)
    blocks = modular(pipe)
    guider = SkipLayerGuidance(
        skip_layer_config=[copy.copy(layers)], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    blocks.update_components(guider=guider)
    blocks(**tiny.inputs(num_inference_steps=4))
    # The first step does not skip layers (in diffusers, skipping begins after `start`). The others have a third
    # prediction.
    assert batches == [1] * (2 + 3 * 3)
    assert len(skipped) == 2 * 4  # and the third prediction skips the attention of the block


# --- caches and wrong inputs ----------------------------------------------------------------------------------------


def test_pyramid_attention_broadcast_works_as_in_the_pipeline(pipe: InstructDiffusionPipeline) -> None:
    blocks = modular(pipe)
    current: dict[str, Any] = {}
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: current["of"]()
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    current["of"] = lambda: pipe.current_timestep
    expected = pipe(**tiny.inputs(num_inference_steps=6)).images
    current["of"] = lambda: blocks.guider.get_state()["timestep"]
    assert np.array_equal(blocks(**tiny.inputs(num_inference_steps=6), output="images"), expected)
    blocks.update_components(guider=InstructDiffusionGuidance(stop=0.5))
    blocks(**tiny.inputs(num_inference_steps=6))  # the cache is emptied when the number of predictions changes


def test_faster_cache_raises_an_error(pipe: InstructDiffusionPipeline) -> None:
    apply_faster_cache(pipe.unet, FasterCacheConfig(tensor_format="BCHW"))
    with pytest.raises(ValueError, match="`unet` must not have FasterCache"):
        modular(pipe)(**tiny.inputs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None}, "Required input 'prompt' is missing"),
        ({"prompt": 5}, "`prompt` must be a text or a non-empty list of texts"),
        ({"negative_prompt": []}, "`negative_prompt` must be a text or a non-empty list"),
        ({"clip_skip": 9}, "`clip_skip` must be an integer of at least 0 and below"),
        ({"image": "cat.png"}, "`image` must be a PIL image"),
        ({"resolution": 5}, "`resolution` must be 0 .* or an integer"),
        ({"resize_mode": "fit"}, "`resize_mode` must be one of"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer"),
        ({"prompt": ["a", "b"], "image": [tiny.picture()] * 3}, "`prompt` must have one entry, .* got 2"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer"),
        ({"sigmas": [1.0]}, "Exactly one of `num_inference_steps`, `timesteps` and `sigmas`"),
        ({"strength": 0.0}, "`strength` must be above 0"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"`latents` must have the shape \(1, 4, 16, 16\)"),
        ({"latents": torch.zeros(4, 16, 16)}, "`latents` must be a floating-point tensor .* of shape"),
        ({"generator": 5}, "`generator` must be a torch.Generator"),
        ({"generator": [tiny.generator()] * 3}, "`generator` must be one or a list of 1"),
        ({"eta": 2.0}, "`eta` must be a number from 0 to 1"),
        ({"output_type": "latent"}, r"`output_type` must be one of \('pil', 'np', 'pt'\)"),
    ],
)
def test_invalid_inputs_raise_errors(pipe: InstructDiffusionPipeline, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modular(pipe)(**tiny.inputs(**call))


def test_invalid_tensors_between_blocks_raise_errors(pipe: InstructDiffusionPipeline) -> None:
    step = modular(pipe, InstructDiffusionInputStep())
    good = {"prompt_embeds": torch.zeros(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)}
    good["image_latents"] = torch.zeros(1, 4, 8, 8)
    for name, value in good.items():
        with pytest.raises(ValueError, match=f"`{name}` must be a floating-point tensor of finite values of shape"):
            step(**good | {name: value[0]})
        with pytest.raises(ValueError, match=f"Required input '{name}' is missing"):
            step(**{key: tensor for key, tensor in good.items() if key != name})


def test_a_missing_component_is_reported() -> None:
    with pytest.raises(ValueError, match="`text_encoder` must be loaded before the call: use `load_components"):
        InstructDiffusionBlocks().init_pipeline()(**tiny.inputs())


def test_a_unet_of_another_model_raises_an_error(pipe: InstructDiffusionPipeline) -> None:
    blocks = modular(pipe)
    blocks.unet.register_to_config(in_channels=4)
    with pytest.raises(ValueError, match="`unet` must be a UNet of InstructDiffusion with 8 input channels .* got 4"):
        blocks(**tiny.inputs())
    blocks.unet.register_to_config(in_channels=8, encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="`unet` must not have an IP-Adapter"):
        blocks(**tiny.inputs())


@pytest.mark.parametrize("name", ["guidance_scale", "image_guidance_scale"])
@pytest.mark.parametrize("wrong", ["5", float("nan"), True, 1e300])
def test_invalid_scales_raise_errors(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number or None"):
        InstructDiffusionGuidance(**{name: wrong})


def test_overflowing_values_raise_errors(pipe: InstructDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="`unet` returned values that are NaN or infinite"):
        modular(pipe, guidance_scale=1e38)(**tiny.inputs())
