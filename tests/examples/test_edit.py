import sys

import edit
import numpy as np
import pytest
import tiny
from PIL import Image


@pytest.fixture
def run_edit(pipe, tmp_path, monkeypatch):
    """Runs the script as the command line would, on a model of random weights, in an empty folder."""
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["edit.py", "--model", "model", "--instruction", "tint the cat", *options])
        edit.main()

    return run


def test_answer_and_side_by_side(run_edit, tmp_path, capfd):
    # stored lying on its side, as cameras do: 6 means "turn it by a quarter clockwise"
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny.picture(96, 64).save("photo.jpg", exif=exif)
    run_edit("--image", "photo.jpg", "--output", "out.png", "--steps", "2", "--resolution", "64")
    assert "2/2" in capfd.readouterr().err, "shows progress"
    assert Image.open("out.png").size == (64, 96)
    sheet = Image.open("out-side-by-side.png")
    assert sheet.width > 2 * edit.PANEL_HEIGHT * 64 / 96, "two pictures in a row"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-side-by-side.png", "out.png"]


def test_seed_decides_the_answer(run_edit):
    tiny.picture(64, 64).save("photo.png")
    answers = []
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        run_edit("--image", "photo.png", "--output", name, "--seed", seed, "--steps", "1", "--resolution", "64")
        answers.append(np.asarray(Image.open(name)))
    assert (answers[0] == answers[1]).all()
    assert (answers[0] != answers[2]).any()


def test_an_ending_that_is_no_picture_is_refused_before_any_work(run_edit, capsys):
    with pytest.raises(SystemExit):
        run_edit("--image", "missing.png", "--output", "out.doc")
    assert "--output" in (said := capsys.readouterr().err) and ".doc" in said


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    tiny.picture(64, 64).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 63)
    with pytest.raises(Image.DecompressionBombWarning):
        edit.open_picture(tmp_path / "large.png")
