"""Weights on disk: read memory-mapped and without running code, checked by name, written whole or not at all."""

import os
import pickle
import re
import shutil
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

Weights = dict[str, torch.Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SLICE = 256  # opening a file touches a page of every tensor in it, so not too often

# Classes that lie in checkpoints beside the weights. Each is read as an empty class of the same name, so neither
# omegaconf nor lightning is needed and none of their code runs. (dict, list and int are spelled out by OmegaConf.)
FOREIGN = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
INERT: list[Any] = [(type(name.rpartition(".")[2], (), {}), name) for name in FOREIGN]
INERT += [dict, list, int, defaultdict, (typing.Any, "typing.Any")]


def read_pickle(path: Path, option: str) -> Any:
    """A `.ckpt` or `.pth`: its tensors stay in the file until they are touched."""
    if not path.is_file():
        raise ValueError(f"{option}: {path} is not a file.")
    try:
        with torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(f"{option}: {path} cannot be read: its pickle is damaged ({error}).") from error
        raise ValueError(
            f"{option}: {path} was refused, because loading it would run code ({asked[1]}). A checkpoint may hold"
            " tensors and plain values only."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{option}: {path} cannot be read: it is cut short, or not a zip archive as torch.save has written since "
            f"torch 1.6. Bare pickles are not opened at all, since they could run code. ({str(error).splitlines()[0]})"
        ) from error


def read_safetensors(path: Path, option: str) -> dict[str, torch.Tensor]:
    """A `.safetensors`: its tensors stay in the file until they are touched."""
    if not path.is_file():
        raise ValueError(f"{option}: {path} is not a file.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{option}: {path} is cut short, or not a safetensors file ({error}).") from error


def check_names(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], where: str) -> None:
    """Raises a ValueError that lists every missing, unexpected and misshapen weight."""
    lists = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {list(shape)}" for name, shape in found.items() if name not in expected],
        "misshapen": [
            f"{name} is {list(shape)} and should be {list(expected[name])}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ],
    }
    wrong = [f"{len(names)} {kind}:\n  " + "\n  ".join(names) for kind, names in lists.items() if names]
    if wrong:
        raise ValueError(f"{where}: the weights are not those of this model.\n" + "\n".join(wrong))


def read_values(
    reopen: Callable[[], Weights], names: Mapping[str, str], dtype: torch.dtype | None, where: str
) -> Weights:
    """The weights `names` renames, each looked at: one that is NaN or infinite is an error.

    They are read in the order they lie in. Every slice has a mapping of its own, let go as soon as nothing uses it:
    when the weights are cast, the pages of the whole file would otherwise stay in memory beside them.
    """
    weights, broken, order = {}, [], [name for name in reopen() if name in names]
    with tqdm(total=len(order), desc=f"Reading {Path(where.split()[-1]).name}", unit="tensor") as bar:
        for start in range(0, len(order), SLICE):
            stored = reopen()
            for name in order[start : start + SLICE]:
                tensor = stored[name]
                # contiguous() copies nothing but what was saved from a channels_last model
                weights[names[name]] = cast = tensor.to(dtype or tensor.dtype).contiguous()
                if not is_finite(tensor):
                    broken.append(f"{names[name]} ({tensor.dtype})")
                elif dtype is not None and not is_finite(cast):
                    broken.append(f"{names[name]} (beyond {dtype}; convert it without --half)")
                bar.update()
    if broken:
        raise ValueError(
            f"{where}: {len(broken)} weights are NaN or infinite, or no floats:\n  " + "\n  ".join(broken)
        )
    return weights


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite floats. The extremes tell what isfinite() would, and need no memory for it."""
    return tensor.dtype in FLOATS and all(extreme.isfinite() for extreme in tensor.aminmax())


def check_new(target: Path, option: str) -> None:
    """Weights that exist already are never written over."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{option}: {target} exists already. Remove it, or name another place.")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a place beside `target` to write to, and renames it to `target` when everything is there.

    After an error nothing is left; what a killed process left (always under the same name) goes at the next try.
    """
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
