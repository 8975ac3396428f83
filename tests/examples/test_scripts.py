"""Common properties of all scripts in examples/."""

import ast
import json
import runpy
import sys

import candidates
import pytest
import tiny
from PIL import Image

from instructdiffusion_pipeline.cli import run_script

SCRIPTS = sorted((tiny.ROOT / "examples").glob("*.py"))


@pytest.fixture(params=SCRIPTS, ids=[script.stem for script in SCRIPTS])
def script(request):
    return request.param


def test_help_needs_no_optional_package(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


def test_an_unknown_option_has_status_2(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--no_such_option"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_script_imports_no_other_script(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert not imported & {other.stem for other in SCRIPTS}


def test_app_prints_how_to_install_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(tiny.ROOT / "examples" / "app.py"), run_name="__main__")
    # An exit code that is a text is printed, and the status is 1.
    assert exit.value.code == 'error: gradio is not installed; `pip install ".[app]"` installs it.'


@pytest.fixture
def run_candidates(pipe, tmp_path, monkeypatch):
    """Runs candidates.py with a model of random weights and two pairs in GoPro's layout."""
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    for kind in ("blur", "sharp"):
        folder = tmp_path / "pairs" / "train" / "clip" / kind
        folder.mkdir(parents=True)
        for seed in range(2):
            tiny.picture(80, 70, seed).save(folder / f"{seed}.png")

    def run(*options):
        argv = ["candidates.py", "--model", "model", "--output", "out", "--steps", "1", *options]
        monkeypatch.setattr(sys, "argv", argv)
        run_script(candidates.main)

    return run


def test_there_is_a_candidate_image_for_each_sample_and_setting(run_candidates, tmp_path):
    run_candidates(
        *("--data", "gopro=pairs", "--samples", "2", "--resolution", "64"),
        *("--guidance_scales", "1", "2", "--image_guidance_scales", "0.5", "1.5"),
    )
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    names = {path.name for path in (tmp_path / "out" / "candidates").iterdir()}
    assert len(samples) == 2 and len(names) == 2 * 2 * 2
    assert all(Image.open(tmp_path / "out" / "candidates" / name).size == (64, 64) for name in names)
    scales = {name.partition("_s")[2] for name in names}
    assert scales == {f"{text}_i{image}.png" for text in (1, 2) for image in (0.5, 1.5)}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--data nothing=pairs", "NAME=FOLDER"),
        ("--data gopro=missing", "there is no folder missing"),
        ("--data gopro=pairs --steps 0", "--steps: must be at least 1"),
        ("--data gopro=pairs --guidance_scales nan", "--guidance_scales: must be a finite number"),
        ("--data gopro=pairs --model missing/model", "--model: must be"),
    ],
)
def test_bad_arguments_of_candidates(options, told, run_candidates, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_candidates(*options.split())
    assert exit.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
