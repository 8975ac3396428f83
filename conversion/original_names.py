"""The names and shapes of weights in the original code. Both conversions use the same table of names."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}

# Modules of a residual block: name in diffusers -> name in the original code.
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_modules(config: Any) -> dict[str, str]:
    """Map the name of each module of the UNet in diffusers to its name in the original code.

    The original code numbers the blocks of all levels consecutively. An upsampler is part of the block before it.
    """
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        first = 1 + level * (layers + 1)  # block 0 is conv_in; each level has its layers and a downsampler
        for layer in range(layers):
            resnets[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"

        first = level * (layers + 1)  # here each level has one more layer; the upsampler is in its last block
        for layer in range(layers + 1):
            resnets[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        position = 2 if config.up_block_types[level] == "CrossAttnUpBlock2D" else 1
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{position}.conv"
    return modules | _inside(resnets, UNET_RESNET)


def vae_modules(config: Any) -> dict[str, str]:
    """Map the name of each module of the VAE in diffusers to its name in the original code.

    The original code numbers the decoder's levels in reverse order of execution, diffusers in order of execution.
    """
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets, attentions = {}, {}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        attentions[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for layer in (0, 1):
            resnets[f"{half}.mid_block.resnets.{layer}"] = f"{half}.mid.block_{layer + 1}"
    for level in range(levels):
        for layer in range(layers):
            resnets[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        modules[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        original_level = levels - 1 - level
        for layer in range(layers + 1):
            resnets[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{original_level}.block.{layer}"
        modules[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{original_level}.upsample.conv"
    return modules | _inside(resnets, VAE_RESNET) | _inside(attentions, VAE_ATTENTION)


def text_encoder_modules(config: Any) -> dict[str, str]:
    """Map the name of each module of the text encoder in transformers to its name in the original code: the same."""
    return {part: part for part in ("embeddings", "encoder", "final_layer_norm")}


MODULES = {"unet": unet_modules, "vae": vae_modules, "text_encoder": text_encoder_modules}


def original_names(component: str, names: Iterable[str], config: Any) -> dict[str, str]:
    """Map the name of each weight of a component in diffusers to its name in the original code."""
    modules = MODULES[component](config)
    table = {}
    for name in names:
        module = name
        while module and module not in modules:
            module = module.rpartition(".")[0]
        if not module:
            raise ValueError(f"{component}: the original code has no weight that corresponds to {name}.")
        table[name] = PREFIXES[component] + modules[module] + name[len(module) :]
    return table


def is_pointwise(original_name: str) -> bool:
    """Whether a weight of the VAE's attention is a 1 x 1 convolution in the original code and linear in diffusers."""
    return ".mid.attn_1." in original_name and original_name.endswith(".weight") and ".norm." not in original_name


def original_shape(original_name: str, shape: torch.Size) -> torch.Size:
    """Return the shape in the original code of a weight that has `shape` in diffusers."""
    return torch.Size((*shape, 1, 1)) if is_pointwise(original_name) else shape


def build_empty(unet: Mapping[str, Any], vae: Mapping[str, Any], text: CLIPTextConfig) -> dict[str, Any]:
    """Build the three components on the meta device, with names and shapes of weights but without memory."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(text),
        }


def name_tables(models: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For each component, map the name of each weight in diffusers to its name in the original code."""
    return {
        component: original_names(component, model.state_dict(), model.config) for component, model in models.items()
    }


def original_shapes(models: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Map the name of each weight of all components in the original code to its shape there."""
    return {
        table[name]: original_shape(table[name], tensor.shape)
        for component, table in name_tables(models).items()
        for name, tensor in models[component].state_dict().items()
    }


def _inside(blocks: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in blocks.items() for a, b in parts.items()}
