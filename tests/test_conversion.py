"""All forms of the original code's checkpoints are converted to the same pipeline.

test_pipeline_golden.py compares the outputs of a converted pipeline with those of the original code.
"""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FIRST_CONVOLUTION,
    MODEL,
    OPTIONS,
    base_weights,
    ema_weights,
    released_weights,
    write_ckpt,
    write_training_state,
)
from convert_original_checkpoint import convert, main
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from safetensors.torch import save_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError

Pipe = InstructDiffusionPipeline


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ckpt(tmp_path_factory.mktemp("released") / "released.ckpt", released_weights())


@pytest.fixture(scope="module")
def reference(released: Path) -> Pipe:
    return convert(released, **OPTIONS)


def assert_same(ours: Pipe, theirs: Pipe, components: tuple[str, ...] = ("unet", "vae", "text_encoder")) -> None:
    for component in components:
        mine, other = (getattr(pipe, component).state_dict() for pipe in (ours, theirs))
        assert mine.keys() == other.keys()
        assert all(mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]) for name in mine)


def test_the_released_layout_is_converted_to_a_complete_pipeline(reference: Pipe):
    counts = [len(getattr(reference, part).state_dict()) for part in ("unet", "vae", "text_encoder")]
    assert sum(counts) == 660
    assert reference.unet.config.in_channels == 8
    assert reference.unet.config.attention_head_dim == 8
    assert reference.text_encoder.config.num_attention_heads == 4
    assert reference.vae.config.scaling_factor == 0.18215
    assert not any(tensor.is_meta for tensor in reference.text_encoder.buffers())


def test_the_scheduler_is_that_of_the_original_code(reference: Pipe):
    scheduler = reference.scheduler
    assert isinstance(scheduler, EulerAncestralDiscreteScheduler)
    torch.testing.assert_close(scheduler.betas, base_weights()["betas"])
    assert scheduler.config.timestep_spacing == "linspace"
    assert scheduler.config.prediction_type == "epsilon"


def test_from_single_file_finds_the_same_weights(reference: Pipe, released: Path, tmp_path: Path):
    """The reference is diffusers' reader of such files, which needs the converted configuration."""
    reference.save_pretrained(tmp_path / "pipe")
    oracle = StableDiffusionInstructPix2PixPipeline.from_single_file(
        str(released), config=str(tmp_path / "pipe"), local_files_only=True
    )
    assert_same(reference, oracle)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_base_with_buffers_and_ema_weights(reference: Pipe, tmp_path: Path, suffix: str, capsys):
    weights = base_weights()
    weights |= {f"model_ema.{name.removeprefix('model')}": tensor for name, tensor in ema_weights().items()}
    path = tmp_path / f"base{suffix}"
    if suffix == ".ckpt":
        write_ckpt(path, weights, global_step=470000)
    else:
        save_file(weights, path)
    assert_same(convert(path, **OPTIONS), reference)
    unused = capsys.readouterr().out
    assert "model_ema.* (442 entries)" in unused
    assert "betas" in unused and "position_ids" in unused
    assert ("global_step" in unused) == (suffix == ".ckpt")


@pytest.mark.parametrize("channels", [4, 8])
def test_training_state_replaces_the_unet_of_a_base(reference: Pipe, tmp_path: Path, channels: int, capsys):
    """The base is an InstructDiffusion model, or Stable Diffusion 1.5, whose first convolution has 4 channels."""
    weights = base_weights()
    weights[FIRST_CONVOLUTION] = weights[FIRST_CONVOLUTION][:, :channels].clone()
    base = write_ckpt(tmp_path / "base.ckpt", weights)
    averaged = convert(base, ema_state=write_training_state(tmp_path / "state.pth"), **OPTIONS)
    assert_same(averaged, reference, ("vae", "text_encoder"))

    undotted = {name.replace(".", ""): name for name in weights}
    combined = released_weights()
    combined |= {undotted[name]: tensor for name, tensor in ema_weights().items() if name in undotted}
    assert_same(averaged, convert(write_ckpt(tmp_path / "whole.ckpt", combined), **OPTIONS))
    (unused,) = (line for line in capsys.readouterr().out.splitlines() if "config" in line)
    assert unused.startswith("Entries that the pipeline does not use: ")
    assert {"config", "decay", "num_updates"} <= set(unused.partition(": ")[2].split(", "))
    assert "diffusion_model" not in unused


def test_training_state_without_counters(tmp_path: Path, capsys):
    averaged = {name: tensor for name, tensor in ema_weights().items() if name not in ("decay", "num_updates")}
    torch.save({"model_ema": averaged}, tmp_path / "state.pth")
    convert(write_ckpt(tmp_path / "base.ckpt", released_weights()), ema_state=tmp_path / "state.pth", **OPTIONS)
    assert "does not use" not in capsys.readouterr().out


def test_training_state_with_a_gradient_scaler(tmp_path: Path):
    state = torch.load(MODEL / "tiny-ema-state-fp16.pth", weights_only=True) | {
        "grad_scale_manager": {"scale": 8192.0}
    }
    torch.save(state, tmp_path / "state.pth")
    pipe = convert(MODEL / "tiny-original.safetensors", ema_state=tmp_path / "state.pth", **OPTIONS)
    assert pipe.unet.dtype == torch.float16


def test_lightning_classes_are_read_without_lightning(reference: Pipe, tmp_path: Path):
    """The .ckpt of Stable Diffusion refers to a callback class, which is not needed and whose code does not run."""
    checkpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    parts = "pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"
    sys.modules |= {name: types.ModuleType(name) for name in parts}
    sys.modules[parts[-1]].ModelCheckpoint = checkpoint  # type: ignore[attr-defined]
    path = write_ckpt(tmp_path / "lightning.ckpt", released_weights(), callbacks={checkpoint: {"best": None}})
    for name in parts:
        del sys.modules[name]
    assert_same(convert(path, **OPTIONS), reference)


def test_channels_last_weights_are_read(reference: Pipe, tmp_path: Path):
    weights = {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in released_weights().items()
    }
    pipe = convert(write_ckpt(tmp_path / "strided.ckpt", weights), **OPTIONS)
    pipe.save_pretrained(tmp_path / "pipe")
    assert_same(Pipe.from_pretrained(tmp_path / "pipe"), reference)


def test_command_line_writes_a_folder_that_loads(
    reference: Pipe, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "new" / "folder" / "pipe"
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    call = ["convert", "--checkpoint_path", str(released), *options, "--dump_path", str(target)]
    monkeypatch.setattr("sys.argv", call)
    main()
    assert_same(Pipe.from_pretrained(target), reference)
    assert json.loads((target / "model_index.json").read_text())["_class_name"] == "InstructDiffusionPipeline"
    assert [entry.name for entry in target.parent.iterdir()] == ["pipe"]
    with pytest.raises(UsageError, match="--dump_path: .* already exists"):
        main()


def test_half_writes_float16(reference: Pipe, released: Path):
    pipe = convert(released, half=True, **OPTIONS)
    for component in ("unet", "vae", "text_encoder"):
        halved = getattr(pipe, component).state_dict()
        assert all(
            torch.equal(halved[name], tensor.half()) and halved[name].dtype == torch.float16
            for name, tensor in getattr(reference, component).state_dict().items()
        )
