"""Atomic checkpoints: a model, and the state needed to resume the run.

checkpoint-500/
    config.json                         settings of the run
    model_index.json, unet/, ...        the model with its EMA weights; with LoRA pytorch_lora_weights.safetensors
    state/trained.safetensors           the trained weights
    state/ema.safetensors               their moving average
    state/optimizer.bin, ...            accelerate's files, which it reads with `weights_only=True`
"""

import errno
import json
import pickle
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from instructdiffusion_pipeline.cli import is_disk_full
from instructdiffusion_pipeline.files import atomic_write
from instructdiffusion_pipeline.fingerprint import differences

# Settings that a resumed run may change, because the weights do not depend on them.
CHANGEABLE_ON_RESUME = {
    "batch_size",  # only `samples_per_step` must not change
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "logging_steps",
    "report_to",
}
# Settings that determine which weights are trained, and the state of the optimizer.
FIXED_ON_RESUME = {"lora_rank", "train_text_encoder", "optimizer"}


def save(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    settings: Mapping[str, Any],
    limit: int,
    trained: Mapping[str, torch.Tensor],
    ema: EMAModel | None,
    save_model: Callable[[Path], None],
) -> Path:
    """Write `checkpoint-<step>`, and keep the newest `limit` checkpoints.

    Args:
        trained: the trained weights by name; empty if accelerate saves them (FSDP).
        ema: their moving average.
        save_model: writes the current model to a folder, as it would be returned at the end of the run.

    Raises:
        OSError: if the disk is full. Earlier checkpoints are not changed.
    """
    checkpoint = folder / f"checkpoint-{step}"
    try:
        with atomic_write(checkpoint) if accelerator.is_main_process else nullcontext() as partial:
            (partial,) = broadcast_object_list([partial])  # all processes write to the folder of the main process
            if accelerator.is_main_process:
                save_model(partial)
                (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            accelerator.save_state(str(partial / "state"))
            if accelerator.is_main_process and trained:
                save_tensors(partial / "state" / "trained.safetensors", trained)
                if ema:
                    average = dict(zip(trained, ema.shadow_params, strict=True))
                    save_tensors(partial / "state" / "ema.safetensors", average)
            accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):  # torch and safetensors raise other errors for a full disk
            raise OSError(errno.ENOSPC, "No space left on device", str(checkpoint)) from error
        raise
    if accelerator.is_main_process:
        delete_older(folder, limit)
    accelerator.wait_for_everyone()
    return checkpoint


def delete_older(folder: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints."""
    for older in list_checkpoints(folder)[:-limit]:
        # Moved first, so that a partly deleted folder is not taken for a checkpoint.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{older.name}.") as trash:
            older.rename(Path(trash) / older.name)


def load(
    accelerator: Accelerator, checkpoint: Path, trained: Mapping[str, torch.Tensor], ema: EMAModel | None
) -> None:
    """Read the state that `save` wrote. `trained` and the average in `ema` are overwritten in place.

    Raises:
        ValueError: if a file is missing or damaged, contains code, or has other weights than `trained`.
    """
    state = checkpoint / "state"
    try:
        accelerator.load_state(str(state))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"`resume`: {state} cannot be read: {error}") from error
    if trained:
        load_tensors(state / "trained.safetensors", trained)
        if ema:
            load_tensors(state / "ema.safetensors", dict(zip(trained, ema.shadow_params, strict=True)))
            ema.optimization_step = step_of(checkpoint)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name as safetensors."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def load_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite `tensors` with those of a file, which must have the same names and shapes, and finite values."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`resume`: {path} cannot be read: {error}") from error
    if wrong := sorted(
        name
        for name in tensors.keys() | found.keys()
        if name not in tensors
        or name not in found
        or found[name].shape != tensors[name].shape
        or not found[name].isfinite().all()
    ):
        raise ValueError(
            f"`resume`: {path} does not fit the model: {len(wrong)} tensors are missing, unexpected, of another shape"
            f" or not finite, such as {wrong[0]}."
        )
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def find(
    folder: Path, resume: str | Path | None, settings: Mapping[str, Any], changes: Collection[str] = ()
) -> Path | None:
    """Return the checkpoint `resume`, a folder or "latest". None if there is nothing to resume.

    Args:
        changes: names of `settings` in which the checkpoint may differ.

    Raises:
        ValueError: if there is no such checkpoint, it belongs to another run, `folder` has a newer one, or `folder`
            has checkpoints although `resume` is None; or if `changes` has a name that is unknown or must not change.
    """
    possible = settings.keys() - FIXED_ON_RESUME
    if unknown := sorted(set(changes) - possible):
        raise ValueError(f"`resume_changes` must be names of {', '.join(sorted(possible))}; got {', '.join(unknown)}.")
    found = list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"`output_dir` has {found[-1]} of an earlier run. Set `resume` to latest to continue that run, or"
                " choose an empty folder."
            )
        return None
    if resume == "latest" and not found:
        return None
    checkpoint = found[-1] if resume == "latest" else Path(resume)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f'`resume` must be "latest" or the folder of a checkpoint; got {checkpoint}.')
    if found and found[-1].resolve() != checkpoint.resolve():
        raise ValueError(
            f"`resume` must be the newest checkpoint in `output_dir`, {found[-1]}; got {checkpoint}. To resume from an"
            " older one, move the newer ones away."
        )
    # A constant learning rate does not depend on the length of the run.
    changeable = CHANGEABLE_ON_RESUME.union(
        changes, {"max_train_steps"} if settings["lr_scheduler"].startswith("constant") else ()
    )
    before = read_settings(checkpoint)
    if other := differences(before, {name: value for name, value in settings.items() if name not in changeable}):
        names = [name for name in settings if name not in changeable and before.get(name) != settings[name]]
        way_on = "" if FIXED_ON_RESUME.intersection(names) else f" `resume_changes` can allow it: {' '.join(names)}."
        raise ValueError(f"`resume`: {checkpoint} belongs to another run: {other}.{way_on}")
    if settings["max_train_steps"] < step_of(checkpoint):
        raise ValueError(
            f"`max_train_steps` must be at least the {step_of(checkpoint)} updates of {checkpoint}; got"
            f" {settings['max_train_steps']}."
        )
    return checkpoint


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    path = checkpoint / "config.json"
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"`resume`: {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`resume`: {path} must be a JSON object of settings.")
    return settings


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = (path.parent for path in folder.glob("checkpoint-*/config.json"))
    return sorted((path for path in found if path.name.rpartition("-")[2].isdigit()), key=step_of)
