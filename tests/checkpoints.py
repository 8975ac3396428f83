"""Checkpoints of the original code for the tests: the golden model in all forms of such files."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MODEL = Path(__file__).parent / "fixtures" / "golden" / "model"
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
OPTIONS: dict[str, Any] = {
    "original_config_file": str(MODEL / "tiny_instruct_diffusion.yaml"),
    "text_encoder": str(MODEL / "text_encoder"),
    "tokenizer": str(MODEL / "tokenizer"),
}


def base_weights() -> dict[str, torch.Tensor]:
    """673 entries: the parameters of the original code in float32, the schedule and position_ids."""
    stored = load_file(MODEL / "tiny-original.safetensors")
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in stored.items()}


def released_weights() -> dict[str, torch.Tensor]:
    """Only the 660 parameters."""
    base = base_weights()
    return {
        name: base[name] for name in json.loads(gzip.decompress((MODEL / "tiny-released.keys.json.gz").read_bytes()))
    }


def ema_weights() -> dict[str, torch.Tensor]:
    """The averaged weights of the UNet in float32, with their two counters, with names without dots."""
    stored = torch.load(MODEL / "tiny-ema-state-fp16.pth", weights_only=True)["model_ema"]
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in stored.items()}


def write_training_state(path: Path) -> Path:
    """A training state of the original code: its pickle, with the OmegaConf objects, and the bytes of the weights.

    The pickle refers to the weights by number. Stored without them, it has 24 KB instead of 5 MB.
    """
    pickled = gzip.decompress((MODEL / "tiny-ema-state.data.pkl.gz").read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(ema_weights().values()):
            archive.writestr(f"archive/data/{number}", tensor.numpy().tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_ckpt(path: Path, weights: dict[str, Any], **beside: Any) -> Path:
    torch.save({"state_dict": weights, **beside}, path)
    return path


def code_that_runs(module: str, name: str) -> bytes:
    """A checkpoint whose pickle refers to a function by name."""
    archive = io.BytesIO()
    torch.save({"state_dict": {}}, archive)
    with zipfile.ZipFile(archive) as good:
        entries = {entry: good.read(entry) for entry in good.namelist()}
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as bad:
        for entry, content in entries.items():
            call = f"\x80\x02c{module}\n{name}\nX\x04\x00\x00\x00exit\x85R.".encode("latin1")
            bad.writestr(entry, call if entry.endswith("data.pkl") else content)
    return evil.getvalue()
