"""Scripts with a damaged model folder or a full disk end with a one-line message and a status. Seeds are fixed."""

import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import edit
import push_to_hub
import pytest
import tiny
from test_conversion_fuzz import damage_a_file
from test_train import script as train

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script

PARTS = ["*.json", "unet/*", "vae/*", "text_encoder/*", "scheduler/*", "tokenizer/*"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes one step by default, and an image."""
    folder = tmp_path_factory.mktemp("good")
    settings = {"editing": {"num_inference_steps": 1}}
    InstructDiffusionPipeline(**tiny.components(), task_settings=settings).save_pretrained(folder / "model")
    tiny.picture(64, 64).save(folder / "photo.png")
    return folder


def command(name: str, good: Path, model: Path) -> tuple[Callable[[], None], list[object]]:
    """The main function of a script and its options. Training and pushing are replaced with functions that fail."""
    match name:
        case "edit":
            options = ["--image", good / "photo.png", "--instruction", "x", "--output", model.parent / "out.png"]
            return edit.main, ["--model", model, *options]
        case "train":
            options = ["--data", f"gopro={good}", "--output_dir", model.parent / "out", "--max_train_steps", 1]
            return train.main, ["--init", model, *options]
    return push_to_hub.main, ["--model", model, "--repo_id", "nobody/nothing"]


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 300), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", ["edit", "train", "push_to_hub"])
def test_a_damaged_model_ends_with_a_one_line_message(
    good: Path,
    name: str,
    seeds: range,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = 0
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        model = shutil.copytree(good / "model", tmp_path / str(seed) / "model")
        if rng.random() < 0.15:
            rng.choice(sorted(path for path in model.rglob("*") if path.is_file())).unlink()
        else:
            damage_a_file(model, rng.choice(PARTS), rng)
        main, options = command(name, good, model)
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        try:
            run_script(main)
        except SystemExit as ended:
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert ended.code in (1, 2) and len(lines) == 1, f"seed {seed}: {lines}"
            refused += lines[0].startswith(("error: --model: ", "error: --init: "))
            assert not list(model.parent.rglob("out.png")) and not list(model.parent.glob(".*")), seed
        shutil.rmtree(tmp_path / str(seed))
    assert refused


def start(options: list[object], folder: Path, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run edit.py. With `file_size`, files cannot have more bytes than that."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [sys.executable, edit.__file__, *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=limit)


@pytest.mark.slow
def test_an_output_on_a_full_disk_ends_with_a_one_line_message(good: Path, tmp_path: Path) -> None:
    _, options = command("edit", good, good / "model")
    done = start([*options, "--output", tmp_path / "out.png"], tmp_path, file_size=1000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []
