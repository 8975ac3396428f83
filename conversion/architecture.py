"""Infer the configurations of a checkpoint's components: sizes from shapes of weights, head counts from files."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CLIPTextConfig

from instructdiffusion_pipeline.cli import UsageError, reading

Shapes = Mapping[str, torch.Size]

UNET = r"model\.diffusion_model\."
VAE = r"first_stage_model\."
TEXT = r"cond_stage_model\.transformer\.text_model\."

# Weights do not determine head counts. Models with the sizes of Stable Diffusion 1.5 are assumed to have these.
SD15_UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SD15_UNET_HEADS = 8
SD15_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
SD15_TEXT_HEADS = 12


def read_original_config(path: Path) -> dict[str, Any]:
    """Return `model.params` of a configuration file of the original code."""
    with reading(
        f"--original_config_file: {path} is not a YAML file of the original code, with model.params.unet_config and"
        " model.params.first_stage_config"
    ):
        params = yaml.safe_load(path.read_text())["model"]["params"]
        dict(params["unet_config"]["params"]), dict(params["first_stage_config"]["params"]["ddconfig"])
    limits = {"linear_start": 1, "linear_end": 1, "scale_factor": 1000, "timesteps": 100_000}
    for key, limit in limits.items():
        number = params.get(key, 1)
        if type(number) not in (int, float) or not 0 < number <= limit or (key == "timesteps" and number % 1):
            raise UsageError(
                f"--original_config_file: model.params.{key} must be a number above 0 and at most {limit}; got"
                f" {number!r} in {path}."
            )
    for key, value in {"parameterization": "eps", "beta_schedule": "linear"}.items():
        if params.get(key, value) != value:
            raise UsageError(
                f"--original_config_file: model.params.{key} must be {value}, as in InstructDiffusion; got"
                f" {params[key]!r} in {path}."
            )
    return params


def scheduler_config(original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the scheduler's configuration; without `original`, that of Stable Diffusion 1.5."""
    original = original or {}
    return {
        "beta_start": original.get("linear_start", 0.00085),
        "beta_end": original.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": original.get("timesteps", 1000),
        "prediction_type": "epsilon",
        "timestep_spacing": "linspace",
    }


