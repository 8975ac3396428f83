"""Turns a folder of this pipeline back into one checkpoint file of the original, laid out as its released weights.

python conversion/convert_to_original.py --model_path folder --checkpoint_path instruct.ckpt
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from components import build_empty, tables
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from original_names import is_pointwise
from safetensors.torch import save_file
from transformers import CLIPTextConfig
from weights import Weights, check_names, check_new, read_safetensors, read_values, written_whole

# What the original's code fixes and no name or shape of a weight shows.
FIXED: dict[str, dict[str, Any]] = {
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
    "scheduler": {"prediction_type": "epsilon"},
}
FORMATS = (".safetensors", ".ckpt")


def convert_back(model_path: str | Path) -> Weights:
    """The weights of a folder under the original's names and in its shapes; they stay in their files, mapped."""
    model_path = Path(model_path)
    parts = [f"{component}/config.json" for component in ("unet", "vae", "text_encoder")]
    for part in (*parts, "scheduler/scheduler_config.json"):
        if not (model_path / part).is_file():
            raise ValueError(f"--model_path: {model_path} is no pipeline's folder, it has no {part}.")
    models = build_empty(
        UNet2DConditionModel.load_config(model_path / "unet"),
        AutoencoderKL.load_config(model_path / "vae"),
        CLIPTextConfig.from_pretrained(model_path / "text_encoder"),
    )
    configs = {component: model.config for component, model in models.items()}
    configs["scheduler"] = EulerAncestralDiscreteScheduler.from_pretrained(model_path / "scheduler").config
    wrong = [
        f"{component} has {key} {configs[component][key]!r} and not {value!r}"
        for component, settings in FIXED.items()
        for key, value in settings.items()
        if configs[component][key] != value
    ]
    if wrong:
        raise ValueError(f"--model_path: the original cannot run {model_path}: its {'; its '.join(wrong)}.")
    weights: Weights = {}
    for component, table in tables(models).items():
        folder = model_path / component
        where = f"--model_path {folder}"
        check_names(
            {name: tensor.shape for name, tensor in read_component(folder).items()},
            {name: tensor.shape for name, tensor in models[component].state_dict().items()},
            where,
        )
        weights |= read_values(partial(read_component, folder), table, None, where)
    return {name: tensor[:, :, None, None] if is_pointwise(name) else tensor for name, tensor in weights.items()}


def read_component(folder: Path) -> Weights:
    """All weight files of one component, for diffusers may have split it in shards."""
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = read_safetensors(path, "--model_path")
        twice = weights.keys() & part.keys()
        if twice:
            raise ValueError(
                f"--model_path: {path} holds {len(twice)} weights that another file of {folder} holds too. Keep one "
                "variant of a component in its folder."
            )
        weights |= part
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="folder written by save_pretrained")
    parser.add_argument("--checkpoint_path", required=True, help="file to write, .safetensors or .ckpt")
    args = parser.parse_args()
    target = Path(args.checkpoint_path).resolve()
    try:
        if target.suffix not in FORMATS:
            raise ValueError(f"--checkpoint_path: {target} should end in one of {', '.join(FORMATS)}.")
        check_new(target, "--checkpoint_path")
        weights = convert_back(args.model_path)
        with written_whole(target) as file:
            if target.suffix == ".safetensors":
                save_file(weights, file, metadata={"format": "pt"})
            else:
                torch.save({"state_dict": weights}, file)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
