"""Convert the folder of a pipeline to a checkpoint file of the original code, in the layout of the released weights.

    python conversion/convert_to_original.py --model_path folder --checkpoint_path instruct.ckpt

A checkpoint has weights only. The script prints the values that the YAML file of the original code must have.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from original_names import PREFIXES, build_empty, is_pointwise, name_tables
from safetensors.torch import save_file
from transformers import CLIPTextConfig
from weights import Weights, check_names, check_new, read_safetensors, read_values

from instructdiffusion_pipeline.cli import UsageError, reading, run_script
from instructdiffusion_pipeline.files import atomic_write
from instructdiffusion_pipeline.pipeline_instruct_diffusion import current_name

# Settings that are constant in the original code and not determined by names and shapes of weights.
REQUIRED_SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": False,
        "resnet_time_scale_shift": "default",
        "only_cross_attention": False,
    },
    "vae": {"norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True},
    "scheduler": {
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
    },
}
FORMATS = (".safetensors", ".ckpt")


def convert_back(model_path: str | Path) -> Weights:
    """Return the weights of a folder with the original code's names and shapes, memory-mapped from their files."""
    model_path = Path(model_path)
    parts = [f"{component}/config.json" for component in ("unet", "vae", "text_encoder")]
    for part in (*parts, "scheduler/scheduler_config.json"):
        if not (model_path / part).is_file():
            raise UsageError(f"--model_path: must be the folder of a pipeline, but {model_path} has no {part}.")
    stored = {component: read_component(model_path / component) for component in PREFIXES}
    with reading(f"--model_path: the configurations in {model_path} do not describe a pipeline"):
        scheduler = EulerAncestralDiscreteScheduler.from_pretrained(model_path / "scheduler")
        text = CLIPTextConfig.from_pretrained(model_path / "text_encoder")
        unet = UNet2DConditionModel.load_config(model_path / "unet")
        vae = AutoencoderKL.load_config(model_path / "vae")
        for component, config in (("unet", unet), ("vae", vae), ("text_encoder", text.to_dict())):
            check_layers(component, config, len(stored[component]))
        models = build_empty(unet, vae, text)
        tables = name_tables(models)
        configs = {component: model.config for component, model in models.items()}
        configs["scheduler"] = scheduler.config
    wrong = [
        f"{component} has {key} {configs[component][key]!r} instead of {value!r}"
        for component, settings in REQUIRED_SETTINGS.items()
        for key, value in settings.items()
        if configs[component][key] != value
    ]
    if wrong:
        raise UsageError(f"--model_path: the original code does not support {model_path}: {'; '.join(wrong)}.")
    weights: Weights = {}
    for component, table in tables.items():
        folder = model_path / component
        where = f"--model_path {folder}"
        check_names(
            {name: tensor.shape for name, tensor in stored[component].items()},
            {name: tensor.shape for name, tensor in models[component].state_dict().items()},
            where,
        )
        weights |= read_values(partial(read_component, folder), table, None, where)
    return {name: tensor[:, :, None, None] if is_pointwise(name) else tensor for name, tensor in weights.items()}


def yaml_settings(model_path: str | Path) -> dict[str, float]:
    """The entries of `model.params` in the original code's YAML file that a folder determines, besides its sizes."""
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(model_path, subfolder="scheduler").config
    vae = AutoencoderKL.load_config(model_path, subfolder="vae")
    return {
        "linear_start": scheduler.beta_start,
        "linear_end": scheduler.beta_end,
        "timesteps": scheduler.num_train_timesteps,
        "scale_factor": vae.get("scaling_factor", 0.18215),
    }


def check_layers(component: str, config: Mapping[str, Any], weights: int) -> None:
    """Raise a UsageError for more layers than weights, because building a model of 2**40 layers would not end."""
    for key, value in config.items():
        if "layers" in key and any(isinstance(n, int) and n > weights for n in np.ravel(value).tolist()):
            raise UsageError(f"--model_path: {component} has {weights} weights, but {key} is {value}.")


def read_component(folder: Path) -> Weights:
    """Return the weights of a component from all shards, by their names in current versions of its library."""
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = {current_name(name): tensor for name, tensor in read_safetensors(path, "--model_path").items()}
        duplicates = weights.keys() & shard.keys()
        if duplicates:
            raise UsageError(
                f"--model_path: {path} has {len(duplicates)} weights that another file in {folder} also has. Keep one "
                "variant of the component."
            )
        weights |= shard
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="folder of a pipeline, saved by save_pretrained")
    parser.add_argument(
        "--checkpoint_path", required=True, help="output file, .safetensors or .ckpt; it must not exist yet"
    )
    args = parser.parse_args()
    target = Path(args.checkpoint_path).resolve()
    if target.suffix not in FORMATS:
        raise UsageError(f"--checkpoint_path: must end in {' or '.join(FORMATS)}; got {target}.")
    check_new(target, "--checkpoint_path")
    weights = convert_back(args.model_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        if target.suffix == ".safetensors":
            save_file(weights, file, metadata={"format": "pt"})
        else:
            torch.save({"state_dict": weights}, file)
    print(f"Saved {target}")
    print("The YAML file of the original code must have these values in model.params:")
    print(yaml.safe_dump(yaml_settings(args.model_path), sort_keys=False), end="")


if __name__ == "__main__":
    run_script(main)
