"""The features of diffusers' mixins: loading, saving, LoRA, IP-Adapters, textual inversion, memory savers.

Each is checked by its effect on the output, with real components.
"""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
    apply_faster_cache,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
)
from diffusers.loaders import IPAdapterMixin
from diffusers.utils.dynamic_modules_utils import find_pipeline_class
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import instructdiffusion_pipeline.pipeline_instruct_diffusion as module
from instructdiffusion_pipeline import InstructDiffusionPipeline


def answer(pipe: InstructDiffusionPipeline, **changes: Any) -> np.ndarray:
    return pipe(**tiny.inputs(**changes)).images


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(abs(one - other).max())


# --- the class ------------------------------------------------------------------------------------------------------


def test_the_file_has_one_pipeline_class() -> None:
    assert find_pipeline_class(module) is InstructDiffusionPipeline
    pipelines = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and value is not DiffusionPipeline
    ]
    assert pipelines == [InstructDiffusionPipeline]


def test_the_file_imports_nothing_of_this_package() -> None:
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not (node.module or "").startswith("instructdiffusion_pipeline")
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("instructdiffusion_pipeline") for alias in node.names)


def test_the_call_has_the_usual_arguments_and_all_have_defaults() -> None:
    parameters = dict(inspect.signature(InstructDiffusionPipeline.__call__).parameters)
    del parameters["self"]
    usual = {"prompt", "image", "guidance_scale", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"}
    usual |= {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
    usual |= {"ip_adapter_image", "ip_adapter_image_embeds", "callback_on_step_end", "cross_attention_kwargs"}
    assert usual <= set(parameters)
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())
    assert issubclass(InstructDiffusionPipeline, IPAdapterMixin)


def test_the_constructor_is_that_of_instruct_pix2pix(pipe: InstructDiffusionPipeline) -> None:
    ours, theirs = (
        list(inspect.signature(cls.__init__).parameters)
        for cls in (InstructDiffusionPipeline, StableDiffusionInstructPix2PixPipeline)
    )
    assert [name for name in ours if name not in ("readout", "task_settings", "score_calibration")] == theirs
    shared = {name: component for name, component in pipe.components.items() if name != "readout"}
    there = StableDiffusionInstructPix2PixPipeline(**shared, requires_safety_checker=False)
    back = InstructDiffusionPipeline(**there.components)
    assert difference(answer(back), answer(pipe)) == 0
    assert difference(answer(InstructDiffusionPipeline.from_pipe(there)), answer(pipe)) == 0


# --- loading and saving ---------------------------------------------------------------------------------------------


def test_saving_and_loading_keep_the_output(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    assert difference(answer(loaded), answer(pipe)) == 0
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert getattr(loaded, name) is None
    assert loaded.config.requires_safety_checker is False


def test_components_can_be_replaced_while_loading(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, safety_checker=None)
    assert loaded.scheduler is scheduler
    pipe.scheduler = scheduler
    assert difference(answer(loaded), answer(pipe)) == 0


def test_half_precision_is_kept_by_saving(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16." in path.name for path in tmp_path.rglob("*.safetensors"))
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16, variant="fp16")
    assert {model.dtype for model in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float16}
    assert difference(answer(loaded), answer(pipe)) == 0


def test_a_single_file_of_the_original_code_loads_with_a_local_configuration(
    golden: Path, golden_pipe: InstructDiffusionPipeline, tmp_path: Path
) -> None:
    golden_pipe.save_pretrained(tmp_path / "config")
    checkpoint = str(golden / "model" / "tiny-original.safetensors")
    loaded = InstructDiffusionPipeline.from_single_file(checkpoint, config=str(tmp_path / "config"))
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(golden_pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    loaded.set_progress_bar_config(disable=True)
    assert difference(answer(loaded), answer(golden_pipe)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "all weights of .* final_layer_norm"),
        ("model.diffusion_model.out.2.bias", "all weights of the VAE and the UNet"),
        ("first_stage_model.decoder.conv_out.weight", "all weights of the VAE and the UNet"),
    ],
)
def test_a_single_file_that_lacks_a_weight_raises_an_error(
    golden: Path, golden_pipe: InstructDiffusionPipeline, tmp_path: Path, name: str, told: str
) -> None:
    golden_pipe.save_pretrained(tmp_path / "config")
    weights = load_file(golden / "model" / "tiny-original.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"must have {told}"):
        InstructDiffusionPipeline.from_single_file(
            str(tmp_path / "model.safetensors"), config=str(tmp_path / "config")
        )


def test_a_single_file_needs_accelerate(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, missing weights are not detected."""
    monkeypatch.setattr("diffusers.utils.import_utils._accelerate_available", False)
    with pytest.raises(ImportError, match="`from_single_file` needs accelerate"):
        InstructDiffusionPipeline.from_single_file(str(golden / "model" / "tiny-original.safetensors"))


@pytest.mark.parametrize("kind", [AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny, ConsistencyDecoderVAE])
def test_other_autoencoder_classes_can_be_used(pipe: InstructDiffusionPipeline, kind: type) -> None:
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    halves = {"down_block_out_channels": (32, 64), "up_block_out_channels": (32, 64), "down_block_types": down}
    tiny_halves = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    decoder = {
        "decoder_block_out_channels": (32, 64),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_downsample_padding": 1,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 16,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    encoder = {"encoder_block_out_channels": (32, 64), "encoder_down_block_types": down, "encoder_norm_num_groups": 16}
    settings = {
        AutoencoderKL: {"block_out_channels": (32, 64), "down_block_types": down, "up_block_types": up},
        AsymmetricAutoencoderKL: {**halves, "up_block_types": up, "norm_num_groups": 16},
        AutoencoderTiny: tiny_halves | blocks,
        ConsistencyDecoderVAE: encoder | decoder,
    }
    other = InstructDiffusionPipeline(**pipe.components | {"vae": kind(**settings[kind]).eval()})
    other.set_progress_bar_config(disable=True)
    assert answer(other).shape == answer(pipe).shape


# --- texts ----------------------------------------------------------------------------------------------------------


def test_encode_prompt_works_without_the_other_components(pipe: InstructDiffusionPipeline) -> None:
    nothing = dict.fromkeys(pipe.components)
    texts = {name: pipe.components[name] for name in ("text_encoder", "tokenizer")}
    prompt_embeds, negative_prompt_embeds = InstructDiffusionPipeline(**nothing | texts).encode_prompt(
        "tint the cat blue", negative_prompt="fog"
    )
    without_texts = InstructDiffusionPipeline(**pipe.components | dict.fromkeys(texts))
    embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    expected = answer(pipe, negative_prompt="fog")
    assert difference(answer(without_texts, prompt=None, **embeds), expected) == 0
    with pytest.raises(ValueError, match="`negative_prompt_embeds` must be given, because there is no text encoder"):
        answer(without_texts, prompt=None, prompt_embeds=prompt_embeds)


def test_encode_prompt_returns_arguments_of_the_call() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(InstructDiffusionPipeline.encode_prompt)))
    (returned,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    assert [name.id for name in returned.elts] == ["prompt_embeds", "negative_prompt_embeds"]


def test_encode_prompt_repeats_embeddings_for_several_images(pipe: InstructDiffusionPipeline) -> None:
    once = pipe.encode_prompt(["a cat", "a dog"])
    twice = pipe.encode_prompt(["a cat", "a dog"], num_images_per_prompt=2)
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(two, one.repeat_interleave(2, dim=0))


def test_textual_inversions_of_several_vectors_work_in_both_prompts(pipe: InstructDiffusionPipeline) -> None:
    plain = answer(pipe, prompt="a <thing>", negative_prompt="a cat")
    vectors = torch.randn(3, 32, generator=tiny.generator(1))
    pipe.load_textual_inversion({"<thing>": vectors}, token="<thing>")
    ids: list[list[int]] = []
    pipe.text_encoder.register_forward_pre_hook(lambda part, args: ids.extend(args[0].tolist()))
    assert difference(answer(pipe, prompt="a <thing>", negative_prompt="a cat"), plain) > 1e-4
    assert [sum(number >= 1000 for number in row) for row in ids] == [3, 0]
    ids.clear()
    answer(pipe, prompt="a cat", negative_prompt="a <thing>")
    assert [sum(number >= 1000 for number in row) for row in ids] == [0, 3]
    pipe.unload_textual_inversion()
    assert difference(answer(pipe, prompt="a <thing>", negative_prompt="a cat"), plain) <= 1e-6


# --- LoRA -----------------------------------------------------------------------------------------------------------

LORA_PARTS = [("unet",), ("text_encoder",), ("unet", "text_encoder")]
LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def add_lora(pipe: InstructDiffusionPipeline, parts: tuple[str, ...], name: str = "default", seed: int = 0) -> None:
    torch.manual_seed(seed)
    for part in parts:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS[part], init_lora_weights=False)
        getattr(pipe, part).add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("parts", LORA_PARTS)
def test_the_lora_scale_applies_to_text_encoder_and_unet(
    pipe: InstructDiffusionPipeline, parts: tuple[str, ...]
) -> None:
    plain = answer(pipe)
    add_lora(pipe, parts)
    full = answer(pipe)
    half = answer(pipe, cross_attention_kwargs={"scale": 0.5})
    none = answer(pipe, cross_attention_kwargs={"scale": 0.0})
    assert difference(full, plain) > 1e-4
    assert difference(half, plain) > 1e-4
    assert difference(half, full) > 1e-4
    assert difference(none, plain) <= 1e-5
    assert difference(answer(pipe), full) <= 1e-6  # and the scale of a call has no effect on later calls


def test_lora_scale_of_the_text_encoder_is_undone_after_an_error(pipe: InstructDiffusionPipeline) -> None:
    add_lora(pipe, ("text_encoder",))
    full, _ = pipe.encode_prompt("a cat")
    hook = pipe.text_encoder.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.encode_prompt("a cat", lora_scale=0.5)
    hook.remove()
    assert torch.allclose(pipe.encode_prompt("a cat")[0], full, atol=1e-6)


@pytest.mark.parametrize("parts", LORA_PARTS)
def test_lora_saves_loads_fuses_and_unloads(
    pipe: InstructDiffusionPipeline, parts: tuple[str, ...], tmp_path: Path
) -> None:
    plain = answer(pipe)
    add_lora(pipe, parts)
    full = answer(pipe)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part)) for part in parts}
    InstructDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    pipe.unload_lora_weights()
    assert difference(answer(pipe), plain) <= 1e-6
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert difference(answer(pipe), full) <= 1e-5
    pipe.fuse_lora(components=list(parts))
    assert difference(answer(pipe), full) <= 1e-4
    pipe.unfuse_lora(components=list(parts))
    assert difference(answer(pipe), full) <= 1e-4
    pipe.disable_lora()
    assert difference(answer(pipe), plain) <= 1e-5
    pipe.enable_lora()
    assert difference(answer(pipe), full) <= 1e-4


def test_several_loras_have_the_given_weights(pipe: InstructDiffusionPipeline) -> None:
    parts = ("unet", "text_encoder")
    plain = answer(pipe)
    add_lora(pipe, parts, "one", seed=1)
    add_lora(pipe, parts, "two", seed=2)
    pipe.set_adapters("one")
    one = answer(pipe)
    pipe.set_adapters("two")
    two = answer(pipe)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    both = answer(pipe)
    assert min(difference(one, two), difference(one, both), difference(two, both), difference(one, plain)) > 1e-4
    pipe.set_adapters(["one", "two"], [0.0, 1.0])
    assert difference(answer(pipe), two) <= 1e-5
    pipe.delete_adapters("one")
    assert difference(answer(pipe), two) <= 1e-5
    assert pipe.get_active_adapters() == ["two"]


# --- IP-Adapter -----------------------------------------------------------------------------------------------------


def ip_adapter(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an IP-Adapter for pooled embeddings of width 32, with 4 tokens per image."""
    torch.manual_seed(seed)
    width = unet.config.cross_attention_dim
    attention = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            to_k = unet.get_submodule(name.removesuffix(".processor")).to_k
            for letter in "kv":
                attention[f"{number}.to_{letter}_ip.weight"] = torch.randn(to_k.out_features, width)
    projection = {
        "proj.weight": torch.randn(4 * width, 32),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def load(pipe: InstructDiffusionPipeline, adapters: int = 1) -> InstructDiffusionPipeline:
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet, seed) for seed in range(adapters)])
    return pipe


def embeds(seed: int = 0, rows: int = 2, pictures: int = 1) -> torch.Tensor:
    return torch.randn(rows, pictures, 32, generator=tiny.generator(seed))


def test_an_ip_adapter_loads_from_a_file(pipe: InstructDiffusionPipeline, tmp_path: Path) -> None:
    adapter = ip_adapter(pipe.unet)
    flat = {f"{part}.{name}": tensor for part, tensors in adapter.items() for name, tensor in tensors.items()}
    save_file(flat, tmp_path / "adapter.safetensors")
    pipe = with_image_encoder(pipe)
    pipe.load_ip_adapter(tmp_path, subfolder="", weight_name="adapter.safetensors")
    loaded = answer(pipe, ip_adapter_image_embeds=[embeds()])
    pipe.unload_ip_adapter()
    assert difference(answer(load(pipe), ip_adapter_image_embeds=[embeds()]), loaded) == 0
    assert difference(answer(pipe, ip_adapter_image_embeds=[embeds().double()]), loaded) == 0


@pytest.mark.parametrize("adapters", [1, 2])
def test_the_scale_of_ip_adapters_changes_the_output(pipe: InstructDiffusionPipeline, adapters: int) -> None:
    plain = answer(pipe)
    load(pipe, adapters)
    shown = [embeds(seed) for seed in range(adapters)]
    pipe.set_ip_adapter_scale([0.0] * adapters)
    assert difference(answer(pipe, ip_adapter_image_embeds=shown), plain) <= 1e-4
    pipe.set_ip_adapter_scale([42.0] * adapters)
    assert difference(answer(pipe, ip_adapter_image_embeds=shown), plain) > 1e-2
    pipe.unload_ip_adapter()
    assert difference(answer(pipe), plain) <= 1e-6


def test_the_branch_without_text_gets_the_negative_embedding(pipe: InstructDiffusionPipeline) -> None:
    load(pipe)
    handed: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(
        lambda part, args, kwargs: handed.append(kwargs["added_cond_kwargs"]["image_embeds"][0]), with_kwargs=True
    )
    shown = embeds()
    negative, positive = shown.chunk(2)
    answer(pipe, ip_adapter_image_embeds=[shown])
    assert torch.equal(handed[0], torch.cat([positive, negative, positive]))
    handed.clear()
    answer(pipe, ip_adapter_image_embeds=[shown], image_guidance_scale=0.5)
    assert torch.equal(handed[0], torch.cat([positive, negative]))
    handed.clear()
    answer(pipe, ip_adapter_image_embeds=[positive])
    assert torch.equal(handed[0], torch.cat([positive, torch.zeros_like(positive), positive]))


def with_image_encoder(pipe: InstructDiffusionPipeline) -> InstructDiffusionPipeline:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=32,
    )
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    parts = {"image_encoder": CLIPVisionModelWithProjection(config).eval(), "feature_extractor": extractor}
    pipe = InstructDiffusionPipeline(**pipe.components | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_images_and_their_embeddings_give_the_same_output(pipe: InstructDiffusionPipeline) -> None:
    pipe = load(with_image_encoder(pipe))
    picture = tiny.picture(40, 32, seed=9)
    with torch.no_grad():
        pixels = pipe.feature_extractor(picture, return_tensors="pt").pixel_values
        positive = pipe.image_encoder(pixels).image_embeds[None]
    expected = answer(pipe, ip_adapter_image=picture)
    # The recipe of diffusers' documentation: encode once, save, pass the embeddings.
    encoded = pipe.prepare_ip_adapter_image_embeds(picture, None, pipe.device, 1, True)
    assert [len(embeds) for embeds in encoded] == [2]
    assert difference(answer(pipe, ip_adapter_image_embeds=encoded), expected) == 0
    alone = pipe.prepare_ip_adapter_image_embeds(picture, None, pipe.device, 1, False)
    assert torch.equal(alone[0], encoded[0][1:])
    assert difference(answer(pipe, ip_adapter_image=[picture]), expected) == 0
    assert difference(answer(pipe, ip_adapter_image=pixels), expected) == 0
    assert difference(answer(pipe, ip_adapter_image_embeds=[positive]), expected) <= 1e-5
    both = torch.cat([torch.zeros_like(positive), positive])
    assert difference(answer(pipe, ip_adapter_image_embeds=[both]), expected) <= 1e-5
    other = answer(pipe, ip_adapter_image=tiny.picture(40, 32, seed=8))
    assert difference(other, expected) > 1e-3


def test_an_ip_adapter_can_have_several_images(pipe: InstructDiffusionPipeline) -> None:
    pipe = load(with_image_encoder(pipe), adapters=2)
    one, two = tiny.picture(seed=8), tiny.picture(seed=9)
    answer(pipe, ip_adapter_image=[[one, two], two])
    with pytest.raises(ValueError, match="`ip_adapter_image` must have 2 entries, one per IP-Adapter; got 3"):
        answer(pipe, ip_adapter_image=[one, two, one])


def test_ip_adapter_embeddings_in_batches(pipe: InstructDiffusionPipeline) -> None:
    load(pipe)
    pictures, shown = [tiny.picture(seed=1), tiny.picture(seed=2)], embeds(rows=4)
    generators = [tiny.generator(seed) for seed in range(4)]
    together = answer(
        pipe, image=pictures, ip_adapter_image_embeds=[shown], generator=generators, num_images_per_prompt=2
    )
    for i, picture in enumerate(together):
        sample = i // 2
        own = shown[[sample, 2 + sample]]
        call = {"image": pictures[sample], "ip_adapter_image_embeds": [own], "generator": tiny.generator(i)}
        assert abs(answer(pipe, **call)[0] - picture).max() <= 1e-4


def test_ip_adapter_embeddings_with_ensembles(pipe: InstructDiffusionPipeline) -> None:
    load(pipe)
    call = {"image": [tiny.picture(seed=1), tiny.picture(seed=2)], "ip_adapter_image_embeds": [embeds(rows=4)]}
    singles = answer(pipe, **call, generator=tiny.generator(), num_images_per_prompt=2)
    means = answer(pipe, **call, generator=tiny.generator(), ensemble_size=2)
    assert abs(means - singles.reshape(2, 2, *singles.shape[1:]).mean(1)).max() <= 1e-4


def test_ip_adapter_masks_restrict_the_region(pipe: InstructDiffusionPipeline) -> None:
    load(pipe)
    call = {"ip_adapter_image_embeds": [embeds()]}
    unmasked = answer(pipe, **call)
    masks = {"full": torch.ones(1, 1, 32, 32), "half": torch.ones(1, 1, 32, 32)}
    masks["half"][..., :16] = 0
    answers = {
        name: answer(pipe, **call, cross_attention_kwargs={"ip_adapter_masks": [mask]}) for name, mask in masks.items()
    }
    assert difference(answers["full"], unmasked) <= 1e-4
    assert difference(answers["half"], unmasked) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "`ip_adapter_image` or `ip_adapter_image_embeds` must be given, because an IP-Adapter is loaded"),
        ({"ip_adapter_image_embeds": [embeds()] * 2}, "must have 1 entries, one per IP-Adapter; got 2"),
        ({"ip_adapter_image_embeds": [embeds(rows=3)]}, r"odd number of entries: shape \(3, 1, 32\)"),
        ({"ip_adapter_image_embeds": [embeds(rows=4)]}, "`ip_adapter_image_embeds` must have one entry, .* got 2"),
        ({"ip_adapter_image": tiny.picture(), "ip_adapter_image_embeds": [embeds()]}, "must not both be given"),
        ({"ip_adapter_image": tiny.picture()}, "`ip_adapter_image` needs an `image_encoder`"),
    ],
)
def test_invalid_arguments_for_ip_adapters_raise_errors(
    pipe: InstructDiffusionPipeline, call: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answer(load(pipe), **call)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["auto", "max", 1, 2])
