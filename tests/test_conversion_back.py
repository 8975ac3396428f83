"""Conversion to the layout of the original code and back is exact, for the golden model and for other sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import MODEL, OPTIONS, released_weights, write_ckpt
from convert_original_checkpoint import convert
from convert_to_original import convert_back, main
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from original_names import original_names
from safetensors.torch import load_file, save_file
from tiny import components, earlier_names
from transformers import CLIPTextConfig, CLIPTextModel

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError
from instructdiffusion_pipeline.files import update_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("there")
    convert(write_ckpt(path / "released.ckpt", released_weights()), **OPTIONS).save_pretrained(path / "pipe")
    return path / "pipe"


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_round_trip_is_exact(folder: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "new" / "folder" / f"back{suffix}"
    monkeypatch.setattr("sys.argv", ["back", "--model_path", str(folder), "--checkpoint_path", str(target)])
    main()
    back = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)["state_dict"]
    assert_identical(back, released_weights())
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    with pytest.raises(UsageError, match="--checkpoint_path: .* already exists"):
        main()


def test_the_values_for_the_original_configuration_are_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(folder, tmp_path / "pipe")
    schedule = {"beta_start": 1e-5, "beta_end": 0.02, "num_train_timesteps": 500}
    update_json(tmp_path / "pipe" / "scheduler" / "scheduler_config.json", schedule)
    update_json(tmp_path / "pipe" / "vae" / "config.json", {"scaling_factor": 0.5})
    arguments = ["--model_path", tmp_path / "pipe", "--checkpoint_path", tmp_path / "back.ckpt"]
    monkeypatch.setattr("sys.argv", ["back", *map(str, arguments)])
    main()
    printed = capsys.readouterr().out.partition("in model.params:\n")[2]
    expected = {"linear_start": 1e-5, "linear_end": 0.02, "timesteps": 500, "scale_factor": 0.5}
    assert yaml.safe_load(printed) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta_schedule", "linear"), ("rescale_betas_zero_snr", True), ("trained_betas", [0.5] * 1000)],
)
def test_another_noise_schedule_raises_an_error(folder: Path, tmp_path: Path, name: str, value: Any):
    shutil.copytree(folder, tmp_path / "pipe")
    update_json(tmp_path / "pipe" / "scheduler" / "scheduler_config.json", {name: value})
    with pytest.raises(UsageError, match=f"the original code does not support .*: scheduler has {name} "):
        convert_back(tmp_path / "pipe")


def test_shards_and_half_precision(tmp_path: Path):
    there = convert(MODEL / "tiny-original.safetensors", half=True, **OPTIONS)
    there.save_pretrained(tmp_path / "pipe", max_shard_size="1MB")
    assert len(list((tmp_path / "pipe" / "unet").glob("*.safetensors"))) > 1
    assert_identical(
        convert_back(tmp_path / "pipe"), {name: tensor.half() for name, tensor in released_weights().items()}
    )


def test_weights_with_names_of_earlier_versions_are_read(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "pipe")
    for component, prefix in (("vae", ""), ("text_encoder", "text_model.")):
        (file,) = (tmp_path / "pipe" / component).glob("*.safetensors")
        save_file(earlier_names(load_file(file), prefix), file)
    assert_identical(convert_back(tmp_path / "pipe"), released_weights())


def test_faults_of_a_folder_raise_errors(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--model_path: .* has no unet/config.json"):
        convert_back(tmp_path)
    InstructDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.weight"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ValueError, match="1 weights are NaN(?s:.*)first_stage_model.decoder.conv_out.weight"):
        convert_back(tmp_path)
    del weights["decoder.conv_out.weight"]
    save_file(weights, file)
    with pytest.raises(ValueError, match="1 missing:\n  decoder.conv_out.weight"):
        convert_back(tmp_path)
    save_file(weights, file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match="another file in .* also has"):
        convert_back(tmp_path)


@pytest.mark.parametrize("layers", [2**40, [2, 2**40]])
def test_more_layers_than_weights_raise_an_error(folder: Path, tmp_path: Path, layers: int | list[int]):
    shutil.copytree(folder, tmp_path / "pipe")
    config = tmp_path / "pipe" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": layers}))
    with pytest.raises(
        UsageError, match=r"--model_path: unet has .* weights, but layers_per_block is .*1099511627776"
    ):
        convert_back(tmp_path / "pipe")


def test_a_layer_missing_in_the_original_code_raises_an_error():
    unet = components()["unet"]
    with pytest.raises(ValueError, match="unet: .* no weight that corresponds to class_embedding.weight"):
        original_names("unet", ["conv_in.weight", "class_embedding.weight"], unet.config)


def test_a_model_unsupported_by_the_original_code_raises_an_error():
    shipped = Path(__file__).parent.parent / "examples" / "instructdiffusion-tiny"
    with pytest.raises(ValueError, match="vae has norm_num_groups 8 instead of 32; vae has mid_block") as error:
        convert_back(shipped)
    assert "scheduler has prediction_type 'v_prediction' instead of 'epsilon'" in str(error.value)


def test_a_wrong_suffix_raises_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    call = ["back", "--model_path", str(folder), "--checkpoint_path", str(tmp_path / "back.bin")]
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(UsageError, match="--checkpoint_path: must end in .safetensors or .ckpt; got .*back.bin"):
        main()


widths = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    unet=widths,
    vae=widths,
    unet_layers=st.integers(1, 2),
    vae_layers=st.integers(1, 2),
    text_layers=st.integers(1, 3),
    attends=st.lists(st.booleans(), min_size=3, max_size=3),
    heads=st.sampled_from([{"num_heads": 4}, {"num_heads": -1, "num_head_channels": 16}]),
)
def test_round_trips_of_other_sizes(
    unet: list[int],
    vae: list[int],
    unet_layers: int,
    vae_layers: int,
    text_layers: int,
    attends: list[bool],
    heads: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
):
    """A round trip is exact for all sizes that the original code supports. The reference are diffusers' converters."""
    path = tmp_path_factory.mktemp("sizes")
    attends = attends[: len(unet)]
    channels = [32 * factor for factor in unet]
    number = heads["num_heads"] if heads["num_heads"] > 0 else [width // 16 for width in channels]
    torch.manual_seed(0)
    parts = components() | {
        "unet": UNet2DConditionModel(
            in_channels=8,
            block_out_channels=tuple(channels),
            layers_per_block=unet_layers,
            down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
            cross_attention_dim=48,
            attention_head_dim=number,
        ),
        "vae": AutoencoderKL(
            block_out_channels=tuple(32 * factor for factor in vae),
            layers_per_block=vae_layers,
            down_block_types=("DownEncoderBlock2D",) * len(vae),
            up_block_types=("UpDecoderBlock2D",) * len(vae),
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=1000,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=text_layers,
                num_attention_heads=6,
            )
        ),
    }
    pipe = InstructDiffusionPipeline(**parts)
    pipe.save_pretrained(path / "pipe")
    save_file(convert_back(path / "pipe"), path / "back.safetensors")

    described: dict[str, Any] = {
        "unet_config": {
            "params": heads
            | {
                "in_channels": 8,
                "out_channels": 4,
                "model_channels": 32,
                "channel_mult": unet,
                "num_res_blocks": unet_layers,
                "attention_resolutions": [2**level for level, yes in enumerate(attends) if yes],
                "context_dim": 48,
            }
        },
        "first_stage_config": {
            "params": {"ddconfig": {"ch": 32, "ch_mult": vae, "num_res_blocks": vae_layers, "z_channels": 4}}
        },
    }
    (path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": described}}))
    again = convert(
        path / "back.safetensors",
        original_config_file=path / "model.yaml",
        text_encoder=str(path / "pipe" / "text_encoder"),
        tokenizer=OPTIONS["tokenizer"],
    )
    for component in ("unet", "vae", "text_encoder"):
        assert_identical(getattr(again, component).state_dict(), getattr(pipe, component).state_dict())
    given_heads, found_heads = (p.unet.config.attention_head_dim for p in (pipe, again))
    assert found_heads == (given_heads if isinstance(given_heads, int) else tuple(given_heads))