def unet_config(shapes: Shapes, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of the UNet.

    Args:
        shapes: the shape of each weight, by its name in the original code.
        original: what `read_original_config` returned, or None for a UNet with the sizes of Stable Diffusion 1.5.
    """
    downsamplers = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.0\.op\.(?:weight|bias)")
    levels = len(downsamplers) + 1
    resnets = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.0\.in_layers\.0\.(?:weight|bias)")
    layers = len(resnets) // levels
    attentions = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.1\.norm\.(?:weight|bias)")

    widths, has_attention = [], []
    for level in range(levels):
        blocks = range(1 + level * (layers + 1), 1 + level * (layers + 1) + layers)
        prefix = UNET + rf"input_blocks\.(?:{'|'.join(map(str, blocks))})\.0\."
        widths.append(_size(shapes, prefix + r"(?:out_layers\.[03]|emb_layers\.1)\.(?:weight|bias)"))
        has_attention.append(not attentions.isdisjoint(blocks))
    latents = _latent_channels(shapes)
    config = {
        "sample_size": 64,
        "in_channels": 2 * latents,  # noisy latents and image latents
        "out_channels": latents,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)
        ),
        "cross_attention_dim": _size(shapes, UNET + r".*\.attn2\.to_[kv]\.weight", 1),
        "transformer_layers_per_block": len(
            _numbers(shapes, UNET + r"middle_block\.1\.transformer_blocks\.(\d+)\.norm\d\.(?:weight|bias)")
        ),
    }
    if original is not None:
        _check_against(original["unet_config"]["params"], config)
    # In UNet2DConditionModel, `attention_head_dim` is the number of heads.
    config["attention_head_dim"] = _unet_heads(config, original)
    return config


def vae_config(shapes: Shapes, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of the VAE; arguments as in `unet_config`."""
    levels = len(_numbers(shapes, VAE + r"encoder\.down\.(\d+)\.block\.\d+\.norm1\.(?:weight|bias)"))
    widths = [
        _size(shapes, VAE + rf"encoder\.down\.{level}\.block\.\d+\.(?:norm2|conv[12])\.(?:weight|bias)")
        for level in range(levels)
    ]
    layers = len(_numbers(shapes, VAE + r"encoder\.down\.\d+\.block\.(\d+)\.norm1\.(?:weight|bias)"))
    config = {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": _latent_channels(shapes),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": (original or {}).get("scale_factor", 0.18215),
    }
    if original is not None:
        described = original["first_stage_config"]["params"]["ddconfig"]
        _agree(
            {
                "ch times ch_mult": (_widths(described, "ch", "ch_mult"), config["block_out_channels"]),
                "ddconfig.num_res_blocks": (described.get("num_res_blocks"), config["layers_per_block"]),
                "ddconfig.z_channels": (described.get("z_channels"), config["latent_channels"]),
            }
        )
    return config


def text_config(shapes: Shapes, source: str | None) -> CLIPTextConfig:
    """Return the configuration of the text encoder.

    Args:
        shapes: the shape of each weight, by its name in the original code.
        source: folder or Hub id with a config.json; None for a text encoder with the sizes of Stable Diffusion 1.5.
    """
    sizes: dict[str, Any] = {
        "hidden_size": _size(shapes, TEXT + r"encoder\.layers\.\d+\.layer_norm[12]\.(?:weight|bias)"),
        "intermediate_size": _size(shapes, TEXT + r"encoder\.layers\.\d+\.mlp\.fc1\.(?:weight|bias)"),
        "num_hidden_layers": len(_numbers(shapes, TEXT + r"encoder\.layers\.(\d+)\.layer_norm[12]\.(?:weight|bias)")),
        "max_position_embeddings": _size(shapes, TEXT + r"embeddings\.position_embedding\.weight"),
        "vocab_size": _size(shapes, TEXT + r"embeddings\.token_embedding\.weight"),
    }
    if source is None:
        if sizes != SD15_TEXT:
            raise UsageError(
                "--text_encoder is needed: the weights do not determine the number of heads, and this text encoder is "
                f"not Stable Diffusion 1.5's ({sizes}). Give a folder or Hub id with its config.json."
            )
        return CLIPTextConfig(**sizes, num_attention_heads=SD15_TEXT_HEADS, projection_dim=768)

    # For a folder without config.json, transformers returns its default configuration without a warning.
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UsageError(f"--text_encoder: {source} has no config.json.")
    with reading(f"--text_encoder: no text configuration could be read from {source}"):
        config = CLIPTextConfig.from_pretrained(source)
    wrong = [
        f"{key} {getattr(config, key)} (the weights: {size})"
        for key, size in sizes.items()
        if getattr(config, key) != size
    ]
    if wrong:
        raise UsageError(f"--text_encoder: {source} describes another text encoder: {', '.join(wrong)}.")
    # transformers raises an error for other numbers that do not divide the width.
    if config.num_attention_heads < 1:
        raise UsageError(f"--text_encoder: {source} must have at least one head; got {config.num_attention_heads}.")
    return config


def _unet_heads(config: Mapping[str, Any], original: Mapping[str, Any] | None) -> int | tuple[int, ...]:
    widths = config["block_out_channels"]
    if original is None:
        if any(config[key] != value for key, value in SD15_UNET.items()):
            raise UsageError(
                "--original_config_file is needed: the weights do not determine the number of heads, and this UNet is "
                f"not Stable Diffusion 1.5's (widths {list(widths)}, text width {config['cross_attention_dim']}). "
                "Give the YAML file that the model was trained with."
            )
        return SD15_UNET_HEADS
    described = original["unet_config"]["params"]
    channels = described.get("num_head_channels", -1)
    heads = described.get("num_heads", -1)
    key, number = ("num_heads", heads) if channels == -1 else ("num_head_channels", channels)
    if not isinstance(number, int) or number < 1 or any(width % number for width in widths):
        raise UsageError(
            f"--original_config_file: unet_config.{key} is {number!r}, which does not divide the UNet's widths "
            f"{list(widths)}."
        )
    return number if channels == -1 else tuple(width // number for width in widths)


def _check_against(described: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    scales = [2**level for level in range(len(config["block_out_channels"]))]
    attentions = [scale for scale, kind in zip(scales, config["down_block_types"], strict=True) if "Attn" in kind]
    resolutions = described.get("attention_resolutions") or []
    _agree(
        {
            "unet_config.in_channels": (described.get("in_channels"), config["in_channels"]),
            "unet_config.out_channels": (described.get("out_channels"), config["out_channels"]),
            "model_channels times channel_mult": (
                _widths(described, "model_channels", "channel_mult"),
                config["block_out_channels"],
            ),
            "unet_config.num_res_blocks": (described.get("num_res_blocks"), config["layers_per_block"]),
            "unet_config.attention_resolutions": ([s for s in scales if s in resolutions], attentions),
            "unet_config.context_dim": (described.get("context_dim"), config["cross_attention_dim"]),
            "unet_config.transformer_depth": (
                described.get("transformer_depth", 1),
                config["transformer_layers_per_block"],
            ),
        }
    )


def _agree(pairs: Mapping[str, tuple[Any, Any]]) -> None:
    wrong = [f"{key} {given} (the weights: {found})" for key, (given, found) in pairs.items() if given != found]
    if wrong:
        raise UsageError(f"--original_config_file describes another model: {', '.join(wrong)}.")


def _widths(described: Mapping[str, Any], base: str, factors: str) -> tuple[int, ...] | None:
    if base not in described or factors not in described:
        return None
    return tuple(described[base] * factor for factor in described[factors])


def _latent_channels(shapes: Shapes) -> int:
    return _size(shapes, rf"(?:{VAE}post_quant_conv|{UNET}out\.2)\.(?:weight|bias)")


def _numbers(shapes: Shapes, pattern: str) -> set[int]:
    return {int(found[1]) for found in map(re.compile(pattern).fullmatch, shapes) if found}


def _size(shapes: Shapes, pattern: str, dimension: int = 0) -> int:
    """Return the most common size along `dimension` among the weights whose names match `pattern`.

    A single weight of a wrong shape does not change the result; `check_names` reports it later.
    """
    named = [shape for name, shape in shapes.items() if re.fullmatch(pattern, name)]
    counts = Counter(shape[dimension] for shape in named if len(shape) > dimension)
    if not counts:
        raise UsageError(
            "--checkpoint_path: must be an InstructDiffusion or Stable Diffusion 1 model; there is no "
            + pattern.replace("\\", "")
        )
    return counts.most_common(1)[0][0]
