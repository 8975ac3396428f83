"""Checkpoints that are complete even if a run is killed while it writes one."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from instructdiffusion_pipeline.files import atomic_write
from instructdiffusion_pipeline.fingerprint import differences

# Settings that a resumed run may change, because the weights do not depend on them.
CHANGEABLE_ON_RESUME = {
    "batch_size",  # only `samples_per_step` must stay
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "logging_steps",
    "report_to",
}


def save(accelerator: Accelerator, folder: Path, step: int, settings: Mapping[str, Any], limit: int) -> Path:
    """Write `checkpoint-<step>` with the state and `settings` of a run, and keep the newest `limit` checkpoints."""
    checkpoint = folder / f"checkpoint-{step}"
    with atomic_write(checkpoint) if accelerator.is_main_process else nullcontext() as partial:
        (partial,) = broadcast_object_list([partial])  # all processes write into the main one's folder
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if accelerator.is_main_process:
        for older in list_checkpoints(folder)[:-limit]:
            # Moved first, so that a partly deleted folder does not look like a checkpoint.
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{older.name}.") as trash:
                older.rename(Path(trash) / older.name)
    accelerator.wait_for_everyone()
    return checkpoint


def find(folder: Path, resume: str | Path | None, settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that `resume` names: a folder, or "latest". None if there is nothing to resume.

    Raises:
        ValueError: there is no such checkpoint, it belongs to another run, a newer one is in `folder`, or `folder` has
            checkpoints although `resume` is None.
    """
    found = list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f'`output_dir` has {found[-1]} of an earlier run. Give resume="latest" to continue that run, or an'
                " empty folder."
            )
        return None
    if resume == "latest" and not found:
        return None
    checkpoint = found[-1] if resume == "latest" else Path(resume)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f'`resume` must be "latest" or the folder of a checkpoint; got {checkpoint}.')
    if found and found[-1].resolve() != checkpoint.resolve():
        raise ValueError(f"`resume` is {checkpoint}, but `output_dir` also has {found[-1]}. Move that one away first.")
    # A constant learning rate does not depend on the length of the run.
    changeable = CHANGEABLE_ON_RESUME | (
        {"max_train_steps"} if settings["lr_scheduler"].startswith("constant") else set()
    )
    fixed = {name: value for name, value in settings.items() if name not in changeable}
    if other := differences(json.loads((checkpoint / "config.json").read_text()), fixed):
        raise ValueError(f"`resume`: {checkpoint} belongs to another run: {other}.")
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = (path.parent for path in folder.glob("checkpoint-*/config.json"))
    return sorted((path for path in found if path.name.rpartition("-")[2].isdigit()), key=step_of)
