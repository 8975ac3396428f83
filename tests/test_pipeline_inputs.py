"""Arguments of a call: types and modes of images, texts, broadcasting of lists, and messages for invalid ones."""

import io
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.pipeline_instruct_diffusion import _missing_weights, upright_rgb

MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
MODES += ["I;16", "I;16L", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_images_of_all_modes_of_pillow_are_converted(pipe: InstructDiffusionPipeline, mode: str) -> None:
    answer = pipe(**tiny.inputs(image=PIL.Image.new(mode, (32, 32)), num_inference_steps=1)).images
    assert answer.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "RGBX", "LA", "CMYK", "I", "F", "I;16", "I;16B"])
def test_white_and_black_are_kept_in_all_modes(mode: str) -> None:
    white = {"I": 65535, "I;16": 65535, "I;16B": 65535, "F": 255.0, "CMYK": (0, 0, 0, 0), "LA": (255, 0)}
    picture = PIL.Image.new(mode, (3, 2), white.get(mode, "white"))
    assert upright_rgb(picture).getpixel((1, 1)) == (255, 255, 255)
    black = {"CMYK": (0, 0, 0, 255), "LA": (0, 0)}
    assert upright_rgb(PIL.Image.new(mode, (3, 2), black.get(mode, 0))).getpixel((1, 1)) == (0, 0, 0)


