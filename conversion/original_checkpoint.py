"""A checkpoint of the original: a base, perhaps with a training state laid over it, read strictly."""

from pathlib import Path
from typing import Any

import torch
from original_names import PREFIXES
from weights import Weights, check_names, read_pickle, read_safetensors, read_values

# What may stand beside the parameters. The schedule follows from its betas.
SCHEDULE_BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
RIDING = "model_ema."
EMA_COUNTERS = {"decay", "num_updates"}

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"

Shapes = dict[str, torch.Size]


class OriginalCheckpoint:
    """`shapes` of the base's parameters, and `left_out`: what the files hold that a pipeline has no use for."""

    def __init__(self, checkpoint_path: Path, ema_state: Path | None):
        self.checkpoint_path, self.ema_state = checkpoint_path, ema_state
        base, self.left_out = read_base(checkpoint_path)
        prefixes = tuple(PREFIXES.values())
        self.shapes: Shapes = {}
        self.beside: Weights = {}
        for name, tensor in base.items():
            if name.startswith(prefixes) and name != POSITION_IDS:
                self.shapes[name] = tensor.shape
            else:
                self.beside[name] = tensor
        absent = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in self.shapes)]
        if absent:
            raise ValueError(
                f"--checkpoint_path: {checkpoint_path} is not a whole InstructDiffusion or Stable Diffusion 1 model: "
                f"missing are all of {', '.join(prefix + '*' for prefix in absent)}."
            )

    def check(self, expected: Shapes, betas: torch.Tensor) -> None:
        """Every name and shape in the files against what the model must have."""
        base, first = dict(expected), expected[FIRST_CONVOLUTION]
        text_to_image = torch.Size((first[0], first[1] // 2, *first[2:]))
        if self.shapes.get(FIRST_CONVOLUTION) == text_to_image:
            if self.ema_state is None:
                raise ValueError(
                    f"--checkpoint_path: {self.checkpoint_path} sees no image: its first convolution takes "
                    f"{text_to_image[1]} channels and not {first[1]}. If it is the Stable Diffusion model that a "
                    "training state belongs to, give that as --ema_state."
                )
            base[FIRST_CONVOLUTION] = text_to_image
        undotted = undotted_names(expected)
        known = SCHEDULE_BUFFERS | {POSITION_IDS} | {RIDING + name for name in EMA_COUNTERS}
        known |= {RIDING + plain.removeprefix("model") for plain in undotted}
        beside = {name: tensor.shape for name, tensor in self.beside.items() if name not in known}
        check_names(self.shapes | beside, base, f"--checkpoint_path {self.checkpoint_path}")
        found = self.beside.get("betas", betas)
        if found.shape != betas.shape or not torch.allclose(found.to(betas), betas, rtol=1e-3, atol=0):
            raise ValueError(
                f"--checkpoint_path: {self.checkpoint_path} was trained on another noise schedule: its betas do not "
                f"run from {betas[0]:.5f} to {betas[-1]:.5f} in {len(betas)} steps. Name its --original_config_file."
            )
        if self.ema_state is not None:
            averaged, entries = read_ema_state(self.ema_state)
            shapes = {name: tensor.shape for name, tensor in averaged.items() if name not in EMA_COUNTERS}
            unet = {plain: expected[name] for plain, name in undotted.items()}
            check_names(shapes, unet, f"--ema_state {self.ema_state}")
            self.left_out += entries + sorted(EMA_COUNTERS & averaged.keys())
        riding = [name for name in self.beside if name.startswith(RIDING)]
        self.left_out += [name for name in self.beside if name not in riding]
        self.left_out += [f"{RIDING}* ({len(riding)} entries)"] if riding else []

    def read(self, expected: Shapes, dtype: torch.dtype | None) -> Weights:
        """The weights under the original's names, as `dtype` or as they are stored."""
        names = {name: name for name in expected}
        weights: Weights = {}
        if self.ema_state is not None:
            path, undotted = self.ema_state, undotted_names(expected)
            weights = read_values(lambda: read_ema_state(path)[0], undotted, dtype, f"--ema_state {path}")
            names = {name: name for name in expected if name not in weights}
        where = f"--checkpoint_path {self.checkpoint_path}"
        return weights | read_values(lambda: read_base(self.checkpoint_path)[0], names, dtype, where)


def undotted_names(expected: Shapes) -> dict[str, str]:
    """A training state spells the UNet's names without their dots."""
    return {name.replace(".", ""): name for name in expected if name.startswith(PREFIXES["unet"])}


def read_base(path: Path) -> tuple[Weights, list[str]]:
    """The weights of a released or a base checkpoint, and the names of what lies beside them."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, "--checkpoint_path"), []
    content = read_pickle(path, "--checkpoint_path")
    if isinstance(content, dict) and "state_dict" not in content and "model_ema" in content:
        raise ValueError(
            f"--checkpoint_path: {path} is a training state. Give it as --ema_state, and as --checkpoint_path "
            "the base that has its VAE and text encoder."
        )
    return _entry(content, "state_dict", f"--checkpoint_path: {path}")


def read_ema_state(path: Path) -> tuple[Weights, list[str]]:
    """The averaged weights of a training state, and the names of what lies beside them."""
    return _entry(read_pickle(path, "--ema_state"), "model_ema", f"--ema_state: {path}")


def _entry(content: Any, key: str, where: str) -> tuple[Weights, list[str]]:
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        holds = list(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where} has no {key!r} with weights in it; it holds {holds}.")
    entries = content[key].items()
    strange = [name for name, value in entries if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if strange:
        raise ValueError(f"{where}: {key!r} holds what is no named tensor: {strange}.")
    return content[key], [name for name in content if name != key]
