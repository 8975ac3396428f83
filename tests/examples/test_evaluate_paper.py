"""`evaluate.py --tables paper` on small datasets in their published layouts, with a model of random weights."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.evaluation.paper import PAPER_TABLES

sys.path.insert(0, str(tiny.ROOT / "tests" / "datasets"))

from paper_data import write_paper_data  # noqa: E402

SCRIPT = tiny.ROOT / "examples" / "evaluate.py"
spec = importlib.util.spec_from_file_location("evaluate_paper_tables", SCRIPT)
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model and data: all of the paper's datasets except CLWD, and a COCO with a damaged JSON."""
    work = tmp_path_factory.mktemp("work")
    InstructDiffusionPipeline(**tiny.components()).save_pretrained(work / "model")
    write_paper_data(work / "data")
    stuff = work / "data" / "coco-stuff"
    for part in ("images", "annotations"):
        (stuff / part / "val2017").mkdir(parents=True)
    (stuff / "labels.txt").write_text("1: person\n2: bicycle\n")
    tiny.picture(40, 30).save(stuff / "images" / "val2017" / "1.jpg")
    Image.fromarray(np.kron([[0, 1], [255, 0]], np.ones((15, 20))).astype(np.uint8)).save(
        stuff / "annotations" / "val2017" / "1.png"
    )
    (work / "data" / "coco" / "annotations").mkdir(parents=True)
    (work / "data" / "coco" / "annotations" / "person_keypoints_val2017.json").write_text("[")
    return work


def options(work, output, root=None):
    names = {"--model": work / "model", "--root": root or work / "data", "--output": output, "--tables": "paper"}
    return [str(part) for option in (names | {"--steps": 1, "--batch_size": 8}).items() for part in option]


def call(*arguments):
    torch.set_num_threads(1)  # sums in another order have other rounding errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        run_script(evaluate.main)


@pytest.fixture(scope="module")
def whole(work):
    call(*options(work, work / "whole"))
    return work / "whole"


def test_each_figure_of_the_paper_has_a_score(whole, work):
    text = (whole / "paper.md").read_text()
    lines = [re.findall(r"[^|]*[^| ]", line) for line in text.splitlines() if line.startswith("| ")]
    rows = {(cells[0].strip(), cells[1].strip()): [cell.strip() for cell in cells] for cells in lines}
    found = {}
    for path in whole.glob("*/results.json"):
        (row,) = json.loads(path.read_text())["rows"]
        found[row["row"]] = row
    evaluated = 0
    for table in PAPER_TABLES:
        for figure in table.figures:
            cells = rows[figure.name, figure.split]
            assert cells[-1].startswith(str(figure.score))
            if figure.key in ("coco", "clwd"):
                assert cells[2:5] == ["-", "-", "- (-)"]
                continue
            row = found[f"{figure.key} {figure.split}"]
            values = row["scores"][table.metric]
            shown = [
                f"{values[column] * (1 if table.metric == 'PSNR' else 100):.1f}" for column in ("model", "ceiling")
            ]
            assert cells[2:4] == [str(row["samples"]), "0"] and row["samples"] == {"AP": 3}.get(table.metric, 1)
            assert [f"{float(cell):.1f}" for cell in re.findall(r"[\d.]+", cells[4])] == shown
            evaluated += 1
    assert evaluated == len(found) == 24
    assert rows["SIDD", "val"][-1] == "34.26 (36.56)" and rows["VOC", "val"][-1] == "72.55"
    listed = text.partition("Not evaluated:\n\n")[2].splitlines()
    assert listed[0].startswith("- COCO val2017: ") and "must be a JSON file of COCO keypoints" in listed[0]
    assert listed[1] == f"- CLWD test: there is no folder {work}/data/CLWD."


