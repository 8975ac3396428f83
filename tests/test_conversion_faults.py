"""Faulty checkpoints raise an error that describes the fault, and nothing is written."""

import resource
import shutil
import signal
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

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError, run_script

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
def test_a_missing_weight_is_reported(tmp_path: Path, weights: Weights, name: str):
    del weights[name]
    said = refused(tmp_path, weights, "1 missing")
    assert name in said and "wrong shape" not in said


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
def test_an_unexpected_weight_is_reported(tmp_path: Path, weights: Weights, name: str):
    weights[name] = torch.zeros(3)
    assert f"{name} [3]" in refused(tmp_path, weights, "1 unexpected")


@pytest.mark.parametrize("name", [UNET_WEIGHT, VAE_WEIGHT, TEXT_WEIGHT])
def test_only_the_weight_of_a_wrong_shape_is_reported(tmp_path: Path, weights: Weights, name: str):
    weights[name] = weights[name][1:].clone()
    said = refused(tmp_path, weights, "1 of a wrong shape")
    assert f"{name} has shape {list(weights[name].shape)} and must have" in said


def test_all_faults_are_listed(tmp_path: Path, weights: Weights):
    del weights[UNET_WEIGHT], weights[VAE_WEIGHT]
    weights["extra"] = torch.zeros(1)
    said = refused(tmp_path, weights, "2 missing")
    assert UNET_WEIGHT in said and VAE_WEIGHT in said and "1 unexpected:\n  extra" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_reported(tmp_path: Path, weights: Weights, value: float):
    for name in (UNET_WEIGHT, VAE_WEIGHT):
        weights[name].view(-1)[7] = value
    said = refused(tmp_path, weights, "2 weights are NaN, infinite")
    assert UNET_WEIGHT in said and VAE_WEIGHT in said


def test_weights_too_large_for_float16_are_reported(tmp_path: Path, weights: Weights):
    weights[UNET_WEIGHT].view(-1)[0] = 1e5
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    convert(path, **OPTIONS)
    with pytest.raises(ValueError, match=f"{UNET_WEIGHT} .out of range for torch.float16; convert without --half"):
        convert(path, half=True, **OPTIONS)


def test_weights_of_an_unsupported_type_are_reported(tmp_path: Path, weights: Weights):
    weights[UNET_WEIGHT] = weights[UNET_WEIGHT].to(torch.float8_e4m3fn)
    refused(tmp_path, weights, f"{UNET_WEIGHT} .torch.float8_e4m3fn")


def test_a_missing_component_raises_an_error(tmp_path: Path, weights: Weights):
    refused(
        tmp_path, {n: t for n, t in weights.items() if not n.startswith("first_stage_model.")}, "first_stage_model"
    )


def test_stable_diffusion_alone_raises_an_error(tmp_path: Path, weights: Weights):
    weights[FIRST_CONVOLUTION] = weights[FIRST_CONVOLUTION][:, :4].clone()
    refused(tmp_path, weights, "4 input channels instead of 8.*--ema_state")


def test_another_noise_schedule_raises_an_error(tmp_path: Path):
    refused(tmp_path, base_weights() | {"betas": torch.linspace(1e-4, 2e-2, 1000)}, "another noise schedule")
    betas = base_weights()["betas"]
    refused(tmp_path, base_weights() | {"betas": 1.01 * betas}, "another noise schedule")
    refused(tmp_path, base_weights() | {"betas": betas[:999]}, "another noise schedule")
    convert(write_ckpt(tmp_path / "rounded.ckpt", base_weights() | {"betas": 1.0001 * betas}), **OPTIONS)


@pytest.mark.parametrize("entry", [{"notes": "mine"}, {7: torch.zeros(1)}])
def test_entries_other_than_named_tensors_raise_errors(tmp_path: Path, weights: Weights, entry: Weights):
    refused(tmp_path, weights | entry, r"--checkpoint_path: .* 'state_dict' must contain only named tensors; got \[")


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
    damage_ema(
        tmp_path, lambda state: state.update({name: torch.zeros(2)}), rf"1 of a wrong shape:\n  {name} has shape \[2\]"
    )
    damage_ema(tmp_path, lambda state: state[name].fill_(float("nan")), f"--ema_state (?s:.*){UNET_WEIGHT}")


def test_a_training_state_as_checkpoint_raises_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="--checkpoint_path: .* is a training state"):
        convert(write_training_state(tmp_path / "state.pth"), **OPTIONS)


def test_a_checkpoint_as_training_state_raises_an_error(tmp_path: Path, weights: Weights):
    path = write_ckpt(tmp_path / "x.ckpt", weights)
    with pytest.raises(ValueError, match=r"--ema_state: .* must have 'model_ema' .* got \['state_dict'\]"):
        convert(path, ema_state=path, **OPTIONS)


