"""Tells models and runs apart, so that a folder of one is not gone on with by another."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline


def fingerprint(*models: nn.Module, also: str = "") -> str:
    """A hash of a thousand values or so of each weight, with its name, and of other words."""
    digest = hashlib.sha256(also.encode())
    for model in models:
        for name, weight in model.named_parameters():
            some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
            digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def pipeline_fingerprint(pipeline: InstructDiffusionPipeline) -> str:
    """A hash of its weights, scheduler, precision and device, on all of which its answers depend."""
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    scheduler = pipeline.scheduler.to_json_string()
    return fingerprint(*parts, also=f"{pipeline.dtype} {pipeline.device.type} {scheduler}")


def check_run_config(folder: Path, name: str, run: Mapping[str, Any], what: str) -> None:
    """Note in the JSON file `name` of `folder` what its content is of.

    Raises a ValueError if that is there and of something else; `what` says in words what may be gone on with.
    """
    written = folder / name
    if not written.exists():
        write_text(written, json.dumps(run, indent=2) + "\n")
    elif other := differences(json.loads(written.read_text()), run):
        raise ValueError(
            f"`folder` must be new or hold {what}; of {folder}, {other}. Choose another folder, or delete this one."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What `now` says otherwise than `before` did, in words; empty if nothing."""
    return ", ".join(
        f"{name} was {before.get(name)!r} and is {value!r}" for name, value in now.items() if before.get(name) != value
    )
