"""Read a checkpoint of the original code: a released or base one, optionally with the UNet of a training state."""

from pathlib import Path
from typing import Any

import torch
from original_names import PREFIXES
from weights import Weights, check_names, read_pickle, read_safetensors, read_values

from instructdiffusion_pipeline.cli import UsageError

# Entries that are not parameters. The scheduler computes them from its betas.
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
EMA_PREFIX = "model_ema."
EMA_COUNTERS = {"decay", "num_updates"}

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"

Shapes = dict[str, torch.Size]


class OriginalCheckpoint:
    """The files of a checkpoint.

    Attributes:
        shapes: the shape of each parameter in the base checkpoint, by name.
        extras: the other tensors of the base checkpoint.
        unused: the names of entries that a pipeline does not use.
    """

    def __init__(self, checkpoint_path: Path, ema_state: Path | None):
        self.checkpoint_path, self.ema_state = checkpoint_path, ema_state
        base, self.unused = read_base(checkpoint_path)
        prefixes = tuple(PREFIXES.values())
        self.shapes: Shapes = {}
        self.extras: Weights = {}
        for name, tensor in base.items():
            if name.startswith(prefixes) and name != POSITION_IDS:
                self.shapes[name] = tensor.shape
            else:
                self.extras[name] = tensor
        missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in self.shapes)]
        if missing:
            raise UsageError(
                f"--checkpoint_path: must be a complete InstructDiffusion or Stable Diffusion 1 model, but "
                f"{checkpoint_path} has no weights {', '.join(prefix + '*' for prefix in missing)}."
            )

    def check(self, expected: Shapes, betas: torch.Tensor) -> None:
        """Compare all names and shapes in the files with `expected`, and the noise schedule with `betas`.

        Raises:
            ValueError: if they differ.
        """
        base, first = dict(expected), expected[FIRST_CONVOLUTION]
        text_to_image = torch.Size((first[0], first[1] // 2, *first[2:]))
        if self.shapes.get(FIRST_CONVOLUTION) == text_to_image:
            if self.ema_state is None:
                raise UsageError(
                    f"--checkpoint_path: {self.checkpoint_path} is a text-to-image model: its first convolution has "
                    f"{text_to_image[1]} input channels instead of {first[1]}. If it is the Stable Diffusion model "
                    "that a training state was started from, give the training state as --ema_state."
                )
            base[FIRST_CONVOLUTION] = text_to_image
        undotted = undotted_names(expected)
        known = SCHEDULE_BUFFERS | {POSITION_IDS} | {EMA_PREFIX + name for name in EMA_COUNTERS}
        known |= {EMA_PREFIX + plain.removeprefix("model") for plain in undotted}
        unknown = {name: tensor.shape for name, tensor in self.extras.items() if name not in known}
        check_names(self.shapes | unknown, base, f"--checkpoint_path {self.checkpoint_path}")
        found = self.extras.get("betas", betas)
        if found.shape != betas.shape or not torch.allclose(found.to(betas), betas, rtol=1e-3, atol=0):
            raise UsageError(
                f"--checkpoint_path: {self.checkpoint_path} was trained with another noise schedule: its betas "
                f"are not {betas[0]:.5f} to {betas[-1]:.5f} in {len(betas)} steps. Give its --original_config_file."
            )
        if self.ema_state is not None:
            averaged, others = read_ema_state(self.ema_state)
            shapes = {name: tensor.shape for name, tensor in averaged.items() if name not in EMA_COUNTERS}
            unet = {plain: expected[name] for plain, name in undotted.items()}
            check_names(shapes, unet, f"--ema_state {self.ema_state}")
            self.unused += others + sorted(EMA_COUNTERS & averaged.keys())
        averages = [name for name in self.extras if name.startswith(EMA_PREFIX)]
        self.unused += [name for name in self.extras if name not in averages]
        self.unused += [f"{EMA_PREFIX}* ({len(averages)} entries)"] if averages else []

    def read(self, expected: Shapes, dtype: torch.dtype | None) -> Weights:
        """Read the weights `expected`, under their original names, as `dtype` (None: as stored)."""
        names = {name: name for name in expected}
        weights: Weights = {}
        if self.ema_state is not None:
            path, undotted = self.ema_state, undotted_names(expected)
            weights = read_values(lambda: read_ema_state(path)[0], undotted, dtype, f"--ema_state {path}")
            names = {name: name for name in expected if name not in weights}
        where = f"--checkpoint_path {self.checkpoint_path}"
        return weights | read_values(lambda: read_base(self.checkpoint_path)[0], names, dtype, where)


def undotted_names(expected: Shapes) -> dict[str, str]:
    """Map the names of the UNet's weights in a training state, which have no dots, to their full names."""
    return {name.replace(".", ""): name for name in expected if name.startswith(PREFIXES["unet"])}


def read_base(path: Path) -> tuple[Weights, list[str]]:
    """Return the tensors of a released or base checkpoint, and the names of its other entries."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, "--checkpoint_path"), []
    content = read_pickle(path, "--checkpoint_path")
    if isinstance(content, dict) and "state_dict" not in content and "model_ema" in content:
        raise UsageError(
            f"--checkpoint_path: {path} is a training state. Give it as --ema_state, and the base checkpoint, which "
            "has the VAE and the text encoder, as --checkpoint_path."
        )
    return _entry(content, "state_dict", f"--checkpoint_path: {path}")


def read_ema_state(path: Path) -> tuple[Weights, list[str]]:
    """Return the EMA weights of a training state, and the names of its other entries."""
    return _entry(read_pickle(path, "--ema_state"), "model_ema", f"--ema_state: {path}")


def _entry(content: Any, key: str, where: str) -> tuple[Weights, list[str]]:
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise UsageError(f"{where} must have {key!r} with the weights; got {found}.")
    entries = content[key].items()
    others = [name for name, value in entries if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if others:
        raise UsageError(f"{where}: {key!r} must contain only named tensors; got {others}.")
    return content[key], [name for name in content if name != key]
