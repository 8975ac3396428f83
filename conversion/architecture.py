"""What model a checkpoint holds: sizes from the shapes of its weights, head counts from what describes it."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CLIPTextConfig

Shapes = Mapping[str, torch.Size]

UNET = r"model\.diffusion_model\."
VAE = r"first_stage_model\."
TEXT = r"cond_stage_model\.transformer\.text_model\."

# Stable Diffusion 1.5's widths, for which its head counts are known without a file that says so.
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
    """The part of the original's YAML that describes the model."""
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"--original_config_file: {path} is not a YAML file of the original, with model.params.unet_config and "
            f"model.params.first_stage_config ({error!r})."
        ) from error
    return params


def scheduler_config(original: Mapping[str, Any] | None) -> dict[str, Any]:
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
    downsamplers = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.0\.op\.(?:weight|bias)")
    levels = len(downsamplers) + 1
    resnets = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.0\.in_layers\.0\.(?:weight|bias)")
    layers = len(resnets) // levels
    attended = _numbers(shapes, UNET + r"input_blocks\.(\d+)\.1\.norm\.(?:weight|bias)")

    widths, attends = [], []
    for level in range(levels):
        blocks = range(1 + level * (layers + 1), 1 + level * (layers + 1) + layers)
        here = UNET + rf"input_blocks\.(?:{'|'.join(map(str, blocks))})\.0\."
        widths.append(_size(shapes, here + r"(?:out_layers\.[03]|emb_layers\.1)\.(?:weight|bias)"))
        attends.append(not attended.isdisjoint(blocks))
    latents = _latent_channels(shapes)
    config = {
        "sample_size": 64,
        "in_channels": 2 * latents,  # the noisy latents and those of the image
        "out_channels": latents,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        "cross_attention_dim": _size(shapes, UNET + r".*\.attn2\.to_[kv]\.weight", 1),
        "transformer_layers_per_block": len(
            _numbers(shapes, UNET + r"middle_block\.1\.transformer_blocks\.(\d+)\.norm\d\.(?:weight|bias)")
        ),
    }
    if original is not None:
        _check_against(original["unet_config"]["params"], config)
    # diffusers calls the number of heads `attention_head_dim`.
    config["attention_head_dim"] = _unet_heads(config, original)
    return config


def vae_config(shapes: Shapes, original: Mapping[str, Any] | None) -> dict[str, Any]:
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
    sizes: dict[str, Any] = {
        "hidden_size": _size(shapes, TEXT + r"encoder\.layers\.\d+\.layer_norm[12]\.(?:weight|bias)"),
        "intermediate_size": _size(shapes, TEXT + r"encoder\.layers\.\d+\.mlp\.fc1\.(?:weight|bias)"),
        "num_hidden_layers": len(_numbers(shapes, TEXT + r"encoder\.layers\.(\d+)\.layer_norm[12]\.(?:weight|bias)")),
        "max_position_embeddings": _size(shapes, TEXT + r"embeddings\.position_embedding\.weight"),
        "vocab_size": _size(shapes, TEXT + r"embeddings\.token_embedding\.weight"),
    }
    if source is None:
        if sizes != SD15_TEXT:
            raise ValueError(
                "--text_encoder is needed: weights do not show how many heads a text encoder has, and this one is not "
                f"Stable Diffusion 1.5's ({sizes}). Name a folder or Hub id with its config.json."
            )
        return CLIPTextConfig(**sizes, num_attention_heads=SD15_TEXT_HEADS, projection_dim=768)

    # A folder without config.json would silently give transformers' default configuration.
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"--text_encoder: {source} has no config.json.")
    try:
        config = CLIPTextConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--text_encoder: no text configuration could be read from {source} ({error}).") from error
    wrong = [
        f"{key} {getattr(config, key)} (the weights: {size})"
        for key, size in sizes.items()
        if getattr(config, key) != size
    ]
    if wrong:
        raise ValueError(f"--text_encoder: {source} describes another text encoder: {', '.join(wrong)}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"--text_encoder: {source} says {config.num_attention_heads} heads, which do not divide its width of "
            f"{config.hidden_size}."
        )
    return config


def _unet_heads(config: Mapping[str, Any], original: Mapping[str, Any] | None) -> int | tuple[int, ...]:
    widths = config["block_out_channels"]
    if original is None:
        if any(config[key] != value for key, value in SD15_UNET.items()):
            raise ValueError(
                "--original_config_file is needed: weights do not show how many heads a UNet has, and this one is not "
                f"Stable Diffusion 1.5's (widths {list(widths)}, text width {config['cross_attention_dim']}). Name "
                "the YAML file it was trained with."
            )
        return SD15_UNET_HEADS
    described = original["unet_config"]["params"]
    channels = described.get("num_head_channels", -1)
    heads = described.get("num_heads", -1)
    key, number = ("num_heads", heads) if channels == -1 else ("num_head_channels", channels)
    if not isinstance(number, int) or number < 1 or any(width % number for width in widths):
        raise ValueError(
            f"--original_config_file: unet_config.{key} is {number!r}, which does not divide the UNet's widths "
            f"{list(widths)}."
        )
    return number if channels == -1 else tuple(width // number for width in widths)


def _check_against(described: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    scales = [2**level for level in range(len(config["block_out_channels"]))]
    attends = [scale for scale, kind in zip(scales, config["down_block_types"], strict=True) if "Attn" in kind]
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
            "unet_config.attention_resolutions": ([s for s in scales if s in resolutions], attends),
            "unet_config.context_dim": (described.get("context_dim"), config["cross_attention_dim"]),
            "unet_config.transformer_depth": (
                described.get("transformer_depth", 1),
                config["transformer_layers_per_block"],
            ),
        }
    )


def _agree(pairs: Mapping[str, tuple[Any, Any]]) -> None:
    wrong = [f"{key} {said} (the weights: {found})" for key, (said, found) in pairs.items() if said != found]
    if wrong:
        raise ValueError(f"--original_config_file describes another model: {', '.join(wrong)}.")


def _widths(described: Mapping[str, Any], base: str, factors: str) -> tuple[int, ...] | None:
    if base not in described or factors not in described:
        return None
    return tuple(described[base] * factor for factor in described[factors])


def _latent_channels(shapes: Shapes) -> int:
    return _size(shapes, rf"(?:{VAE}post_quant_conv|{UNET}out\.2)\.(?:weight|bias)")


def _numbers(shapes: Shapes, pattern: str) -> set[int]:
    return {int(found[1]) for found in map(re.compile(pattern).fullmatch, shapes) if found}


def _size(shapes: Shapes, pattern: str, dimension: int = 0) -> int:
    """What most of the weights so named say: one of a wrong shape must stand out, and not decide for the others."""
    named = [shape for name, shape in shapes.items() if re.fullmatch(pattern, name)]
    said = Counter(shape[dimension] for shape in named if len(shape) > dimension)
    if not said:
        raise ValueError(
            "--checkpoint_path: not the weights of an InstructDiffusion or Stable Diffusion 1 model: missing "
            + pattern.replace("\\", "")
        )
    return said.most_common(1)[0][0]
