"""The configurations that conversion infers, and errors for files that do not fit each other."""

import gzip
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architecture import read_original_config, scheduler_config, text_config, unet_config, vae_config
from checkpoints import MODEL, OPTIONS, released_weights
from convert_original_checkpoint import load_tokenizer

from instructdiffusion_pipeline.cli import UsageError

Shapes = dict[str, torch.Size]
# As in the configurations of Stable Diffusion 1.5 in diffusers' format; the UNet has 8 input channels.
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
}
SD15_VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 768,
}
SD15_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
}


@pytest.fixture(scope="module")
def full_size() -> Shapes:
    """The shapes of InstructDiffusion's weights in the original code."""
    keys = json.loads(gzip.decompress((MODEL / "full-size.keys.json.gz").read_bytes()))
    return {name: torch.Size(shape) for name, (shape, _) in keys.items()}


@pytest.fixture(scope="module")
def small() -> Shapes:
    return {name: tensor.shape for name, tensor in released_weights().items()}


def test_default_configurations_are_those_of_stable_diffusion(full_size: Shapes):
    assert unet_config(full_size, None) == SD15_UNET
    assert vae_config(full_size, None) == SD15_VAE
    text = text_config(full_size, None).to_dict()
    assert {name: text[name] for name in SD15_TEXT} == SD15_TEXT
    assert scheduler_config(None) == SD15_SCHEDULER


@pytest.mark.parametrize(
    "name",
    ["embeddings.position_embedding.weight", "encoder.layers.11.mlp.fc1.weight", "embeddings.token_embedding.weight"],
)
def test_a_text_encoder_of_another_size_needs_its_configuration(full_size: Shapes, name: str):
    name = f"cond_stage_model.transformer.text_model.{name}"
    changed = (
        {key: shape for key, shape in full_size.items() if "layers.11" not in key}
        if "layers" in name
        else dict(full_size)
    )
    if "layers" not in name:
        changed[name] = torch.Size((full_size[name][0] + 1, full_size[name][1]))
    with pytest.raises(UsageError, match="--text_encoder is needed: "):
        text_config(changed, None)


def described(**changes: Any) -> dict[str, Any]:
    content = yaml.safe_load(Path(OPTIONS["original_config_file"]).read_text())
    content["model"]["params"] |= changes
    return content


def test_the_original_configuration_gives_schedule_scale_and_heads(small: Shapes, tmp_path: Path):
    changes = {"linear_start": 0.001, "linear_end": 0.02, "timesteps": 500, "scale_factor": 0.5}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described(**changes)))
    original = read_original_config(tmp_path / "other.yaml")
    expected = {"beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 500}
    assert scheduler_config(original) == SD15_SCHEDULER | expected
    assert vae_config(small, original)["scaling_factor"] == 0.5
    assert unet_config(small, original)["attention_head_dim"] == 8
    del original["unet_config"]["params"]["num_heads"]
    original["unet_config"]["params"]["num_head_channels"] = 16
    assert unet_config(small, original)["attention_head_dim"] == (2, 2, 2, 4)
    original["unet_config"]["params"]["num_head_channels"] = 32
    assert unet_config(small, original)["attention_head_dim"] == (1, 1, 1, 2)


@pytest.mark.parametrize(("name", "value"), [("parameterization", "v"), ("beta_schedule", "cosine")])
def test_another_parameterization_or_schedule_raises_an_error(tmp_path: Path, name: str, value: str):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described(**{name: value})))
    with pytest.raises(UsageError, match=f"model.params.{name} must be (eps|linear), as .*; got '{value}'"):
        read_original_config(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"linear_start": 0},
        {"linear_start": 1.01},
        {"linear_end": -0.1},
        {"linear_end": "0.012"},
        {"scale_factor": 1000.5},
        {"scale_factor": True},
        {"scale_factor": float("nan")},
        {"timesteps": 10.5},
        {"timesteps": 100_001},
    ],
    ids=str,
)
def test_numbers_out_of_range_raise_errors(tmp_path: Path, changes: Mapping[str, Any]):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described(**changes)))
    ((name, value),) = changes.items()
    with pytest.raises(
        UsageError, match=rf"model.params.{name} must be a number above 0 and at most .*; got {value!r}"
    ):
        read_original_config(tmp_path / "other.yaml")


def test_numbers_at_their_limits_are_read(tmp_path: Path):
    changes = {"linear_start": 1, "linear_end": 1.0, "scale_factor": 1000, "timesteps": 100_000}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(described(**changes)))
    assert read_original_config(tmp_path / "other.yaml").items() >= changes.items()


