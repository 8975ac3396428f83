"""Hashes of models and run settings, to check that a resumed run has the same settings."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from instructdiffusion_pipeline.files import write_text
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline


def fingerprint(*models: nn.Module, also: str = "") -> str:
    """A hash of the names and about a thousand values of each weight of `models`, and of the text `also`."""
    digest = hashlib.sha256(also.encode())
    for model in models:
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        if any(weight.is_meta for weight in weights.values()):  # sequential offloading
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            stored = get_state_dict_offloaded_model(model)
            weights = {name: stored[name] for name in weights}
        for name, weight in weights.items():
            values = weight.detach().flatten()[:: max(1, weight.numel() // 1000)]
            digest.update(name.encode() + values.float().cpu().numpy().tobytes())
        if getattr(model, "peft_config", None):  # LoRA layers, whose scales are not parameters
            from peft.tuners.tuners_utils import BaseTunerLayer

            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    state = layer.active_adapters, layer.merged_adapters, layer.disable_adapters, layer.scaling
                    digest.update(repr(state).encode())
    return digest.hexdigest()[:16]


def pipeline_fingerprint(pipeline: InstructDiffusionPipeline) -> str:
    """A hash of all that outputs depend on.

    These are the weights and configurations of the models, the tokenizer, the scheduler, the settings of the tasks,
    the calibration, the precision and the kind of device.
    """
    parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    if pipeline.readout is not None:
        parts.append(pipeline.readout)
    settings = {
        "models": [model_config(part) for part in parts],
        "vocabulary": pipeline.tokenizer.get_vocab(),
        "scheduler": pipeline.scheduler.to_json_string(),
        "task_settings": pipeline.config.task_settings,
        "score_calibration": pipeline.config.get("score_calibration"),
        "dtype": pipeline.dtype,
        "device": pipeline._execution_device.type,
    }
    return fingerprint(*parts, also=json.dumps(settings, sort_keys=True, default=str))


def content_hash(images: Iterable[Image.Image], texts: Iterable[str]) -> str:
    """A hash of the pixels of images and of texts."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def model_config(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model of diffusers or transformers, without paths and what changes when it is saved."""
    config: Any = model.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    saved = {"architectures", "dtype", "transformers_version"}
    return {name: value for name, value in values.items() if name[0] != "_" and name not in saved}


def check_run_config(folder: Path, name: str, run: Mapping[str, Any], what: str) -> None:
    """Write the configuration of a run to the JSON file `name` in `folder`, or compare it with an existing file.

    Args:
        what: a description of the folder's content for the error message.

    Raises:
        ValueError: if the file has another configuration.
    """
    written = folder / name
    if not written.exists():
        write_text(written, json.dumps(run, indent=2) + "\n")
        return
    try:
        before = json.loads(written.read_text())
        if not isinstance(before, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"The file {written} is damaged ({error}). Choose another folder.") from error
    if other := differences(before, run):
        raise ValueError(
            f"The folder {folder} must be new or have {what}; {other}. Choose another folder, or delete this one."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The values of `now` that differ from `before`, as text; empty if there are none."""
    return ", ".join(
        _difference(name, before.get(name), value) for name, value in now.items() if before.get(name) != value
    )


def _difference(name: str, before: Any, now: Any) -> str:
    """The change of a value as text: for long lists, their lengths and the first entries that differ."""
    if not (isinstance(before, list) and isinstance(now, list) and max(len(before), len(now)) > 3):
        return f"{name} was {before!r} and is {now!r}"
    old, new = next(pair for pair in zip_longest(before, now, fillvalue="nothing") if pair[0] != pair[1])
    return f"{name} had {len(before)} entries and has {len(now)}; the first change is from {old!r} to {new!r}"
