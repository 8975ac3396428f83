import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import demo
import edit
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from skimage import data

from instructdiffusion_pipeline import Editing, InstructDiffusionPipeline, ask
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.image_grid import MARGIN, PANEL

INSTRUCTION = "remove the sunflower"


@pytest.fixture
def run_edit(pipe, tmp_path, monkeypatch):
    """Runs the script in this process, with a model of random weights, in a folder with a photograph."""
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tiny.picture(64, 64).save("photo.png")

    def run(*options):
        argv = ["edit.py", "--model", "model", "--image", "photo.png", "--instruction", "tint the cat", *options]
        monkeypatch.setattr(sys, "argv", argv)
        run_script(edit.main)

    return run


def start(*options):
    """Start the script in a separate process, which Ctrl-C stops even if the tests run in the background."""
    command = [sys.executable, edit.__file__, "--instruction", INSTRUCTION, *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_without_options_the_output_is_that_of_ask_and_of_the_pipeline(tmp_path):
    photograph, output = tmp_path / "photo.png", tmp_path / "out.png"
    image = demo.with_overlay(demo.square(data.chelsea(), 256), "sunflower", (10, 10))
    image.save(photograph)
    process = start("--image", str(photograph), "--output", str(output))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr

    pipe = InstructDiffusionPipeline.from_pretrained(edit.TINY_MODEL)
    asked = ask(pipe, image, Editing(INSTRUCTION), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(Image.open(output), asked.data)
    generator = torch.Generator().manual_seed(0)
    called = pipe(INSTRUCTION, image, resize_mode="stretch", generator=generator).images[0]
    np.testing.assert_array_equal(asked.picture, called)

    steps = json.loads((edit.TINY_MODEL / "model_index.json").read_text())["task_settings"]["editing"]
    assert f"| {steps['num_inference_steps']}/{steps['num_inference_steps']} " in stderr.splitlines()[-1]


def test_the_edited_image_and_the_side_by_side_image_are_written(run_edit, tmp_path, capfd):
    # stored rotated, as cameras do: 6 means "rotate clockwise by 90 degrees"
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny.picture(96, 64).save("photo.jpg", exif=exif)
    run_edit("--image", "photo.jpg", "--output", "out.png", "--steps", "2", "--resolution", "64")
    assert "2/2" in capfd.readouterr().err, "shows progress"
    assert Image.open("out.png").size == (64, 96)
    assert Image.open("out-side-by-side.png").width == 3 * (MARGIN + PANEL)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "photo.png", "photo.jpg", "out.png", "out-side-by-side.png"
    }  # fmt: skip


def test_options_are_passed_to_the_pipeline(run_edit, pipe):
    run_edit(
        *("--output", "out.png", "--steps", "2", "--guidance_scale", "3", "--image_guidance_scale", "0.7"),
        *("--resolution", "0", "--seed", "5"),
    )
    expected = ask(
        pipe,
        tiny.picture(64, 64),
        Editing("tint the cat"),
        num_inference_steps=2,
        guidance_scale=3.0,
        image_guidance_scale=0.7,
        resolution=0,
        generator=torch.Generator().manual_seed(5),
    ).data
    np.testing.assert_array_equal(Image.open("out.png"), expected)


def test_a_wide_image_is_edited_completely(run_edit):
    tiny.picture(100, 64).save("wide.png")
    run_edit("--image", "wide.png", "--output", "out.png", "--steps", "1", "--resolution", "64")
    assert Image.open("out.png").size == (100, 64)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--steps 0", "--steps: must be at least 1; got 0"),
        ("--steps many", "--steps: invalid integer value: 'many'"),
        ("--resolution 8", "--resolution must be 0 .* at least 16 .* got 8"),
        ("--resolution -64", "--resolution must be 0 .* got -64"),
        ("--guidance_scale nan", "--guidance_scale: must be a finite number; got nan"),
        ("--image_guidance_scale inf", "--image_guidance_scale: must be a finite number; got inf"),
        ("--seed -1", "--seed: must be from 0 to 18446744073709551615; got -1"),
        *(
            (f"--output out.{kind}", rf"--output: must have the extension of a format for RGB images .* out\.{kind}")
            for kind in ("doc", "ico", "icns", "gif", "xbm", "pdf")
        ),
        ("--output missing/out.png", "--output: .*there is no folder missing"),
        ("--output photo.png --overwrite", r"--output: must not overwrite the input photo\.png"),
        ("--image missing.png", r"--image: missing\.png cannot be read as an image"),
        ("--image text.png", r"--image: text\.png cannot be read as an image"),
        ("--image strip.png --resolution 64", "--image of 640 x 1 pixels is too elongated"),
        ("", "--model: must be a folder or a Hub id; there is no folder missing/model"),
    ],
)
def test_an_invalid_argument_ends_with_one_line_before_the_model_is_loaded(options, told, run_edit, tmp_path, capsys):
    Path("text.png").write_text("text")
    tiny.picture(640, 1).save("strip.png")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as exit:
        run_edit("--model", "missing/model", *options.split())
    assert exit.value.code == 2
    assert re.search(rf"error: (argument )?{told}", capsys.readouterr().err.splitlines()[-1])
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_image_too_elongated_for_the_model_s_size_raises_an_error(run_edit, capsys):
    tiny.picture(640, 1).save("strip.png")
    with pytest.raises(SystemExit) as exit:
        run_edit("--image", "strip.png")
    assert exit.value.code == 2 and "too elongated" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("existing", ["out.png", "out-side-by-side.png"])