def test_a_unet_with_another_text_width_needs_its_configuration(full_size: Shapes):
    wider = {
        name: torch.Size((shape[0], 1024)) if re.search(r"attn2\.to_[kv]\.weight$", name) else shape
        for name, shape in full_size.items()
    }
    with pytest.raises(UsageError, match="--original_config_file is needed: .* text width 1024"):
        unet_config(wider, None)


def test_a_weight_of_a_wrong_shape_does_not_change_the_inferred_size(full_size: Shapes):
    name = next(name for name in full_size if name.endswith("attn2.to_k.weight"))
    assert unet_config(full_size | {name: torch.Size((320,))}, None) == SD15_UNET


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"num_heads": 1}, 1),
        ({"num_heads": 64}, "unet_config.num_heads is 64, which does not divide the UNet's widths"),
        ({"num_heads": -1}, "unet_config.num_heads is -1"),
        ({"num_heads": -1, "num_head_channels": 1}, (32, 32, 32, 64)),
        ({"num_heads": -1, "num_head_channels": 64}, "unet_config.num_head_channels is 64"),
    ],
    ids=str,
)
def test_heads_must_divide_all_widths(small: Shapes, changes: dict[str, int], heads: Any):
    original = described()["model"]["params"]
    params = original["unet_config"]["params"]
    del params["num_heads"], params["transformer_depth"]
    params |= {name: value for name, value in changes.items() if value != -1}
    if isinstance(heads, str):
        with pytest.raises(UsageError, match=f"--original_config_file: {heads}"):
            unet_config(small, original)
    else:
        assert unet_config(small, original)["attention_head_dim"] == heads


@pytest.mark.parametrize("missing", ["ch", "ch_mult"])
def test_a_configuration_without_widths_raises_an_error(small: Shapes, missing: str):
    original = described()["model"]["params"]
    del original["first_stage_config"]["params"]["ddconfig"][missing]
    with pytest.raises(UsageError, match=r"ch times ch_mult None \(the weights: \(32, 64, 32, 32\)\)"):
        vae_config(small, original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"describes another text encoder: hidden_size 64 \(the weights: 32\)"),
        ({"num_hidden_layers": 3, "vocab_size": 999}, "num_hidden_layers 3 .*, vocab_size 999"),
        ({"num_attention_heads": 5}, "hidden size .32. is not a multiple of the number of attention heads .5."),
        ({"num_attention_heads": 0}, "no text configuration could be read"),
        ({"num_attention_heads": -4}, "must have at least one head; got -4"),
    ],
    ids=str,
)
def test_the_configuration_of_another_text_encoder_raises_an_error(
    small: Shapes, tmp_path: Path, changes: dict[str, int], message: str
):
    content = json.loads((MODEL / "text_encoder" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(UsageError, match=f"--text_encoder: .*{message}"):
        text_config(small, str(tmp_path))


def test_a_single_head_is_accepted(small: Shapes, tmp_path: Path):
    content = json.loads((MODEL / "text_encoder" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_attention_heads": 1}))
    assert text_config(small, str(tmp_path)).num_attention_heads == 1


def test_a_folder_without_config_raises_an_error(small: Shapes, tmp_path: Path):
    with pytest.raises(UsageError, match="--text_encoder: .* has no config.json"):
        text_config(small, str(tmp_path))


def test_a_missing_weight_that_determines_a_size_is_reported(small: Shapes):
    name = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    without = {key: shape for key, shape in small.items() if key != name}
    with pytest.raises(UsageError, match=f"must be an InstructDiffusion .*; there is no {name}"):
        text_config(without, OPTIONS["text_encoder"])


def test_tokenizers_that_do_not_fit_raise_errors(small: Shapes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = text_config(small, OPTIONS["text_encoder"])
    assert len(load_tokenizer(OPTIONS["tokenizer"], text)) == text.vocab_size == 1000
    assert capsys.readouterr().err == ""
    text.vocab_size = 1001
    load_tokenizer(OPTIONS["tokenizer"], text)
    assert "has 1000 tokens, but the text encoder has 1001" in capsys.readouterr().err
    text.vocab_size = 999
    with pytest.raises(UsageError, match="--tokenizer: .* has 1000 tokens, but the text encoder has only 999"):
        load_tokenizer(OPTIONS["tokenizer"], text)
    shutil.copytree(OPTIONS["tokenizer"], tmp_path / "short")
    file = tmp_path / "short" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 78}))
    text.vocab_size = 1000
    with pytest.raises(UsageError, match="model_max_length .* must be 77, .* has 78"):
        load_tokenizer(str(tmp_path / "short"), text)
