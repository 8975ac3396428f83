"""The three components of a checkpoint as models without weights, which say what weights there must be."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_names import original_names, original_shape
from transformers import CLIPTextConfig, CLIPTextModel


def build_empty(unet: Mapping[str, Any], vae: Mapping[str, Any], text: CLIPTextConfig) -> dict[str, Any]:
    """Models on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(text),
        }


def tables(models: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For each component, diffusers' name of every weight -> the original's."""
    return {
        component: original_names(component, model.state_dict(), model.config) for component, model in models.items()
    }


def original_shapes(models: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The original's name of every weight of all components -> its shape there."""
    return {
        table[name]: original_shape(table[name], tensor.shape)
        for component, table in tables(models).items()
        for name, tensor in models[component].state_dict().items()
    }


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives a model from `build_empty` its weights without copying them."""
    model.load_state_dict(weights, assign=True)
    for name, buffer in dict(model.named_buffers()).items():
        # The one buffer there is: CLIP's position_ids, which released checkpoints do not carry.
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[1])[None], persistent=False)
    model.eval()