def test_attention_slicing_does_not_change_the_output(pipe: InstructDiffusionPipeline, size: str | int) -> None:
    plain = answer(pipe)
    pipe.enable_attention_slicing(size)
    assert difference(answer(pipe), plain) <= 1e-5
    pipe.disable_attention_slicing()
    assert difference(answer(pipe), plain) <= 1e-5


def test_slicing_the_vae_does_not_change_the_output(pipe: InstructDiffusionPipeline) -> None:
    call = {"image": [tiny.picture(seed=seed) for seed in range(3)]}
    plain = answer(pipe, **call)
    pipe.vae.enable_slicing()
    assert difference(answer(pipe, **call), plain) <= 1e-5


def test_tiling_the_vae_changes_the_output_little(pipe: InstructDiffusionPipeline) -> None:
    call = {"image": tiny.picture(64, 48)}
    plain = answer(pipe, **call)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16
    tiled = answer(pipe, **call)
    assert 0 < difference(tiled, plain) < 0.5


def test_freeu_and_fused_projections_work(pipe: InstructDiffusionPipeline) -> None:
    plain = answer(pipe)
    pipe.fuse_qkv_projections()
    assert difference(answer(pipe), plain) <= 1e-4
    pipe.unfuse_qkv_projections()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert difference(answer(pipe), plain) > 1e-4
    pipe.disable_freeu()
    assert difference(answer(pipe), plain) <= 1e-6


