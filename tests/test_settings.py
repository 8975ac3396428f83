"""The settings of a model: where they come from, which of them apply, and that they are saved."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from PIL import Image
from tiny import contents

from instructdiffusion_pipeline import (
    Editing,
    InstructDiffusionPipeline,
    Keypoints,
    Restoration,
    Segmentation,
    ask,
    export,
)
from instructdiffusion_pipeline.ask import settings_of
from instructdiffusion_pipeline.datasets.mixture import FixedTask, Mixture, Source
from instructdiffusion_pipeline.training.validation import validation_examples

OWN = {"editing": {"num_inference_steps": 3, "guidance_scale": 2.0}, "glow": {"num_inference_steps": 4}}


@pytest.fixture
def tuned() -> InstructDiffusionPipeline:
    pipe = InstructDiffusionPipeline(**tiny.components(), task_settings=OWN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: InstructDiffusionPipeline, **settings: Any) -> np.ndarray:
    inputs = tiny.inputs(**settings)
    return pipe(**{name: inputs[name] for name in inputs if name != "num_inference_steps" or name in settings}).images


def test_a_call_uses_the_settings_of_the_model_or_else_of_the_original_code(tuned, pipe):
    assert np.array_equal(run(tuned), run(pipe, num_inference_steps=3, guidance_scale=2.0, image_guidance_scale=1.25))
    assert np.array_equal(run(tuned, guidance_scale=7.0), run(pipe, num_inference_steps=3, guidance_scale=7.0))
    pipe(**tiny.inputs(num_inference_steps=None))
    assert pipe.num_timesteps == 100 and (pipe.guidance_scale, pipe.image_guidance_scale) == (5.0, 1.25)


def test_the_ensemble_size_of_a_task_is_used_by_that_task_only(pipe):
    """The default of `__call__` is that of editing, which tasks without an ensemble size do not use."""
    editing = {"num_inference_steps": 3, "guidance_scale": 2.0}
    own = {"editing": {**editing, "ensemble_size": 2}, "keypoints": {"num_inference_steps": 2, "ensemble_size": 3}}
    tuned = InstructDiffusionPipeline(**tiny.components(), task_settings=own)
    tuned.set_progress_bar_config(disable=True)
    assert np.array_equal(run(tuned), run(pipe, **editing, ensemble_size=2))
    assert np.array_equal(run(tuned, ensemble_size=1), run(pipe, **editing))
    with pytest.raises(ValueError, match='`ensemble_size` must be 1 for `output_type="latent"`.*; got 2'):
        run(tuned, output_type="latent")
    tasks = {1: Restoration("blur"), 2: Editing("make it winter"), 3: Keypoints({"nose": "red"})}
    for size, task in tasks.items():
        settings = {**task.settings, **own.get(task.family, {"num_inference_steps": 2}), "ensemble_size": size}
        expected = ask(pipe, tiny.picture(), task, generator=tiny.generator(), **settings)
        given = {} if task.family in own else {"num_inference_steps": 2}
        for unset in ({}, {"ensemble_size": None}):
            answer = ask(tuned, tiny.picture(), task, generator=tiny.generator(), **given, **unset)
            assert np.array_equal(answer.picture, expected.picture)


class Pairs(list):
    """Images with annotations."""

    skipped: ClassVar = ()

    def name(self, index):
        return str(index)


def test_the_images_of_validation_have_the_settings_of_ask():
    task, image = Restoration("blur"), tiny.picture()
    source = Source("pictures", Pairs([(image, image)]), FixedTask(task))
    own = {"editing": {"num_inference_steps": 3, "ensemble_size": 2}}
    (example,) = validation_examples(Mixture([(source, 1.0)]), own)
    pipe = InstructDiffusionPipeline(**tiny.components(), task_settings=own)
    assert example.settings == settings_of(pipe, task) == {**task.settings, "ensemble_size": 1}


def test_a_setting_of_zero_is_used(tuned):
    assert not np.array_equal(run(tuned, guidance_scale=0.0), run(tuned))


def test_ask_and_the_pipeline_agree_without_settings(tuned):
    answer = ask(tuned, tiny.picture(), Editing("make it winter"), generator=tiny.generator())
    assert tuned.num_timesteps == 3
    direct = tuned("make it winter", tiny.picture(), resize_mode="stretch", generator=tiny.generator()).images[0]
    assert np.array_equal(answer.picture, direct)


def test_arguments_override_the_settings_of_model_and_task(tuned):
    ask(tuned, tiny.picture(), Editing("make it winter"), generator=tiny.generator(), num_inference_steps=2)
    assert tuned.num_timesteps == 2 and tuned.guidance_scale == 2.0
    ask(tuned, tiny.picture(), Restoration("blur"), generator=tiny.generator(), num_inference_steps=2)
    assert tuned.guidance_scale == 1.0, "the model has none for restoration"


def test_none_is_the_default_of_the_task_and_not_that_of_editing(tuned):
    default = ask(tuned, tiny.picture(), Restoration("blur"), generator=tiny.generator(), num_inference_steps=2)
    assert (tuned.guidance_scale, tuned.image_guidance_scale) == (1.0, 1.0)
    unset = {"num_inference_steps": 2, "guidance_scale": None, "image_guidance_scale": None}
    answer = ask(tuned, tiny.picture(), Restoration("blur"), generator=tiny.generator(), **unset)
    assert np.array_equal(answer.picture, default.picture)


def test_each_task_has_its_own_resolution():
    one_step = {"num_inference_steps": 1}
    settings = {"editing": one_step | {"resolution": 48}, "segmentation": one_step | {"resolution": 64}}
    pipe = InstructDiffusionPipeline(**tiny.components(), task_settings=settings)
    pipe.set_progress_bar_config(disable=True)
    assert [pipe.task_resolution(family) for family in ("editing", "segmentation", "keypoints")] == [48, 64, 32]
    assert pipe.default_resolution == 48

    def working_side(task, **given):
        sides = []
        handle = pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
        ask(pipe, tiny.picture(90, 90), task, **given)
        handle.remove()
        return pipe.vae_scale_factor * sides[0]

    cat, nose = Segmentation({"cat": "red"}), Keypoints({"nose": "red"})
    tasks = (Editing("make it winter"), cat, nose)
    assert [working_side(task, num_inference_steps=1) for task in tasks] == [48, 64, 32]
    assert [working_side(cat, resolution=side) for side in (None, 32, 0)] == [64, 32, 90]
    arguments = {"resize_mode": "stretch", "output_type": "np", "generator": tiny.generator()}
    assert pipe("make it winter", tiny.picture(90, 90), **arguments).images.shape[1] == 48
    pipe.unet.register_to_config(sample_size=None)
    assert working_side(nose, resolution=32, num_inference_steps=1) == 32
    with pytest.raises(ValueError, match="`resolution` must be given"):
        working_side(nose, num_inference_steps=1)
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8)
    assert pipe("make it winter", latents, output_type="latent").images.shape[-1] == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(
            ["resolution", "num_inference_steps", "ensemble_size"],
            [0, -1, 64.5, "2", True, None, [2], float("nan"), 10**9],
        ),
        *itertools.product(["guidance_scale", "image_guidance_scale"], ["2", True, None, [2], float("nan")]),
    ],
)
def test_a_wrong_setting_of_a_task_raises_an_error(name, value):
    kind = "a finite number" if name.endswith("scale") else "an integer of at least (1|16) and at most 1"
    with pytest.raises(ValueError, match=rf"`task_settings\['segmentation'\]\['{name}'\]` must be {kind}"):
        InstructDiffusionPipeline(**tiny.components(), task_settings={"segmentation": {name: value}})


def test_settings_with_numbers_of_numpy_are_saved(tmp_path):
    own = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(0.5), "ensemble_size": np.uint8(3)}
    pipe = InstructDiffusionPipeline(**tiny.components(), task_settings={"keypoints": own})
    pipe.save_pretrained(tmp_path)
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path).config.task_settings
    assert loaded == {"keypoints": {"num_inference_steps": 2, "guidance_scale": 0.5, "ensemble_size": 3}}


@dataclass(frozen=True)
class Glow:
    """A fifth task, which is not registered."""

    family: ClassVar[str] = "glow"
    settings: ClassVar[dict[str, Any]] = {"num_inference_steps": 5, "guidance_scale": 3.0, "resolution": 0}

    def instruction(self, rng=None):
        return "let it glow"

    def read(self, image, answer, box=None):
        return answer

    def overlay(self, image, reading):
        return reading


def test_a_new_task_has_settings_that_a_model_can_override(tuned, pipe):
    image = tiny.picture(50, 34)
    answer = ask(pipe, image, Glow(), generator=tiny.generator())
    assert (pipe.num_timesteps, pipe.guidance_scale) == (5, 3.0)
    assert answer.box == (0, 0, 50, 34) and answer.data.size == (50, 34)
    ask(tuned, image, Glow(), generator=tiny.generator())
    assert (tuned.num_timesteps, tuned.guidance_scale) == (4, 3.0)


def test_settings_and_readout_are_saved_and_loaded(tuned, tmp_path):
    from diffusers import UNet2DModel

    tuned.register_modules(readout=UNet2DModel(sample_size=16, block_out_channels=(32,) * 4))
    tuned.save_pretrained(tmp_path)
    again = InstructDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert again.config.task_settings == OWN
    assert again.readout.dtype == torch.float16
    assert InstructDiffusionPipeline.from_pipe(again).config.task_settings == OWN
    assert again.unet.dtype == again.readout.dtype == torch.float16
    assert InstructDiffusionPipeline.from_pipe(again, dtype=torch.float32).unet.dtype == torch.float32
    bare = InstructDiffusionPipeline.from_pretrained(tmp_path, readout=None)
    assert bare.readout is None


@pytest.mark.parametrize("wrong", ["fast", {"editing": 3}, [("editing", {})]])
def test_unknown_settings_raise_errors(wrong):
    with pytest.raises(ValueError, match="`task_settings` must be a mapping of task families to values for"):
        InstructDiffusionPipeline(**tiny.components(), task_settings=wrong)


def test_the_default_resolution_is_that_of_the_unet(pipe):
    photograph = Image.new("RGB", (4000, 3000))
    array = pipe(**tiny.inputs(image=photograph, resolution=None, num_inference_steps=1)).images
    assert pipe.default_resolution == 32 and array.shape == (1, 24, 32, 3)
    array = pipe(**tiny.inputs(image=photograph, resolution=64, num_inference_steps=1)).images
    assert array.shape == (1, 64, 64, 3), "if the resolution is a multiple of 64, the sides are, too"
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="`resolution` must be given"):
        pipe(**tiny.inputs(resolution=None))


@pytest.mark.parametrize("settings", [{"guidence_scale": 4.0}, {"resize_mode": "crop"}, {"negative_prompt": "blurry"}])
def test_unknown_names_in_task_settings_raise_an_error(settings):
    with pytest.raises(
        ValueError, match="`task_settings` must be .* image_guidance_scale, ensemble_size or resolution"
    ):
        InstructDiffusionPipeline(**tiny.components(), task_settings={"editing": settings})


def test_a_folder_with_blocks_is_not_overwritten(pipe, tmp_path):
    """Its blocks would keep the earlier settings."""
    export(pipe, tmp_path / "model")
    before = contents(tmp_path / "model")
    pipe.register_to_config(task_settings=OWN)
    with pytest.raises(FileExistsError, match="must not be a folder with blocks, .* Save to another folder"):
        pipe.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_a_pipeline_with_adapters_is_not_saved(pipe, tmp_path):
    """The folder could not be loaded, because the names of its weights would be those of the layers below."""
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="must not have LoRA layers, but its unet has. Call fuse_lora"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_settings_that_are_registered_later_are_checked_too(pipe):
    with pytest.raises(ValueError, match="`task_settings` must be a mapping"):
        pipe.register_to_config(task_settings={"editing": {"steps": 3}})
    with pytest.raises(ValueError, match="`score_calibration` must be"):
        pipe.register_to_config(score_calibration={"segmentation": [0, 1]})
    assert pipe.config.task_settings == {} and pipe.config.score_calibration == {}
