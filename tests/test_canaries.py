"""Files that run code if they are trusted. Conversion, and loading without trust, must not run it."""

import contextlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, OPTIONS
from convert_original_checkpoint import convert
from convert_to_original import convert_back
from diffusers import DiffusionPipeline, ModularPipeline

from instructdiffusion_pipeline import InstructDiffusionBlocks, InstructDiffusionPipeline, export
from instructdiffusion_pipeline.cli import load_pipeline

BASE = MODEL / "tiny-original.safetensors"


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.canary)!r}, 'w')",)


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w')\nclass InstructDiffusionPipeline: ...\n"


def zipped(path: Path, canary: Path) -> Path:
    torch.save({"state_dict": {}}, path.with_suffix(".good"))
    with zipfile.ZipFile(path.with_suffix(".good")) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickle.dumps(Touch(canary)) if name.endswith("data.pkl") else good.read(name))
    return path


def bare(path: Path, canary: Path) -> Path:
    path.write_bytes(pickle.dumps(Touch(canary)))
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_the_files_run_code_if_they_are_trusted(tmp_path: Path, canary: Path) -> None:
    for path in (zipped(tmp_path / "x.ckpt", canary), bare(tmp_path / "y.ckpt", canary)):
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert canary.exists()
        canary.unlink()
    exec(code(canary))
    assert canary.exists()


@pytest.mark.parametrize("write", [zipped, bare])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_a_checkpoint_runs_no_code(
    tmp_path: Path, canary: Path, write: Callable[[Path, Path], Path], suffix: str
) -> None:
    path = write(tmp_path / f"x{suffix}", canary)
    for options in ({"checkpoint_path": path}, {"checkpoint_path": BASE, "ema_state": path}):
        with pytest.raises(ValueError, match=f"--{list(options)[-1]}: "):
            convert(**options, **OPTIONS)
    assert not canary.exists()


def test_an_original_config_file_runs_no_code(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"model: !!python/object/apply:builtins.open [{canary}, w]")
    with pytest.raises(ValueError, match="--original_config_file: "):
        convert(BASE, **(OPTIONS | {"original_config_file": path}))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("option", "file", "kind"),
    [("text_encoder", "config.json", "AutoConfig"), ("tokenizer", "tokenizer_config.json", "AutoTokenizer")],
)
def test_a_folder_of_the_text_encoder_or_tokenizer_runs_no_code(
    tmp_path: Path, canary: Path, option: str, file: str, kind: str
) -> None:
    folder = shutil.copytree(OPTIONS[option], tmp_path / option)
    settings = json.loads((folder / file).read_text()) | {"auto_map": {kind: "code.InstructDiffusionPipeline"}}
    (folder / file).write_text(json.dumps(settings))
    (folder / "code.py").write_text(code(canary))
    convert(BASE, **(OPTIONS | {option: str(folder)}))
    assert not canary.exists()


@pytest.fixture
def folder(pipe: InstructDiffusionPipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def change_index(folder: Path, **changes: object) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


LOADERS = [InstructDiffusionPipeline.from_pretrained, DiffusionPipeline.from_pretrained, load_pipeline]


@pytest.mark.parametrize("load", LOADERS)
def test_code_in_a_folder_is_not_run(folder: Path, canary: Path, load: Callable) -> None:
    (folder / "pipeline_instruct_diffusion.py").write_text(code(canary))
    change_index(folder, _class_name=["pipeline_instruct_diffusion", "InstructDiffusionPipeline"])
    with contextlib.suppress(ValueError):  # diffusers asks for trust; this package does not need the code.
        assert isinstance(load(folder), InstructDiffusionPipeline)
    assert not canary.exists()


@pytest.mark.parametrize("load", [ModularPipeline.from_pretrained, InstructDiffusionBlocks().init_pipeline])
def test_blocks_in_a_folder_are_not_run(
    pipe: InstructDiffusionPipeline, tmp_path: Path, canary: Path, load: Callable
) -> None:
    export(pipe, tmp_path / "exported")
    for file in (tmp_path / "exported").glob("*.py"):
        file.write_text(code(canary))
    with contextlib.suppress(ValueError):  # diffusers asks for trust; this package does not need the code.
        load(str(tmp_path / "exported")).load_components()
    assert not canary.exists()


@pytest.mark.parametrize("load", LOADERS)
def test_code_of_a_component_is_not_run(folder: Path, canary: Path, load: Callable) -> None:
    (folder / "unet" / "code.py").write_text(code(canary))
    change_index(folder, unet=["code", "InstructDiffusionPipeline"])
    with pytest.raises(Exception):  # noqa: B017 (diffusers raises errors of several classes)
        load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("write", [zipped, bare])
@pytest.mark.parametrize(
    ("component", "file"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_of_a_component_run_no_code(
    folder: Path, canary: Path, component: str, file: str, write: Callable[[Path, Path], Path]
) -> None:
    for weights in (folder / component).glob("*.safetensors"):
        weights.unlink()
    write(folder / component / file, canary)
    with pytest.raises(Exception):  # noqa: B017 (diffusers and transformers raise errors of several classes)
        InstructDiffusionPipeline.from_pretrained(folder)
    assert not canary.exists()


@pytest.mark.parametrize("write", [zipped, bare])
@pytest.mark.parametrize("load", ["load_lora_weights", "load_textual_inversion", "load_ip_adapter"])
def test_pickled_lora_weights_and_embeddings_run_no_code(
    pipe: InstructDiffusionPipeline, tmp_path: Path, canary: Path, write: Callable[[Path, Path], Path], load: str
) -> None:
    write(tmp_path / "weights.bin", canary)
    options = {"subfolder": ""} if load == "load_ip_adapter" else {}
    with pytest.raises(Exception):  # noqa: B017 (diffusers raises errors of several classes)
        getattr(pipe, load)(str(tmp_path), weight_name="weights.bin", **options)
    assert not canary.exists()


@pytest.mark.parametrize("write", [zipped, bare])
def test_conversion_to_the_original_format_runs_no_code(
    folder: Path, canary: Path, write: Callable[[Path, Path], Path]
) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    write(weights, canary)
    with pytest.raises(ValueError, match="--model_path: "):
        convert_back(folder)
    assert not canary.exists()
