"""Exit statuses and messages of the scripts, and the checks of their arguments."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerAncestralDiscreteScheduler
from hub_server import running_hub
from PIL import Image
from safetensors import SafetensorError
from skimage.data import astronaut
from skimage.metrics import peak_signal_noise_ratio

from instructdiffusion_pipeline.cli import (
    UsageError,
    check_output,
    finite,
    integer,
    load_pipeline,
    open_image,
    run_script,
)
from instructdiffusion_pipeline.files import save_image


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("--steps: must be at least 1"), 2, "error: --steps: must be at least 1"),
        (ValueError("first\nsecond"), 1, "error: first second"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "error: [Errno 2] No such file: 'a.png'"),
        (FloatingPointError("the loss is not finite"), 1, "error: the loss is not finite"),
        (SafetensorError("header too large"), 1, "error: header too large"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory"),
        (
            ModuleNotFoundError("No module named 'skimage.data'", name="skimage.data"),
            1,
            "error: No module named 'skimage.data'; `pip install \".[eval]\"` installs it.",
        ),
        (KeyboardInterrupt(), 130, "\nerror: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: disk full: [Errno 28] No space left on device"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            "error: disk full: I/O error: No space left on device (os error 28)",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            1,
            "error: disk full: [enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        ),
    ],
)
def test_a_failure_ends_with_a_one_line_message_and_a_status(error, status, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(raiser(error))
    assert exit.value.code == status
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    "error",
    [
        TypeError("x"),
        AttributeError("x"),
        IndexError("x"),
        KeyError("x"),
        RuntimeError(),
        ModuleNotFoundError("x", name="x"),
    ],
)
def test_a_programming_error_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        run_script(raiser(error))
    assert raised.value is error


def test_a_bad_argument_of_argparse_has_status_2():
    with pytest.raises(SystemExit) as exit:
        run_script(lambda: argparse.ArgumentParser().error("no"))
    assert exit.value.code == 2


def test_a_closed_output_pipe_ends_with_status_141():
    code = "from instructdiffusion_pipeline.cli import run_script\nrun_script(lambda: print('x' * 10**6))"
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 141 and b"Traceback" not in stderr and b"BrokenPipe" not in stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device that is always full")
def test_a_full_disk_ends_with_a_one_line_message():
    code = "from instructdiffusion_pipeline.cli import run_script\nrun_script(lambda: print('done'))"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: disk full: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("argument_type", "text", "told"),
    [
        (integer(1), "0", "must be at least 1; got 0"),
        (integer(0, 9), "10", "must be from 0 to 9; got 10"),
        (integer(1), "1.5", "invalid integer value: '1.5'"),
        (finite, "nan", "must be a finite number; got nan"),
        (finite, "inf", "must be a finite number; got inf"),
        (finite, "much", "invalid finite value: 'much'"),
    ],
)
def test_numbers_are_checked(argument_type, text, told, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=argument_type)
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--x", text])
    assert exit.value.code == 2 and told in capsys.readouterr().err


def test_numbers_at_their_limits_are_accepted():
    assert [integer(1, 9)("1"), integer(1, 9)("9"), integer(0)("123"), finite("-1e3")] == [1, 9, 123, -1000]


def test_a_model_is_loaded_in_float32_on_a_cpu(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    cuda = torch.cuda.is_available()
    assert loaded.unet.dtype == loaded.vae.dtype == (torch.float16 if cuda else torch.float32)
    assert loaded.device.type == ("cuda" if cuda else "cpu")


@pytest.mark.parametrize("scheduler", sorted(each.__name__ for each in EulerAncestralDiscreteScheduler().compatibles))
def test_models_of_all_schedulers_are_loaded(scheduler, pipe, tmp_path):
    """PNDM cannot run a single step."""
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path).scheduler).__name__ == scheduler


@pytest.mark.parametrize("model", ["no-such-folder", "no/such/folder", "nobody/nothing", "bad name", "", "empty"])
def test_an_unknown_model_raises_a_usage_error(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=rf"^--model: must be .*{model}"):
        load_pipeline(model)


LOADS = "from instructdiffusion_pipeline.cli import *; run_script(lambda: load_pipeline('nobody/nothing'))"


def load_from(endpoint, tmp_path):
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", LOADS], env=os.environ | environment, capture_output=True, text=True, timeout=240
    )


def test_a_model_that_is_not_on_the_hub_raises_a_usage_error(tmp_path):
    with running_hub() as hub:
        result = load_from(hub.url, tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: --model: must be a folder or a Hub id")


def test_an_unreachable_hub_raises_an_os_error(tmp_path):
    result = load_from("http://127.0.0.1:9", tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Connection refused" in result.stderr.splitlines()[-1]


def test_an_opened_image_is_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    stored = tiny.picture(96, 64)
    stored.save(tmp_path / "photo.png", exif=exif)
    expected = np.rot90(np.asarray(stored), -1)
    np.testing.assert_array_equal(open_image("--image", tmp_path / "photo.png"), expected)


def test_files_that_are_not_images_raise_errors(tmp_path):
    whole = tmp_path / "whole.png"
    tiny.picture(64, 64).save(whole)
    damaged = bytearray(whole.read_bytes())
    damaged[damaged.index(b"IDAT") + 40] ^= 255
    cases = {
        "text.png": b"text",
        "empty.png": b"",
        "cut.png": whole.read_bytes()[:3000],
        "damaged.png": bytes(damaged),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "missing.png", "."):
        with pytest.raises(UsageError, match=r"^--image: .* cannot be read as an image"):
            open_image("--image", tmp_path / name)


def test_a_decompression_bomb_raises_an_error(tmp_path, monkeypatch):
    tiny.picture(64, 64).save(tmp_path / "large.png")
    for limit in (64 * 63, 64 * 31):  # Pillow warns above the limit, and raises an error above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UsageError, match="decompression bomb"):
            open_image("--image", tmp_path / "large.png")


def test_saved_photographs_keep_their_details_and_colors(tmp_path):
    """With Pillow's defaults for JPEG, the PSNR is 31 dB."""
    photograph = astronaut()
    image = Image.fromarray(photograph)
    image.save(tmp_path / "compressed.tif", compression="tiff_lzw")
    least = {".jpg": 40, ".JPEG": 40, ".webp": 38, ".png": np.inf, ".avif": 30, ".tif": np.inf}
    for suffix, least_psnr in least.items():
        save_image(tmp_path / f"out{suffix}", Image.open(tmp_path / "compressed.tif"))
        with np.errstate(divide="ignore"):
            written = np.asarray(Image.open(tmp_path / f"out{suffix}"))
            assert peak_signal_noise_ratio(photograph, written) >= least_psnr


def test_an_output_file_must_be_new_or_be_overwritten(tmp_path):
    (tmp_path / "old").write_text("")
    check_output("--output", tmp_path / "new", overwrite=False)
    check_output("--output", tmp_path / "old", overwrite=True)
    with pytest.raises(UsageError, match=r"^--output: .*old exists; --overwrite"):
        check_output("--output", tmp_path / "old", overwrite=False)


def test_invalid_output_paths_raise_errors(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        check_output("--output", tmp_path / "missing" / "new", overwrite=True)
    with pytest.raises(UsageError, match="is a folder"):
        check_output("--output", tmp_path, overwrite=True)


@pytest.mark.parametrize("spelling", ["input", "sub/../input", "symbolic", "hard"])
def test_an_input_file_is_never_overwritten(spelling, tmp_path):
    source = tmp_path / "input"
    source.write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "symbolic").symlink_to("input")
    (tmp_path / "hard").hardlink_to(source)
    with pytest.raises(UsageError, match="must not overwrite the input"):
        check_output("--output", tmp_path / spelling, overwrite=True, inputs=[source])