def test_changing_the_precision_changes_all_models(pipe: InstructDiffusionPipeline) -> None:
    pipe.to(dtype=torch.bfloat16)
    assert {model.dtype for model in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert pipe.dtype == torch.bfloat16


def test_weights_can_be_stored_in_eight_bits(pipe: InstructDiffusionPipeline) -> None:
    pipe.to(torch.bfloat16)
    plain = answer(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert abs(answer(pipe) - plain).mean() < 0.1


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_does_not_change_the_output(pipe: InstructDiffusionPipeline, offload: str) -> None:
    """The model is offloaded to the CPU on which it runs, which uses the same hooks as an accelerator."""
    plain = answer(pipe, clip_skip=1)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert difference(answer(pipe, clip_skip=1), plain) <= 1e-6
    assert difference(answer(pipe, clip_skip=1), plain) <= 1e-6


def test_the_offload_sequence_has_all_models(pipe: InstructDiffusionPipeline) -> None:
    named = set(pipe.model_cpu_offload_seq.split("->")) | set(pipe._exclude_from_cpu_offload)
    annotations = inspect.signature(InstructDiffusionPipeline.__init__).parameters
    assert named == set(annotations) - {
        "self",
        "tokenizer",
        "scheduler",
        "feature_extractor",
        "requires_safety_checker",
        "task_settings",
        "score_calibration",
    }


def test_the_vae_scale_factor_depends_on_the_number_of_levels(pipe: InstructDiffusionPipeline) -> None:
    assert pipe.vae_scale_factor == 2
    deeper = AutoencoderKL(
        block_out_channels=(32,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    assert InstructDiffusionPipeline(**pipe.components | {"vae": deeper.eval()}).vae_scale_factor == 4


# --- caches ---------------------------------------------------------------------------------------------------------


def broadcast_attention(pipe: InstructDiffusionPipeline) -> list[str]:
    """Applies PyramidAttentionBroadcast to self-attention; the list gets a name for each computed attention."""
    computed: list[str] = []
    for name, layer in pipe.unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_q")):
            layer.register_forward_hook(lambda *_, kind=name[-10:-5]: computed.append(kind))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    return computed


def test_pyramid_attention_broadcast_skips_attention_and_is_reset_after_a_call(
    pipe: InstructDiffusionPipeline,
) -> None:
    plain = answer(pipe, num_inference_steps=6)
    layers = sum(name.endswith("attn1") for name, _ in pipe.unet.named_modules())
    computed = broadcast_attention(pipe)
    found = answer(pipe, num_inference_steps=6)
    # Timesteps 999, 799.2, 599.4, 399.6, 199.8 and 0: in the range (100, 800) every other one is skipped.
    assert computed.count("attn2") == 6 * layers and computed.count("attn1") == 4 * layers
    assert 0 < difference(found, plain) < 0.1
    # An odd number of steps, so that a remaining state would change the steps that the next call skips.
    answer(pipe, image=[tiny.picture(seed=1), tiny.picture(seed=2)], num_inference_steps=5)
    assert difference(answer(pipe, num_inference_steps=6), found) == 0


def test_pyramid_attention_broadcast_is_reset_if_the_predictions_change(pipe: InstructDiffusionPipeline) -> None:
    """Other scales can have the same number of predictions, but other predictions."""
    broadcast_attention(pipe)
    schedule = [(6.0, 0.5), (6.0, 0.5), (0.5, 3.0), (0.5, 0.5), (5.0, 1.25)]

    def change(pipe: InstructDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> None:
        pipe._guidance_scale, pipe._image_guidance_scale = schedule[min(step, 4)]

    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    answer(pipe, num_inference_steps=6, callback_on_step_end=change)
    assert batches == [3, 2, 2, 2, 1, 3]


def test_caches_that_cannot_work_raise_errors(pipe: InstructDiffusionPipeline) -> None:
    with pytest.raises(IndexError):  # an error of diffusers, because a UNet has no list of transformer blocks
        apply_first_block_cache(pipe.unet, FirstBlockCacheConfig())
    plain = answer(pipe)
    apply_faster_cache(pipe.unet, FasterCacheConfig(tensor_format="BCHW"))
    with pytest.raises(ValueError, match="`unet` must not have FasterCache, .* Use PyramidAttentionBroadcast"):
        answer(pipe)
    pipe.unet._diffusers_hook.remove_hook("faster_cache_denoiser")
    assert difference(answer(pipe), plain) == 0