@pytest.mark.parametrize(("module", "name"), [("posix", "system"), ("builtins", "eval")])
def test_a_pickle_with_code_raises_an_error(tmp_path: Path, module: str, name: str):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(code_that_runs(module, name))
    with pytest.raises(ValueError, match=rf"was not loaded, because that would run code \([\w.]*{name}\)"):
        convert(path, **OPTIONS)
    with pytest.raises(ValueError, match="--ema_state: .*was not loaded, because that would run code"):
        convert(MODEL / "tiny-original.safetensors", ema_state=path, **OPTIONS)


def test_a_plain_pickle_raises_an_error(tmp_path: Path):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="older pickle format are not supported, because they could run code"):
        convert(path, **OPTIONS)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 1_000_000])
def test_a_truncated_file_raises_an_error(tmp_path: Path, weights: Weights, suffix: str, kept: int):
    path = tmp_path / f"x{suffix}"
    write_ckpt(path, weights) if suffix == ".ckpt" else save_file(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"--checkpoint_path: .*x{suffix} .*truncated"):
        convert(path, **OPTIONS)


def test_a_missing_file_raises_an_error(tmp_path: Path):
    for suffix in (".ckpt", ".safetensors"):
        with pytest.raises(ValueError, match="--checkpoint_path: .* is not a file"):
            convert(tmp_path / f"none{suffix}", **OPTIONS)


def test_options_that_determine_head_counts_are_required(tmp_path: Path, weights: Weights):
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
def test_a_configuration_of_another_model_raises_an_error(
    tmp_path: Path, weights: Weights, key: str, value: object, match: str
):
    content = yaml.safe_load(Path(OPTIONS["original_config_file"]).read_text())
    content["model"]["params"]["unet_config"]["params"][key] = value
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    refused(tmp_path, weights, match, original_config_file=str(tmp_path / "other.yaml"))


def test_options_without_their_files_raise_errors(tmp_path: Path, weights: Weights):
    """transformers would return a default configuration, or a tokenizer of two tokens."""
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path, weights, "--original_config_file: .* is not a YAML", original_config_file=str(empty))
    for name in ("text_encoder", "tokenizer"):
        for source in (str(empty), "nobody/nothing-of-this-name"):
            refused(tmp_path, weights, f"--{name}: ", **{name: source})
    shutil.copy(MODEL / "tokenizer" / "vocab.json", empty)
    shutil.copy(MODEL / "tokenizer" / "merges.txt", empty)
    refused(tmp_path, weights, "--tokenizer: model_max_length", tokenizer=str(empty))


def arguments(checkpoint: Path, target: Path) -> list[str]:
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    return ["--checkpoint_path", str(checkpoint), *options, "--dump_path", str(target)]


def run(checkpoint: Path, target: Path, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script. With `file_size`, files cannot have more bytes than that."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [sys.executable, "convert_original_checkpoint.py", *arguments(checkpoint, target)]
    return subprocess.run(command, cwd=ROOT / "conversion", capture_output=True, text=True, preexec_fn=limit)


def test_a_failed_conversion_writes_nothing(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch):
    weights[TEXT_WEIGHT].fill_(float("nan"))
    target = tmp_path / "made" / "pipe"
    monkeypatch.setattr("sys.argv", ["convert", *arguments(write_ckpt(tmp_path / "x.ckpt", weights), target)])
    with pytest.raises(ValueError, match=TEXT_WEIGHT):
        main()
    assert not target.parent.exists()


def test_a_failure_during_writing_leaves_no_files(tmp_path: Path, weights: Weights):
    checkpoint = write_ckpt(tmp_path / "x.ckpt", weights)
    failed = run(checkpoint, tmp_path / "made" / "pipe", file_size=100_000)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in failed.stderr
    assert not list((tmp_path / "made").iterdir())


def test_bad_argument_ends_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["convert", *arguments(tmp_path / "none.ckpt", tmp_path / "pipe")])
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: --checkpoint_path: {tmp_path / 'none.ckpt'} is not a file.\n"


def test_other_files_are_kept(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch):
    checkpoint, target = write_ckpt(tmp_path / "x.ckpt", weights), tmp_path / "pipe"
    kept = {tmp_path / "pipe.partial" / "notes.txt": "mine", tmp_path / ".pipe.old" / "notes.txt": "mine, too"}
    for path, text in kept.items():
        path.parent.mkdir()
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["convert", *arguments(checkpoint, target)])
    target.mkdir()  # an empty folder may exist
    main()
    InstructDiffusionPipeline.from_pretrained(target)
    assert {path: path.read_text() for path in kept} == kept
    with pytest.raises(UsageError, match="--dump_path: .* already exists"):
        main()