def test_sixteen_bits_are_scaled_down_and_not_clipped() -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    PIL.Image.fromarray(levels).save(file, "PNG")
    read = np.asarray(upright_rgb(PIL.Image.open(file)))
    assert np.array_equal(read[..., 0], levels // 257)


@pytest.mark.parametrize(("mode", "scale"), [("F", 1 / 255), ("F", 1), ("I", 1), ("I", 257), ("I;16", 257)])
def test_the_range_of_gray_values_is_recognized(mode: str, scale: float) -> None:
    gray = np.arange(256).reshape(16, 16)
    types = {"F": np.float32, "I": np.int32, "I;16": np.uint16}
    picture = PIL.Image.fromarray((gray * scale).astype(types[mode]))
    assert picture.mode == mode
    assert np.array_equal(np.asarray(upright_rgb(picture))[..., 1], gray)


@pytest.mark.parametrize(("mode", "value"), [("I", 65536), ("I", -1), ("F", 255.5), ("F", float("nan"))])
def test_values_out_of_range_raise_errors(mode: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`image` of mode {mode} must have values from 0 to"):
        upright_rgb(PIL.Image.new(mode, (3, 2), value))


def test_transparency_is_dropped() -> None:
    assert upright_rgb(PIL.Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(("mode", "keeps_profile"), [("RGB", True), ("P", True), ("L", False), ("CMYK", False)])
def test_a_saved_result_is_opaque_and_has_no_profile_of_another_color_space(mode: str, keeps_profile: bool) -> None:
    picture = PIL.Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    picture.info |= {"transparency": (255, 255, 255) if mode == "RGB" else 0, "icc_profile": b"profile"}
    rgb = upright_rgb(picture)
    assert "transparency" not in rgb.info and ("icc_profile" in rgb.info) == keeps_profile
    assert "transparency" in picture.info, "the input is not changed"


def test_exif_orientation_is_applied(pipe: InstructDiffusionPipeline) -> None:
    turned = tiny.picture(32, 48).transpose(PIL.Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "rotate clockwise for display"
    by_hand = pipe(**tiny.inputs(image=tiny.picture(32, 48), output_type="pil")).images[0]
    by_exif = pipe(**tiny.inputs(image=turned, output_type="pil")).images[0]
    assert turned.size == (48, 32)
    assert by_exif.size == (32, 48)
    assert np.array_equal(np.asarray(by_exif), np.asarray(by_hand))


def as_array(picture: PIL.Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32) / 255


def as_tensor(picture: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(as_array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("resolution", [0, 64])
@pytest.mark.parametrize(
    "kind",
    [
        as_array,
        as_tensor,
        lambda picture: as_array(picture)[None],
        lambda picture: as_tensor(picture)[None],
        lambda picture: [as_array(picture)],
        lambda picture: [as_tensor(picture)[None]],
        lambda picture: [picture],
        np.asarray,
        lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        lambda picture: np.asarray(picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))[:, ::-1],
        lambda picture: as_array(picture).astype(">f4"),
        lambda picture: np.asfortranarray(as_array(picture)),
    ],
)
def test_all_types_of_images_are_equivalent(pipe: InstructDiffusionPipeline, kind: Any, resolution: int) -> None:
    """At another size, a PIL image is rounded to 8 bits before it is converted, unlike the others."""
    picture = tiny.picture(32, 40)
    expected = pipe(**tiny.inputs(image=picture, resolution=resolution)).images
    answer = pipe(**tiny.inputs(image=kind(picture), resolution=resolution)).images
    assert abs(answer - expected).max() <= (1e-6 if resolution == 0 else 2e-2)


def test_numpy_integers_are_accepted(pipe: InstructDiffusionPipeline) -> None:
    expected = pipe(**tiny.inputs(resolution=64)).images
    numbers = {"num_inference_steps": np.int64(2), "resolution": np.int32(64), "guidance_scale": np.float32(5.0)}
    assert np.array_equal(pipe(**tiny.inputs(**numbers, num_images_per_prompt=np.int64(1))).images, expected)


@pytest.mark.parametrize("name", ["vae", "unet", "scheduler"])
def test_a_missing_component_is_reported(name: str) -> None:
    pipe = InstructDiffusionPipeline(**(tiny.components() | {name: None}))
    with pytest.raises(ValueError, match=f"has no `{name}`"):
        pipe(**tiny.inputs())


def test_a_pil_output_for_a_tensor_has_the_size_of_the_tensor(pipe: InstructDiffusionPipeline) -> None:
    image = as_tensor(tiny.picture(33, 50))
    assert pipe(**tiny.inputs(image=image, resolution=64, output_type="pil")).images[0].size == (33, 50)
    assert pipe(**tiny.inputs(image=image, output_type="pil")).images[0].size == (33, 50)


def test_image_latents_are_not_encoded_again(pipe: InstructDiffusionPipeline) -> None:
    with torch.no_grad():
        latents = pipe.vae.encode(2 * as_tensor(tiny.picture())[None] - 1).latent_dist.mode()
    expected = pipe(**tiny.inputs()).images
    assert abs(pipe(**tiny.inputs(image=latents)).images - expected).max() <= 1e-6
    assert abs(pipe(**tiny.inputs(image=[latents[0]])).images - expected).max() <= 1e-6


PROMPTS = ["tint the cat blue", "remove the dog", "make it night"]


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_lists_broadcast_and_each_sample_equals_a_separate_call(
    pipe: InstructDiffusionPipeline, texts: int, negatives: int, images: int, copies: int
) -> None:
    samples = max(texts, negatives, images)
    pictures = [tiny.picture(seed=seed) for seed in range(3)]
    together = pipe(
        **tiny.inputs(
            prompt=PROMPTS[:texts] if texts > 1 else PROMPTS[0],
            negative_prompt={0: None, 1: PROMPTS[-1], 3: PROMPTS[::-1]}[negatives],
            image=pictures[:images] if images > 1 else pictures[0],
            num_images_per_prompt=copies,
            generator=[tiny.generator(seed) for seed in range(samples * copies)],
        )
    ).images
    assert len(together) == samples * copies
    for i, answer in enumerate(together):
        sample = i // copies
        alone = pipe(
            **tiny.inputs(
                prompt=PROMPTS[sample % texts],
                negative_prompt={0: None, 1: PROMPTS[-1], 3: PROMPTS[::-1][sample]}[negatives],
                image=pictures[sample % images],
                generator=tiny.generator(i),
            )
        ).images[0]
        assert abs(answer - alone).max() <= 1e-4


def test_outputs_for_a_list_have_the_sizes_of_their_inputs(pipe: InstructDiffusionPipeline) -> None:
    pictures = [tiny.picture(32, 33), tiny.picture(33, 32)]
    answers = pipe(**tiny.inputs(image=pictures, output_type="pil", num_images_per_prompt=2)).images
    assert [answer.size for answer in answers] == [(32, 33), (32, 33), (33, 32), (33, 32)]


def test_one_generator_draws_the_noise_of_a_batch_in_order(pipe: InstructDiffusionPipeline) -> None:
    noise = torch.randn(2, 4, 16, 16, generator=tiny.generator())
    drawn = pipe(**tiny.inputs(num_images_per_prompt=2, num_inference_steps=1)).images
    given = pipe(**tiny.inputs(num_images_per_prompt=2, num_inference_steps=1, latents=noise, generator=None)).images
    assert np.array_equal(drawn, given)


def test_an_ensemble_returns_the_mean_of_its_images(pipe: InstructDiffusionPipeline) -> None:
    call = {"prompt": PROMPTS[:2], "output_type": "pt"}
    single = pipe(**tiny.inputs(**call, num_images_per_prompt=6)).images
    means = pipe(**tiny.inputs(**call, num_images_per_prompt=2, ensemble_size=3)).images
    assert means.shape[0] == 4 and single.var(0).max() > 1e-4
    expected = torch.stack([single[start : start + 3].mean(0) for start in (0, 3, 6, 9)])
    assert torch.equal(means, expected)


def test_numbers_of_images_can_be_small_integers_of_numpy(pipe: InstructDiffusionPipeline) -> None:
    """Their products do not wrap around: 2 * 128 is 0 in 8 bits."""
    call = {"prompt": PROMPTS[:2], "image": tiny.picture(16, 16), "num_inference_steps": 1, "output_type": "pt"}
    generators = [tiny.generator() for _ in range(256)]
    images = pipe(**tiny.inputs(**call, num_images_per_prompt=np.uint8(128), generator=generators)).images
    assert len(images) == 256
    assert len(pipe(**tiny.inputs(num_images_per_prompt=np.uint8(16), ensemble_size=np.uint8(16))).images) == 16


def test_each_ensemble_uses_the_generator_of_its_output(pipe: InstructDiffusionPipeline) -> None:
    generators = [tiny.generator(seed) for seed in (5, 6)]
    together = pipe(**tiny.inputs(prompt=PROMPTS[:2], ensemble_size=2, generator=generators)).images
    alone = pipe(**tiny.inputs(prompt=PROMPTS[1], ensemble_size=2, generator=tiny.generator(6))).images[0]
    assert abs(together[1] - alone).max() <= 1e-4
    with pytest.raises(ValueError, match="`generator` must be one or a list of 2, one per output; got 4"):
        pipe(**tiny.inputs(prompt=PROMPTS[:2], ensemble_size=2, generator=2 * generators))
    with pytest.raises(ValueError, match=r"`latents` must have the shape \(2, 4, 16, 16\); got \(1, 4, 16, 16\)"):
        pipe(**tiny.inputs(ensemble_size=2, latents=torch.zeros(1, 4, 16, 16)))


def test_embeddings_can_replace_texts(pipe: InstructDiffusionPipeline) -> None:
    expected = pipe(**tiny.inputs(prompt=PROMPTS[:2], negative_prompt="fog")).images
    embeds, negative_embeds = pipe.encode_prompt(PROMPTS[:2], negative_prompt="fog")
    answer = pipe(**tiny.inputs(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds)).images
    assert np.array_equal(answer, expected)
    answer = pipe(**tiny.inputs(prompt=None, prompt_embeds=embeds, negative_prompt="fog")).images
    assert np.array_equal(answer, expected)


def test_a_negative_prompt_replaces_the_empty_text(pipe: InstructDiffusionPipeline) -> None:
    plain = pipe(**tiny.inputs()).images
    assert np.array_equal(pipe(**tiny.inputs(negative_prompt="")).images, plain)
    assert abs(pipe(**tiny.inputs(negative_prompt="fog")).images - plain).max() > 1e-4


@pytest.mark.parametrize(("scale", "warned"), [(0.5, True), (0.6, False)])
def test_a_negative_prompt_without_effect_gives_a_warning(
    pipe: InstructDiffusionPipeline, caplog: pytest.LogCaptureFixture, scale: float, warned: bool
) -> None:
    inputs = tiny.inputs(guidance_scale=scale)
    with caplog.at_level(logging.WARNING, "instructdiffusion_pipeline"):
        plain = pipe(**inputs).images
        assert not caplog.records
        same = np.array_equal(pipe(**inputs | {"negative_prompt": "fog", "generator": tiny.generator()}).images, plain)
    assert same == warned == ("`negative_prompt` has no effect" in caplog.text)


def test_a_scheduler_of_other_models_raises_an_error(pipe: InstructDiffusionPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler` must be .* got FlowMatchEulerDiscreteScheduler"):
        pipe(**tiny.inputs())


def test_a_read_only_array_gives_no_warning(pipe: InstructDiffusionPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(**tiny.inputs(image=np.asarray(tiny.picture())))


def test_long_prompts_are_truncated_with_a_warning(
    pipe: InstructDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "instructdiffusion_pipeline"):
        pipe(**tiny.inputs(prompt=["a cat", "a " * 75 + "b c"]))
        assert "CLIP takes at most 77 tokens; this part of the prompt was removed: 'b c'" in caplog.text
        caplog.clear()
        pipe(**tiny.inputs(prompt="a " * 75))
        assert not caplog.records


LATENTS = torch.zeros(1, 4, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "`prompt` or `prompt_embeds` must be given"),
        ({"prompt": []}, r"`prompt` must be a text or a non-empty list of texts, .* got \[\]"),
        ({"prompt": 3}, "`prompt` must be a text or a non-empty list of texts, .* got 3"),
        ({"prompt": ["cat", 3]}, "`prompt` must be a text"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "`prompt` and `prompt_embeds` must not both be given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(77, 32)}, r"`prompt_embeds` must .* \(77, 32\)"),
        ({"negative_prompt": 3}, "`negative_prompt` must be a text"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, 32)}, r"same length .* \(1, 77, 32\) and \(1, 5, 32\)"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "`prompt` must have one entry, .* got 2"),
        ({"prompt": ["a", "b"], "image": [tiny.picture()] * 3}, "`prompt` must have one entry, .* got 2"),
        ({"prompt": ["a"] * 3, "image": [tiny.picture()] * 2}, "`image` must have one entry, .* got 2"),
        ({"image": None}, "`image` must be given"),
        ({"image": []}, r"`image` must be a PIL image, .* got \[\]"),
        ({"image": "cat.png"}, "`image` must be a PIL image, .* got 'cat.png'"),
        ({"image": torch.zeros(5, 5)}, r"`image` must be .* got Tensor of shape \(5, 5\)"),
        ({"image": torch.zeros(1, 5, 8, 8)}, "`image` must have 3 channels, .* got 5"),
        ({"image": [tiny.picture(), torch.zeros(4, 16, 16)]}, "`image` must have 3 channels, .* got 4"),
        ({"image": np.zeros((16, 16, 4), np.uint8)}, r"`image` must be .* got ndarray of shape \(16, 16, 4\)"),
        ({"image": np.random.rand(16, 16, 4) - 0.5}, r"`image` must be .* got ndarray of shape \(16, 16, 4\)"),
        ({"image": torch.ones(4, 16, 16)}, "`image` must have 3 channels, .* got 4"),
        ({"image": torch.rand(1, 4, 16, 16)}, "`image` must have 3 channels, .* got 4"),
        ({"image": torch.full((4, 16, 16), 255.0)}, "`image` must have 3 channels, .* got 4"),
        ({"image": torch.full((4, 16, 16), 255, dtype=torch.uint8)}, "`image` must have 3 channels, .* got 4"),
        ({"image": LATENTS - 1j}, "`image` must have 3 channels, .* got 4"),
        ({"image": LATENTS - torch.inf}, "`image` must be finite"),
        ({"image": LATENTS + torch.nan}, "`image` must be finite"),
        ({"latents": LATENTS.long()}, "`latents` must be a floating-point tensor of finite values; .* torch.int64"),
        ({"latents": LATENTS.bool()}, "`latents` must be a floating-point tensor of finite values; .* torch.bool"),
        ({"latents": LATENTS * 1j}, "`latents` must be a floating-point tensor of finite values; .* torch.complex64"),
        ({"latents": LATENTS + torch.nan}, "`latents` must be a floating-point tensor of finite values"),
        ({"latents": LATENTS + torch.inf}, "`latents` must be a floating-point tensor of finite values"),
        ({"image": torch.zeros(3, 0, 8)}, "`image` must be at least 1 x 1 pixel; got 8 x 0"),
        (
            {"image": np.zeros((8, 8, 3), np.uint16)},
            r"`image` must have floating-point values in \[0, 1\] .* got torch.uint16 values",
        ),
        ({"image": torch.full((3, 8, 8), -0.1)}, r"`image` must have floating-point values in \[0, 1\] .* from -0.1"),
        ({"image": torch.full((3, 8, 8), torch.nan)}, r"`image` must have floating-point values in \[0, 1\] .* nan"),
        ({"image": LATENTS, "resolution": 64}, "`resolution` must be None or 0 for image latents; got 64"),
        ({"image": [LATENTS, LATENTS[..., :8]]}, "`image` must have image latents of one shape"),
        ({"resolution": 8}, "`resolution` must be 0 .* or an integer of at least 16 and at most 16384; got 8"),
        ({"generator": 0}, "`generator` must be a torch.Generator or a list of them; got 0"),
        ({"generator": [0]}, r"`generator` must be .* got \[0\]"),
        ({"image": tiny.picture(400, 10), "resolution": 64}, "`image` of 400 x 10 pixels is too elongated"),
        (
            {"num_inference_steps": 0},
            "`num_inference_steps` must be an integer of at least 1 and at most 1000; got 0",
        ),
        (
            {"num_inference_steps": 2.0},
            "`num_inference_steps` must be an integer of at least 1 and at most 1000; got 2.0",
        ),
        (
            {"num_images_per_prompt": 0},
            "`num_images_per_prompt` must be an integer of at least 1 and at most 1000; got 0",
        ),
        ({"ensemble_size": 0}, "`ensemble_size` must be an integer of at least 1 and at most 1000; got 0"),
        (
            {"ensemble_size": 2, "output_type": "latent"},
            '`ensemble_size` must be 1 for `output_type="latent"`.*; got 2',
        ),
        ({"guidance_scale": "5"}, "`guidance_scale` must be a finite number; got '5'"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number; got nan"),
        ({"image_guidance_scale": float("inf")}, "`image_guidance_scale` must be a finite number; got inf"),
        (
            {"clip_skip": 2},
            "`clip_skip` must be an integer of at least 0 and below the text encoder's 2 layers; got 2",
        ),
        ({"image": torch.zeros(0, 3, 32, 32)}, r"`image` must be .* got Tensor of shape \(0, 3, 32, 32\)"),
        ({"strength": 0}, "`strength` must be above 0 and at most 1; got 0"),
        ({"strength": 1.01}, "`strength` must be above 0 and at most 1; got 1.01"),
        ({"strength": 0.2}, "`strength` of 0.2 leaves none of 2 steps"),
        ({"output_type": "jpeg"}, "`output_type` must be one of .* got 'jpeg'"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            r"`latents` must have the shape \(1, 4, 16, 16\); got \(1, 4, 8, 8\)",
        ),
        ({"generator": [tiny.generator()] * 2}, "`generator` must be one or a list of 1, .* got 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be a list of names among .* got \['noise'\]"),
        ({"ip_adapter_image": tiny.picture()}, "must be None, because no IP-Adapter is loaded"),
    ],
)
def test_invalid_arguments_raise_errors(pipe: InstructDiffusionPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**tiny.inputs(**change))


def test_embeddings_that_do_not_fit_raise_errors(pipe: InstructDiffusionPipeline) -> None:
    for embeds in (torch.zeros(1, 77, 33), torch.zeros(1, 77, 32).long(), torch.full((1, 77, 32), torch.nan)):
        with pytest.raises(ValueError, match=r"`prompt_embeds` must be .* of shape \(B, 77, 32\); got Tensor"):
            pipe(**tiny.inputs(prompt=None, prompt_embeds=embeds))
        with pytest.raises(ValueError, match=r"`negative_prompt_embeds` must be .* of shape \(B, 77, 32\); got"):
            pipe(**tiny.inputs(negative_prompt_embeds=embeds))


@pytest.mark.parametrize("component", ["text_encoder", "vae", "unet"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_reported(
    pipe: InstructDiffusionPipeline, component: str, value: float
) -> None:
    name, weight = next(
        (name, weight)
        for name, weight in getattr(pipe, component).named_parameters()
        if "conv_out.w" in name or "fc1.w" in name
    )
    weight.data.view(-1)[0] = value
    message = rf"`{component}` returned .*: 1 of its weights are NaN or infinite, such as {name}"
    with pytest.raises(ValueError, match=message):
        pipe(**tiny.inputs())


@pytest.mark.parametrize(("change", "component"), [({"guidance_scale": 1e30}, "unet"), ({"latents": 1e30}, "unet")])
def test_overflowing_values_raise_errors(pipe: InstructDiffusionPipeline, change: dict, component: str) -> None:
    change = {name: LATENTS + value if name == "latents" else value for name, value in change.items()}
    with pytest.raises(
        ValueError, match=f"`{component}` returned values that are NaN .* look for large values in .*`latents`"
    ):
        pipe(**tiny.inputs(**change))


@pytest.mark.parametrize("component", ["vae", "unet"])
def test_an_overflow_of_float16_is_reported(pipe: InstructDiffusionPipeline, component: str) -> None:
    half = pipe.to(torch.float16)
    layer = half.unet.conv_out if component == "unet" else half.vae.decoder.conv_in
    layer.weight.data.fill_(60000)
    with pytest.raises(ValueError, match=f"`{component}` returned .* float16 overflowed; use bfloat16 or float32"):
        half(**tiny.inputs(num_inference_steps=1))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_folder_that_lacks_a_weight_raises_an_error(
    pipe: InstructDiffusionPipeline, tmp_path: Path, component: str
) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / component).glob("*.safetensors")
    weights = load_file(file)
    name, _ = next(iter(getattr(pipe, component).named_parameters()))
    weights["other"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"must have all weights of `{component}`; 1 are missing: {name}"):
        InstructDiffusionPipeline.from_pretrained(tmp_path)
    given = {component: getattr(pipe, component)}
    assert InstructDiffusionPipeline.from_pretrained(tmp_path, **given).components[component] is given[component]


def test_old_names_of_weights_are_accepted(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    """Names of attention weights in the VAE of Stable Diffusion 1.5, and of text encoders before transformers 5.6."""
    pipe.save_pretrained(tmp_path)
    for component, prefix in (("vae", ""), ("text_encoder", "text_model.")):
        (file,) = (tmp_path / component).glob("*.safetensors")
        save_file(tiny.earlier_names(load_file(file), prefix), file, metadata={"format": "pt"})
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path)
    assert np.array_equal(loaded(**tiny.inputs()).images, pipe(**tiny.inputs()).images)


def test_text_encoders_of_earlier_transformers_need_the_prefix(tmp_path: Path) -> None:
    """Before 5.6 their weights have a prefix, and weights of a file without it would be ignored."""
    encoder = torch.nn.ModuleDict({"text_model": torch.nn.Linear(2, 2)})
    encoder.config = SimpleNamespace(_name_or_path=str(tmp_path))
    weights = encoder.state_dict()
    later = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    save_file(later, tmp_path / "model.safetensors")
    assert _missing_weights(encoder, None) == list(weights)
    save_file(weights, tmp_path / "model.safetensors")
    assert _missing_weights(encoder, None) == []


def test_variants_and_shards_are_checked_for_missing_weights(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("unet/*.fp16-*"))) > 1
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert np.array_equal(loaded(**tiny.inputs()).images, pipe(**tiny.inputs()).images)


def test_a_unet_without_image_channels_raises_an_error(pipe: InstructDiffusionPipeline) -> None:
    pipe.unet.register_to_config(in_channels=4)
    with pytest.raises(ValueError, match="`unet` must be a UNet of InstructDiffusion with 8 input channels .* got 4"):
        pipe(**tiny.inputs())
