"""Damaged files of all kinds: a conversion succeeds, or ends with one line that names an option. Seeds are fixed."""

import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_original_checkpoint
import convert_to_original
import pytest
import yaml
from checkpoints import MODEL, OPTIONS, released_weights, write_ckpt, write_training_state
from safetensors.torch import save_file

from instructdiffusion_pipeline.cli import run_script

JUNK = [None, True, 0, -1, 1, 7, 2**40, 0.5, 1e300, float("nan"), "", "x", [], [1], ["a"], [None], {}, {"a": 1}]
BASE = str(MODEL / "tiny-original.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undamaged files of all kinds."""
    folder = tmp_path_factory.mktemp("good")
    write_ckpt(folder / "base.ckpt", released_weights())
    save_file(released_weights(), folder / "base.safetensors")
    write_training_state(folder / "state.pth")
    convert_original_checkpoint.convert(BASE, **OPTIONS).save_pretrained(folder / "pipeline")
    return folder


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, remove or insert bytes, mostly near the start, or remove the end."""
    damaged = bytearray(content)
    place = rng.randrange(rng.choice([min(200, len(content)), len(content)]))
    kind = rng.choice(["flip", "cut", "insert", "truncate"])
    if kind == "flip":
        for byte in range(place, min(place + rng.randint(1, 20), len(content))):
            damaged[byte] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del damaged[place:]
    else:
        damaged[place : place + (kind == "cut") * 50] = b"" if kind == "cut" else rng.randbytes(50)
    return bytes(damaged)


def damage_values(content: Any, rng: random.Random) -> Any:
    """Remove an entry of a nested structure, or replace it with a value of another type."""
    if not isinstance(content, (dict, list)) or not content or rng.random() < 0.1:
        return rng.choice(JUNK)
    place = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
    if rng.random() < 0.1:
        del content[place]
    else:
        content[place] = damage_values(content[place], rng)
    return content


def damage_pickle(content: bytes, rng: random.Random) -> bytes:
    """Damage the pickle inside an otherwise undamaged archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as good, zipfile.ZipFile(archive, "w") as bad:
        for name in good.namelist():
            entry = good.read(name)
            bad.writestr(name, damage_bytes(entry, rng) if name.endswith("data.pkl") else entry)
    return archive.getvalue()


def damage_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(damage_values(json.loads(content), rng)).encode()


def damage_yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(damage_values(yaml.safe_load(content), rng)).encode()


def damage_a_file(folder: Path, pattern: str, rng: random.Random) -> Path:
    """Damage one file of a folder: JSON by value or by byte, others by byte."""
    file = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
    by_value = file.suffix == ".json" and rng.random() < 0.7
    file.write_bytes((damage_json if by_value else damage_bytes)(file.read_bytes(), rng))
    return folder


def copied(
    source: Path | str, folder: Path, change: Callable[[bytes, random.Random], bytes], rng: random.Random
) -> Path:
    target = folder / Path(source).name
    target.write_bytes(change(Path(source).read_bytes(), rng))
    return target


def command(kind: str, files: Path, folder: Path, rng: random.Random) -> dict[str, Any]:
    """The options of a conversion, one of which is the path of a damaged file."""
    good: dict[str, Any] = {"checkpoint_path": BASE, **OPTIONS, "dump_path": folder / "out"}
    match kind:
        case "ckpt" | "safetensors":
            return good | {"checkpoint_path": copied(files / f"base.{kind}", folder, damage_bytes, rng)}
        case "pickle":
            return good | {"checkpoint_path": copied(files / "base.ckpt", folder, damage_pickle, rng)}
        case "ema_state":
            return good | {"ema_state": copied(files / "state.pth", folder, damage_bytes, rng)}
        case "ema_pickle":
            return good | {"ema_state": copied(files / "state.pth", folder, damage_pickle, rng)}
        case "ema_safetensors":
            return good | {"ema_state": copied(files / "base.safetensors", folder, damage_bytes, rng)}
        case "original_config_file":
            change = damage_yaml if rng.random() < 0.8 else damage_bytes
            return good | {kind: copied(OPTIONS[kind], folder, change, rng)}
        case "text_encoder" | "tokenizer":
            shutil.copytree(OPTIONS[kind], folder / kind)
            return good | {kind: damage_a_file(folder / kind, "*", rng)}
    shutil.copytree(files / "pipeline", folder / "pipeline")
    part = rng.choice(["unet", "vae", "text_encoder", "scheduler"])
    model = damage_a_file(folder / "pipeline", f"{part}/*", rng)
    return {"model_path": model, "checkpoint_path": folder / "out.safetensors"}


KINDS = ["ckpt", "safetensors", "pickle", "ema_state", "ema_pickle", "ema_safetensors"]
KINDS += ["original_config_file", "text_encoder", "tokenizer", "model_path"]
SEEDS = [pytest.param(range(5), id="few"), pytest.param(range(5, 100), id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_with_a_one_line_message(
    files: Path,
    tmp_path: Path,
    kind: str,
    seeds: range,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        options = command(kind, files, folder, random.Random(f"{kind} {seed}"))
        script = convert_to_original if kind == "model_path" else convert_original_checkpoint
        monkeypatch.setattr("sys.argv", ["convert", *(f"--{name}={value}" for name, value in options.items())])
        try:
            run_script(script.main)
        except SystemExit as ended:
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert ended.code in (1, 2) and len(lines) == 1, f"seed {seed}: {lines}"
            assert not list(folder.glob(".*")) and not list(folder.glob("out*"))
        shutil.rmtree(folder)
