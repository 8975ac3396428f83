import sys
from pathlib import Path

import demo
import numpy as np
import pytest
import tiny
from PIL import Image
from skimage import data

from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.image_grid import MARGIN, PANEL


@pytest.fixture
def run_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["demo.py", *options])
        run_script(demo.main)

    return run


def test_the_demo_writes_a_row_for_each_family_and_an_input_image(run_demo, tmp_path):
    run_demo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-input.png", "demo.png"]
    sheet = Image.open("demo.png")
    assert sheet.width == 3 * (PANEL + MARGIN) and sheet.height > 4 * PANEL
    published = Image.open(tiny.ROOT / "docs" / "demo.jpg")
    blocks, expected = (np.asarray(each.convert("RGB").reduce(8)).astype(int) for each in (sheet, published))
    assert abs(blocks - expected).max() < 12, "the image of the README is the output of `make demo`"
    photograph, picture = demo.square(data.chelsea(), 256), Image.open("demo-input.png")
    changed = (np.asarray(photograph) != np.asarray(picture)).any(-1)
    assert changed[:10].sum() == changed[:, :10].sum() == 0 and changed.any(), "the sunflower starts at (10, 10)"


@pytest.mark.parametrize("existing", ["demo.png", "demo-input.png"])
def test_the_demo_keeps_existing_files_without_overwrite(existing, run_demo, tmp_path, capsys):
    Path(existing).write_text("old")
    with pytest.raises(SystemExit) as exit:
        run_demo()
    assert exit.value.code == 2 and f"{existing} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [existing] and Path(existing).read_text() == "old"


def test_the_demo_replaces_its_files_with_overwrite(run_demo):
    for path in (demo.INPUT, demo.OUTPUT):
        path.write_text("old")
    run_demo("--overwrite")
    assert Image.open(demo.OUTPUT).width > Image.open(demo.INPUT).width


def test_make_demo_can_be_repeated():
    makefile = (Path(demo.__file__).parent.parent / "Makefile").read_text()
    assert "examples/demo.py --overwrite\n" in makefile
