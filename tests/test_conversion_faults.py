"""A checkpoint that is not what it should be is refused in words that name what is wrong, and nothing is written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import (
    FIRST_CONVOLUTION,
    MODEL,
    OPTIONS,
    base_weights,
    code_that_runs,
    ema_weights,
    released_weights,
    write_ckpt,
    write_training_state,
)
from convert_original_checkpoint import convert, main
from safetensors.torch import save_file
from tiny import ROOT
from weights import written_whole

Weights = dict[str, torch.Tensor]
UNET_WEIGHT = "model.diffusion_model.output_blocks.3.0.in_layers.2.weight"
VAE_WEIGHT = "first_stage_model.decoder.mid.attn_1.q.weight"
TEXT_WEIGHT = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture
def weights() -> Weights:
    return released_weights()


def refused(tmp_path: Path, weights: Weights, match: str, **options: str) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        convert(write_ckpt(tmp_path / "x.ckpt", weights), **(OPTIONS | options))
    return str(caught.value)


@pytest.mark.parametrize("name", [UNET_WEIGHT, VAE_WEIGHT, TEXT_WEIGHT, FIRST_CONVOLUTION])
def test_missing_key_is_named(tmp_path: Path, weights: Weights, name: str):
    del weights[name]
    said = refused(tmp_path, weights, "1 missing")
    assert name in said and "misshapen" not in said


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.99.0.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_projection.weight",
        "optimizer.step",
        "model_ema.diffusion_modelnothing",
    ],
)
def test_unexpected_key_is_named(tmp_path: Path, weights: Weights, name: str):
    weights[name] = torch.zeros(3)
    assert f"{name} [3]" in refused(tmp_path, weights, "1 unexpected")


@pytest.mark.parametrize("name", [UNET_WEIGHT, VAE_WEIGHT, TEXT_WEIGHT])
def test_misshapen_key_is_named_and_no_other(tmp_path: Path, weights: Weights, name: str):
    weights[name] = weights[name][1:].clone()
    said = refused(tmp_path, weights, "1 misshapen")
    assert f"{name} is {list(weights[name].shape)} and should be" in said


def test_every_fault_is_listed(tmp_path: Path, weights: Weights):
    del weights[UNET_WEIGHT], weights[VAE_WEIGHT]
    weights["extra"] = torch.zeros(1)
    said = refused(tmp_path, weights, "2 missing")
    assert UNET_WEIGHT in said and VAE_WEIGHT in said and "1 unexpected:\n  extra" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, weights: Weights, value: float):
    for name in (UNET_WEIGHT, VAE_WEIGHT):
        weights[name].view(-1)[7] = value
    said = refused(tmp_path, weights, "2 weights are NaN or infinite")
    assert UNET_WEIGHT in said and VAE_WEIGHT in said


def test_weights_too_large_for_half_are_named(tmp_path: Path, weights: Weights):
    weights[UNET_WEIGHT].view(-1)[0] = 1e5
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    convert(path, **OPTIONS)
    with pytest.raises(ValueError, match=f"{UNET_WEIGHT} .beyond torch.float16; convert it without --half"):
        convert(path, half=True, **OPTIONS)


def test_weights_of_a_type_that_is_not_read_are_named(tmp_path: Path, weights: Weights):
    weights[UNET_WEIGHT] = weights[UNET_WEIGHT].to(torch.float8_e4m3fn)
    refused(tmp_path, weights, f"{UNET_WEIGHT} .torch.float8_e4m3fn")


def test_whole_component_missing(tmp_path: Path, weights: Weights):
    refused(
        tmp_path, {n: t for n, t in weights.items() if not n.startswith("first_stage_model.")}, "first_stage_model"
    )


def test_stable_diffusion_alone_is_no_answer(tmp_path: Path, weights: Weights):
    weights[FIRST_CONVOLUTION] = weights[FIRST_CONVOLUTION][:, :4].clone()
    refused(tmp_path, weights, "takes 4 channels and not 8.*--ema_state")


def test_another_noise_schedule(tmp_path: Path):
    refused(tmp_path, base_weights() | {"betas": torch.linspace(1e-4, 2e-2, 1000)}, "another noise schedule")


def damage_ema(tmp_path: Path, change: Callable[[Weights], object], match: str) -> None:
    averaged = ema_weights()
    change(averaged)
    torch.save({"model_ema": averaged}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=match):
        convert(MODEL / "tiny-original.safetensors", ema_state=tmp_path / "state.pth", **OPTIONS)


def test_faults_of_a_training_state(tmp_path: Path):
    name = UNET_WEIGHT.replace(".", "")
    damage_ema(tmp_path, lambda state: state.pop(name), f"--ema_state (?s:.*)1 missing:\n  {name}")
    damage_ema(tmp_path, lambda state: state.update(other=torch.zeros(1)), "1 unexpected:\n  other")
    damage_ema(tmp_path, lambda state: state.update({name: torch.zeros(2)}), rf"1 misshapen:\n  {name} is \[2\]")
    damage_ema(tmp_path, lambda state: state[name].fill_(float("nan")), f"--ema_state (?s:.*){UNET_WEIGHT}")


def test_training_state_in_the_place_of_a_base(tmp_path: Path):
    with pytest.raises(ValueError, match="--checkpoint_path: .* is a training state"):
        convert(write_training_state(tmp_path / "state.pth"), **OPTIONS)


def test_base_in_the_place_of_a_training_state(tmp_path: Path, weights: Weights):
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    with pytest.raises(ValueError, match=r"--ema_state: .* has no 'model_ema' .* it holds \['state_dict'\]"):
        convert(path, ema_state=path, **OPTIONS)


@pytest.mark.parametrize(("module", "name"), [("posix", "system"), ("builtins", "eval")])
def test_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, module: str, name: str):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(code_that_runs(module, name))
    with pytest.raises(ValueError, match=rf"refused, because loading it would run code \([\w.]*{name}\)"):
        convert(path, **OPTIONS)
    with pytest.raises(ValueError, match="--ema_state: .*refused, because loading it would run code"):
        convert(MODEL / "tiny-original.safetensors", ema_state=path, **OPTIONS)


def test_bare_pickle_is_not_opened(tmp_path: Path):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="Bare pickles are not opened at all, since they could run code"):
        convert(path, **OPTIONS)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 1_000_000])
def test_file_cut_short(tmp_path: Path, weights: Weights, suffix: str, kept: int):
    path = tmp_path / f"x{suffix}"
    write_ckpt(path, weights) if suffix == ".ckpt" else save_file(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"--checkpoint_path: .*x{suffix} .*cut short"):
        convert(path, **OPTIONS)


def test_file_that_is_not_there(tmp_path: Path):
    for suffix in (".ckpt", ".safetensors"):
        with pytest.raises(ValueError, match="--checkpoint_path: .* is not a file"):
            convert(tmp_path / f"none{suffix}", **OPTIONS)


def test_options_without_which_heads_are_unknown(tmp_path: Path, weights: Weights):
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    for option in OPTIONS:
        with pytest.raises(ValueError, match=f"--{option} is needed"):
            convert(path, **{name: value for name, value in OPTIONS.items() if name != option})


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_heads", 7, "unet_config.num_heads is 7, which does not divide"),
        ("num_heads", None, "unet_config.num_heads is None"),
        ("num_head_channels", 24, "unet_config.num_head_channels is 24"),
        ("model_channels", 64, "model_channels times channel_mult"),
        ("num_res_blocks", 2, r"unet_config.num_res_blocks 2 \(the weights: 1\)"),
        ("in_channels", 4, r"unet_config.in_channels 4 \(the weights: 8\)"),
        ("attention_resolutions", [1], "unet_config.attention_resolutions"),
    ],
)
def test_yaml_of_another_model(tmp_path: Path, weights: Weights, key: str, value: object, match: str):
    content = yaml.safe_load(Path(OPTIONS["original_config_file"]).read_text())
    content["model"]["params"]["unet_config"]["params"][key] = value
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    refused(tmp_path, weights, match, original_config_file=str(tmp_path / "other.yaml"))


def test_options_that_lead_nowhere(tmp_path: Path, weights: Weights):
    """Without these checks transformers gives a default configuration, or a tokenizer of two tokens."""
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path, weights, "--original_config_file: .* is not a YAML", original_config_file=str(empty))
    for name in ("text_encoder", "tokenizer"):
        for source in (str(empty), "nobody/nothing-of-this-name"):
            refused(tmp_path, weights, f"--{name}: ", **{name: source})
    shutil.copy(MODEL / "tokenizer" / "vocab.json", empty)
    shutil.copy(MODEL / "tokenizer" / "merges.txt", empty)
    refused(tmp_path, weights, "--tokenizer: .* model_max_length", tokenizer=str(empty))


def test_nothing_is_written_when_it_fails(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch):
    weights[TEXT_WEIGHT].fill_(float("nan"))
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    target = tmp_path / "made" / "pipe"
    call = ["convert", "--checkpoint_path", str(path), *options, "--dump_path", str(target)]
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(SystemExit, match=f"error: .*(?s:.*){TEXT_WEIGHT}"):
        main()
    assert not target.parent.exists()


def test_failure_while_writing_leaves_nothing(tmp_path: Path):
    with pytest.raises(OSError, match="disk full"), written_whole(tmp_path / "pipe") as folder:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_killed_while_writing_leaves_no_target_and_does_not_stop_the_next_try(tmp_path: Path):
    target = tmp_path / "pipe"
    die = (
        "import os, pathlib, signal, sys; from weights import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1])) as folder:\n"
        "    folder.mkdir(); (folder / 'half').write_text('written'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", die, str(target)], cwd=ROOT / "conversion")
    assert killed.returncode == -9
    assert not target.exists()
    with written_whole(target) as folder:
        folder.mkdir()
        (folder / "whole").write_text("written")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["pipe", "pipe/whole"]
