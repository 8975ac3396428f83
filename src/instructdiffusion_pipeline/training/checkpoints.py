"""Checkpoints that survive a kill at any instant: written aside, renamed, and the oldest dropped after that."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from instructdiffusion_pipeline.fingerprint import differences

# What a run may change when it goes on, because the weights do not depend on it.
FREE = {
    "batch_size",  # `samples_per_step` counts
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
    """Write `checkpoint-<step>`, all that a run needs to go on, with its `settings`; keep the newest `limit`."""
    final, partial = folder / f"checkpoint-{step}", folder / "partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process writes a part
    if accelerator.is_main_process:
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        partial.rename(final)
        for older in list_checkpoints(folder)[:-limit]:
            # Renamed first: one that is half deleted must not look like a checkpoint.
            shutil.rmtree(older.rename(folder / "partial"))
    accelerator.wait_for_everyone()
    return final


def find(folder: Path, resume: str | Path | None, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint that `resume` names: a folder, or "latest", which is None where there is none yet.

    Raises a ValueError if there is none of that name, if it is of another run, or if nothing is to be resumed and
    `folder` has checkpoints all the same.
    """
    found = list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f'`output_dir` has {found[-1]} of an earlier run; resume="latest" goes on with it. Or name an empty'
                " folder."
            )
        return None
    if resume == "latest" and not found:
        return None
    checkpoint = found[-1] if resume == "latest" else Path(resume)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f'`resume` must be "latest" or the folder of a checkpoint; {checkpoint} is none.')
    if found and found[-1].resolve() != checkpoint.resolve():
        raise ValueError(f"`resume`: `output_dir` has {found[-1]}, which is not {checkpoint}; move it away first.")
    # A run without a schedule that ends may be made longer.
    free = FREE | ({"max_train_steps"} if settings["lr_scheduler"].startswith("constant") else set())
    fixed = {name: value for name, value in settings.items() if name not in free}
    if other := differences(json.loads((checkpoint / "config.json").read_text()), fixed):
        raise ValueError(f"`resume`: {checkpoint} belongs to another run: {other}.")
    return checkpoint


def step_of(checkpoint: Path) -> int:
    """How many updates a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    whole = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(whole, key=step_of)
