"""The CUDA acceptance run, started by run.sh: the tests marked `cuda`, and benchmarks at full size.

It takes at most eight minutes on a GPU, and writes acceptance.json and acceptance.md. Each part runs in a separate
process. If one fails or takes too long, this is reported with its measurements so far, and the others still run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import benchmark  # noqa: E402

from instructdiffusion_pipeline.cli import UsageError, run_script  # noqa: E402
from instructdiffusion_pipeline.files import write_text  # noqa: E402

# Seconds for each part on a GPU. With imports and the installation of packages, the run takes at most 480.
LIMITS = {"tests": 225, "inference": 45, "inference, compiled": 70, "training": 65, "training, LoRA": 60}
REHEARSAL_LIMIT = 600  # for each part, because other programs may use the cores
LIBRARIES = (torch, diffusers, transformers, accelerate, peft)
# The first of each pair is for a GPU, the second for the rehearsal.
MODEL = ("full", "tiny")
TRAINING = (
    {"size": 256, "batch_size": 32, "num_workers": 8, "rounds": 1, "updates": 15},
    {"size": 32, "batch_size": 2, "num_workers": 0, "rounds": 1, "updates": 1},
)
INFERENCE = (
    {"size": 512, "batch_sizes": (1, 8), "steps": 10, "rounds": 3, "backend": "inductor"},
    {"size": 64, "batch_sizes": (1, 2), "steps": 1, "rounds": 1, "backend": "eager"},
)
LORA_RANK = 16

Send = Callable[[Any], None]
Part = Callable[[Send], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set of the bundle")
    parser.add_argument("--cpu", action="store_true", help="rehearse the run in miniature, without a GPU")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the report (default: the current one)")
    args = parser.parse_args()
    if not args.output.is_dir():
        raise UsageError(f"--output: there is no folder {args.output}.")
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU; --cpu rehearses the run without one.")
    os.environ["CUDA_BUNDLE_DATA"] = str(args.data.resolve())
    start = time.monotonic()

    training = {"model": MODEL[args.cpu], "data": f"coco-stuff={args.data}", **TRAINING[args.cpu]}
    inference = {"model": MODEL[args.cpu], **INFERENCE[args.cpu]}
    parts: dict[str, Part] = {
        "tests": run_tests,
        "inference": partial(run_inference, compiled=False, **inference),
        "inference, compiled": partial(run_inference, compiled=True, **inference),
        "training": partial(run_training, lora_rank=None, **training),
        "training, LoRA": partial(run_training, lora_rank=LORA_RANK, **training),
    }
    report: dict[str, Any] = {
        "device": None if args.cpu else describe_gpu(),
        "python": platform.python_version(),
        "libraries": {library.__name__: library.__version__ for library in LIBRARIES},
        "training settings": training | {"data": "coco-stuff", "lora_rank": LORA_RANK},
        "inference settings": inference,
    }
    for name, part in parts.items():
        print(f"=== {name}", flush=True)
        # A forked process needs no imports, but cannot use the GPU after this process has queried its name.
        method = "fork" if args.cpu else "spawn"
        report[name] = run_part(part, REHEARSAL_LIMIT if args.cpu else LIMITS[name], method)
    report["seconds"] = round(time.monotonic() - start)
    write_text(args.output / "acceptance.json", json.dumps(report, indent=2) + "\n")
    write_text(args.output / "acceptance.md", table(report, list(parts)))
    print((args.output / "acceptance.md").read_text())
    if failed := [name for name in parts if "error" in report[name]]:
        raise ValueError(f"these parts failed: {', '.join(failed)}; see acceptance.json.")


def describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def run_part(part: Part, limit: float, method: str) -> dict[str, Any]:
    """Run a part in a new process for at most `limit` seconds.

    Returns the results that it sent, and "error" if it failed. `method` is the start method of multiprocessing.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=call, args=(part, sender))
    process.start()
    sender.close()
    result: dict[str, Any] = {}
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            if (message := receiver.recv()) is None:
                break
            result |= message
        else:
            result["error"] = f"stopped after {limit:.0f} seconds"
    except EOFError:
        process.join(10)
        result.setdefault("error", f"the process ended with exit status {process.exitcode}")
    process.kill()  # even if the part is complete, because a process can take long to end
    process.join()
    return result


def call(part: Part, sender: Any) -> None:
    # A spawned process would also spawn data loader workers, which would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    try:
        part(sender.send)
    except BaseException:
        sender.send({"error": traceback.format_exc()})
    sys.stdout.flush()
    sender.send(None)  # the part is complete


class Outcomes:
    """A pytest plugin that sends the outcomes of all tests so far after each test."""

    def __init__(self, send: Send):
        self.send, self.tests = send, list[dict[str, Any]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            test = {"name": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "seconds": report.duration}
            if not report.passed:
                test["message"] = report.longrepr[2] if report.skipped else report.longreprtext
            self.tests.append(test)
            self.send({"tests": self.tests})


def run_tests(send: Send) -> None:
    status = pytest.main(["-m", "cuda", "-p", "no:cacheprovider", str(Path(__file__).parent)], [Outcomes(send)])
    if status:
        send({"error": f"pytest ended with exit status {int(status)}"})


def run_training(
    send: Send,
    model: str,
    size: int,
    data: str,
    batch_size: int,
    lora_rank: int | None,
    num_workers: int,
    rounds: int,
    updates: int,
) -> None:
    pipeline = benchmark.build(model)
    samples = benchmark.training_samples(pipeline, size, [data])
    config = benchmark.training_config(batch_size, lora_rank, num_workers)
    send(benchmark.compare_training(pipeline, samples, config, rounds, updates))


def run_inference(send: Send, model: str, **settings: Any) -> None:
    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for group in benchmark.compare_inference(benchmark.build(model), device=device, **settings):
        rows += group
        send({"rows": rows})


def table(report: dict[str, Any], parts: list[str]) -> str:
    """The report as Markdown."""
    device = report["device"]
    machine = f"{device['name']}, {device['memory_gib']} GiB, CUDA {device['cuda']}" if device else "CPU, in miniature"
    libraries = ", ".join(f"{name} {version}" for name, version in report["libraries"].items())
    lines = ["# CUDA acceptance run", "", f"{machine}; Python {report['python']}, {libraries}; {report['seconds']} s"]
    for name in parts:
        lines += ["", f"## {name}", ""]
        if name == "tests":
            lines += ["| test | outcome | seconds |", "|---|---|---|"]
            for test in report[name].get("tests", []):
                reason = f": {test['message']}" if test["outcome"] == "skipped" else ""
                lines.append(f"| {test['name']} | {test['outcome']}{reason} | {test['seconds']:.1f} |")
        elif "rows" in report[name]:
            settings = report[f"{name.partition(',')[0]} settings"]
            lines += [
                ", ".join(f"{key} {value}" for key, value in settings.items()),
                "",
                benchmark.table(report[name]),
            ]
        if "error" in report[name]:
            lines += ["", f"error: {report[name]['error'].strip().splitlines()[-1]}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
