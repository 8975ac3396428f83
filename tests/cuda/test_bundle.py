"""The CUDA acceptance run, rehearsed on a CPU, and its bundle."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time

import acceptance
import bundle
import numpy as np
import pytest
from wheels import WHEELS

from instructdiffusion_pipeline.datasets.label_maps import CocoStuff
from instructdiffusion_pipeline.datasets.specs import load_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle in a checkout's build folder, without wheels, because this environment has all packages."""
    root = tmp_path_factory.mktemp("checkout")
    for part in ("src", "tests", "examples", "setup.cfg"):
        (root / part).symlink_to(bundle.ROOT / part)
    folder = root / "build" / "cuda"
    folder.mkdir(parents=True)
    shutil.copy(bundle.HERE / "run.sh", folder)
    bundle.write_data(folder / "data", {"train2017": 8, "val2017": 4})
    return folder


def run(folder, cwd, *options):
    command = ["bash", folder / "run.sh", *options]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )


@pytest.mark.slow  # many seconds, most of them in new processes
def test_the_rehearsal_runs_all_parts(folder, tmp_path):
    ended = run(folder, tmp_path, "--cpu")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    report = json.loads((tmp_path / "acceptance.json").read_text())
    assert report["device"] is None
    tests = report["tests"]["tests"]
    assert sum(test["outcome"] == "passed" for test in tests) >= 10
    assert {test["message"] for test in tests if test["outcome"] != "passed"} == {"Skipped: needs CUDA"}
    for part in ("training", "training, LoRA"):
        assert [row["name"] for row in report[part]["rows"]] == ["diffusers' recipe", "train", "train, cached"]
    assert report["training, LoRA"]["unet_flop_per_sample"] < report["training"]["unet_flop_per_sample"]
    for part, compiled in (("inference", False), ("inference, compiled", True)):
        rows = report[part]["rows"][::3]
        assert [(row["batch_size"], row["compiled"]) for row in rows] == [(1, compiled), (2, compiled)]
    table = (tmp_path / "acceptance.md").read_text()
    assert table in ended.stdout and table.count("| diffusers' recipe |") == 2


def test_without_a_gpu_the_run_fails(folder, tmp_path):
    if acceptance.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = run(folder, tmp_path)
    assert ended.returncode == 2 and "--cpu rehearses the run" in ended.stderr and not list(tmp_path.iterdir())


def test_a_bundle_without_a_checkout_fails(folder, tmp_path):
    alone = tmp_path / "parent" / "bundle"
    alone.mkdir(parents=True)
    shutil.copy(folder / "run.sh", alone)
    ended = run(alone, tmp_path)
    assert ended.returncode == 2 and ended.stderr == f"error: there is no checkout beside {alone}\n"


def fails(send):
    send({"rows": [1]})
    raise ValueError("boom")


def hangs(send):
    send({"rows": [1]})
    send({"rows": [1, 2]})
    time.sleep(60)


def dies(send):
    send({"rows": [1]})
    os._exit(3)


@pytest.mark.parametrize(
    ("part", "rows", "error"),
    [(fails, [1], "ValueError: boom"), (hangs, [1, 2], "stopped after 1 seconds"), (dies, [1], "exit status 3")],
)
def test_a_failed_part_is_reported_with_its_results(part, rows, error):
    result = acceptance.run_part(part, 1, "fork")
    assert result["rows"] == rows and error in result["error"]


def ends_slowly(send):
    send({"rows": [1]})
    threading.Thread(target=time.sleep, args=(60,)).start()


def test_a_complete_part_is_not_an_error_if_its_process_ends_slowly():
    assert acceptance.run_part(ends_slowly, 10, "fork") == {"rows": [1]}


def start_method(send):
    send({"method": multiprocessing.get_start_method()})


def test_a_spawned_part_forks_its_data_loader_workers():
    assert acceptance.run_part(start_method, 100, "spawn") == {"method": "fork"}


def test_the_dataset_can_be_trained_on_and_its_masks_are_sunflowers(folder):
    ((source, _),) = load_sources([f"coco-stuff={folder / 'data'}"], 64)
    assert len(source.dataset) == 8 and not source.dataset.skipped
    for image, masks in CocoStuff(folder / "data", "val2017"):
        assert masks.keys() == {"horse", "sunflower"} and not masks["horse"].any()
        rows, columns = np.nonzero(masks["sunflower"])
        assert 0.05 < masks["sunflower"].mean() < 0.4 and columns.min() >= 80 and columns.max() < 560
        red, _, blue = np.asarray(image)[masks["sunflower"]].mean(0)
        assert red > blue + 50, "yellow"


def test_wheels_are_pinned():
    lines = (bundle.ROOT / "constraints.txt").read_text().splitlines()
    assert set(WHEELS) <= {line.partition("==")[0].replace("-", "_") for line in lines}
