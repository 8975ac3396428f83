"""Read files of weights, memory-mapped and without running code, and check names, shapes and values."""

import pickle
import re
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from instructdiffusion_pipeline.cli import UsageError, reading

Weights = dict[str, torch.Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Number of tensors read from one mapping of the file. A small number is slow, because opening a file reads a page of
# every tensor.
TENSORS_PER_MAPPING = 256

# Classes that checkpoints contain besides the weights. Each is replaced with an empty class of the same name, so
# omegaconf and lightning need not be installed, and none of their code runs. (OmegaConf refers to dict, list and int
# by name.)
PLACEHOLDER_CLASSES = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
SAFE_GLOBALS: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in PLACEHOLDER_CLASSES]
SAFE_GLOBALS += [dict, list, int, defaultdict, (typing.Any, "typing.Any")]


def read_pickle(path: Path, option: str) -> Any:
    """Read a `.ckpt` or `.pth` file. Its tensors are memory-mapped."""
    if not path.is_file():
        raise UsageError(f"{option}: {path} is not a file.")
    with reading(
        f"{option}: {path} cannot be read: it is damaged, truncated, or not a zip archive as torch.save writes since"
        " torch 1.6. Files in the older pickle format are not supported, because they could run code"
    ):
        try:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if code is None:
                raise
            raise UsageError(
                f"{option}: {path} was not loaded, because that would run code ({code[1]}). A checkpoint may contain"
                " only tensors and plain values."
            ) from error


def read_safetensors(path: Path, option: str) -> dict[str, torch.Tensor]:
    """Read a `.safetensors` file. Its tensors are memory-mapped."""
    if not path.is_file():
        raise UsageError(f"{option}: {path} is not a file.")
    with reading(f"{option}: {path} is truncated, or not a safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}


def check_names(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], where: str) -> None:
    """Raise a ValueError that lists all missing weights, unexpected weights and weights of a wrong shape."""
    lists = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {list(shape)}" for name, shape in found.items() if name not in expected],
        "of a wrong shape": [
            f"{name} has shape {list(shape)} and must have {list(expected[name])}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ],
    }
    wrong = [f"{len(names)} {kind}:\n  " + "\n  ".join(names) for kind, names in lists.items() if names]
    if wrong:
        raise ValueError(f"{where}: the weights do not fit this model.\n" + "\n".join(wrong))


def read_values(
    reopen: Callable[[], Weights], names: Mapping[str, str], dtype: torch.dtype | None, where: str
) -> Weights:
    """Read weights, rename them and check that all values are finite.

    The weights are read in the order of the file, `TENSORS_PER_MAPPING` at a time. With a `dtype`, each mapping is
    freed after its weights are cast, so that the pages of the whole file do not stay in memory next to the result.

    Args:
        reopen: a function that maps the file and returns all its weights.
        names: maps names in the file to names in the result. Other weights are ignored.
        dtype: type of the result; None keeps the stored type.
        where: option and path, for the progress bar and errors.

    Raises:
        ValueError: if a weight is NaN, infinite or not a float.
    """
    weights, broken, order = {}, [], [name for name in reopen() if name in names]
    with tqdm(total=len(order), desc=f"Reading {Path(where.split()[-1]).name}", unit="tensor") as bar:
        for start in range(0, len(order), TENSORS_PER_MAPPING):
            stored = reopen()
            for name in order[start : start + TENSORS_PER_MAPPING]:
                tensor = stored[name]
                # contiguous() copies only weights saved from a channels_last model
                weights[names[name]] = cast = tensor.to(dtype or tensor.dtype).contiguous()
                if not is_finite(tensor):
                    broken.append(f"{names[name]} ({tensor.dtype})")
                elif dtype is not None and not is_finite(cast):
                    broken.append(f"{names[name]} (out of range for {dtype}; convert without --half)")
                bar.update()
    if broken:
        raise ValueError(f"{where}: {len(broken)} weights are NaN, infinite or not floats:\n  " + "\n  ".join(broken))
    return weights


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite floats. Checking the extremes needs less memory than `tensor.isfinite().all()`."""
    return tensor.dtype in FLOATS and all(extreme.isfinite() for extreme in tensor.aminmax())


def check_new(target: Path, option: str) -> None:
    """Raise a UsageError if `target` exists. An empty folder is allowed."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{option}: {target} already exists. Delete it, or choose another path.")