def test_existing_files_are_kept_without_overwrite(existing, run_edit, tmp_path, capsys):
    Path(existing).write_text("old")
    options = ("--output", "out.png", "--steps", "1", "--resolution", "64")
    with pytest.raises(SystemExit) as exit:
        run_edit(*options)
    assert exit.value.code == 2 and f"{existing} exists" in capsys.readouterr().err
    assert Path(existing).read_text() == "old" and len(list(tmp_path.glob("out*"))) == 1
    run_edit(*options, "--overwrite")
    assert Image.open(existing).size[0] >= 64 and len(list(tmp_path.glob("out*"))) == 2


@pytest.mark.parametrize("output", ["photo.png", "./sub/../photo.png", "link.png"])
def test_the_input_is_never_replaced(output, run_edit):
    Path("sub").mkdir()
    Path("link.png").symlink_to("photo.png")
    before = Path("photo.png").read_bytes()
    with pytest.raises(SystemExit) as exit:
        run_edit("--output", output, "--steps", "1", "--resolution", "64", "--overwrite")
    assert exit.value.code == 2 and Path("photo.png").read_bytes() == before


def test_the_side_by_side_file_does_not_replace_the_input(run_edit):
    tiny.picture(64, 64).save("a-side-by-side.png")
    before = Path("a-side-by-side.png").read_bytes()
    with pytest.raises(SystemExit) as exit:
        run_edit("--image", "a-side-by-side.png", "--output", "a.png", "--overwrite")
    assert exit.value.code == 2 and Path("a-side-by-side.png").read_bytes() == before


def test_ctrl_c_ends_with_a_one_line_message_and_writes_no_file(tmp_path):
    tiny.picture(64, 64).save(tmp_path / "photo.png")
    process = start("--image", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out.png"), "--steps", "1000")
    shown = ""
    while "/1000 " not in shown:  # denoising has started
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted" and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_bad_argument_in_a_process_has_status_2(tmp_path):
    tiny.picture(64, 64).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    process = start("--image", str(tmp_path / "photo.png"), "--output", str(tmp_path / "photo.png"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and (tmp_path / "photo.png").read_bytes() == before
    assert stderr.splitlines()[-1].startswith("error: --output: must not overwrite the input")