def test_each_expression_and_class_has_a_prompt(whole):
    def questions(folder):
        return len(list((whole / folder / "answers").glob("??????-?.png")))

    assert {folder: questions(folder) for folder in ("refcoco-testa", "voc-val", "ade20k-847-validation")} == {
        "refcoco-testa": 2,
        "voc-val": 2,
        "ade20k-847-validation": 3,
    }
    sizes = {name: Image.open(whole / name / "answers" / "000000-0.png").size for name in ("gopro-test", "sidd-val")}
    assert sizes == {"gopro-test": (80, 64), "sidd-val": (32, 32)}, "GoPro's images keep their resolution"
    # 17 joints need four prompts; the 11 joints that animals and people have need three.
    assert questions("humanart-validation") == 3 * 4 and questions("ap10k-test-split1") == 3 * 3


def test_a_killed_run_is_resumed_with_the_same_files_and_new_data_is_added(whole, work, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("HumanArt", "VOCdevkit"):
        (tmp_path / "data" / name).symlink_to(work / "data" / name)
    # None of the samples of AP-10K can be scored, and RefCOCOg lacks its references.
    shutil.copytree(work / "data" / "ap-10k", tmp_path / "data" / "ap-10k")
    for picture in tmp_path.glob("data/ap-10k/data/*"):
        picture.write_bytes(b"no picture")
    (tmp_path / "data" / "coco_2014" / "refcocog").mkdir(parents=True)
    shutil.copy(
        work / "data" / "coco_2014" / "refcocog" / "instances.json", tmp_path / "data" / "coco_2014" / "refcocog"
    )
    arguments = options(work, tmp_path / "out", root=tmp_path / "data")
    child = subprocess.Popen([sys.executable, SCRIPT, *arguments], stderr=subprocess.PIPE)
    while child.poll() is None and len(list(tmp_path.glob("out/*/results.json"))) < 1:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()

    (tmp_path / "data" / "SIDD").symlink_to(work / "data" / "SIDD")
    answered = list(tmp_path.glob("out/humanart-validation/answers/??????-?.png"))
    for path in answered:
        os.utime(path, (1, 1))
    call(*arguments)
    assert len(answered) == 12 and {path.stat().st_mtime for path in answered} == {1}, "nothing is asked again"
    rows = {path.parent.name for path in tmp_path.glob("out/*/results.json")} - {"ap10k-test-split1"}
    assert rows == {"humanart-validation", "sidd-val", "voc-val"}
    for row in rows:
        assert tiny.contents(tmp_path / "out" / row, tiny.HIDDEN) == tiny.contents(whole / row), row
    lines = [(folder / "paper.md").read_text().splitlines() for folder in (tmp_path / "out", whole)]
    assert any(line.startswith("- AP-10K test-split1: `examples`: none of the 3 could be scored") for line in lines[0])
    assert any(line.startswith("- G-Ref (UMD) val: there is no file") for line in lines[0])
    assert sum(line.startswith("| ") and "| - |" not in line and line in lines[1] for line in lines[0]) == 2 * 4 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "paper"], "--root: must be a folder with one or more of ADE20K_2021_17_01, .*; got none"),
        (["--tables", "paper", "--root", "/no/such"], "--root: must be .*; /no/such has none of them"),
        (["--tables", "paper", "--root", "empty"], "--root: must be .*; empty has none of them"),
        (["--tables", "paper", "--root", "data", "--split", "val"], "cannot be combined with --split"),
        (["--tables", "paper", "--root", "data", "--clip", "x"], "cannot be combined with --split, --clip"),
        (["--tables", "paper", "--root", "data", "--image_column", "x"], r"cannot be combined with .* --\*_column"),
        (["--tables", "paper", "--data", "coco=data/coco"], "argument --data: not allowed with argument --tables"),
        (["--tables", "mine", "--root", "data"], "argument --tables: invalid choice: 'mine'"),
        (["--data", "coco=data/coco", "--root", "data"], "--root: is for --tables paper"),
        ([], "one of the arguments --data --tables is required"),
    ],
)
def test_contradictory_arguments_raise_errors(arguments, message, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    (work / "empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as exit:
        call("--model", "model", "--output", "out", *arguments)
    assert exit.value.code == 2 and re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (work / "out").exists()


def test_a_run_without_readable_data_ends_with_an_error(work, tmp_path, capsys):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit:
        call("--model", work / "model", "--output", tmp_path / "out", "--tables", "paper", "--root", tmp_path / "data")
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1 and "no dataset of the paper can be read" in error and "There is no file" in error
