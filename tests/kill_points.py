"""Kill a program at many points, resume it, and compare its files: kill_points.py OPERATION COUNT FOLDER.

Each run is a forked process. It is killed just before its n-th change of the file system (an audit event of Python),
and at other audit events if it makes fewer changes than COUNT. Then it is started again and not killed.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "conversion"), str(TESTS.parent / "examples")]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "evaluation")]

import convert_original_checkpoint  # noqa: E402
import predict  # noqa: E402
import run_tiny  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from checkpoints import MODEL, OPTIONS  # noqa: E402
from pairs import mixture  # noqa: E402

from instructdiffusion_pipeline import InstructDiffusionPipeline, export  # noqa: E402
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, cache_samples, train  # noqa: E402
from instructdiffusion_pipeline.training import cache as cache_module  # noqa: E402

# Logs, and states that training does not use, differ between runs.
LEFT_OUT = (*tiny.HIDDEN, "logs", "random_states")
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
PIPELINE = InstructDiffusionPipeline(**tiny.components())
SAMPLES = ImageDataset(mixture(), PIPELINE.tokenizer)


def run_main(main: Callable[[], None], *options: object) -> None:
    sys.argv = ["script", *map(str, options)]
    main()


def exported(folder: Path) -> None:
    if not (folder / "model").exists():
        export(PIPELINE, folder / "model")


def converted(folder: Path) -> None:
    options = {"checkpoint_path": MODEL / "tiny-original.safetensors", **OPTIONS, "dump_path": folder / "model"}
    if not (folder / "model").exists():
        run_main(convert_original_checkpoint.main, *(f"--{name}={value}" for name, value in options.items()))


def evaluated(folder: Path) -> None:
    run_tiny.run(folder / "evaluation")


def cached(folder: Path) -> None:
    cache_module.SHARD_SIZE = 1
    cache_samples(SAMPLES, 24, PIPELINE, folder / "cache", num_workers=0)


def trained(folder: Path) -> None:
    config = TrainingConfig(
        max_train_steps=5, batch_size=1, ema_decay=0.9, checkpointing_steps=1, learning_rate=1e-3, num_workers=0
    )
    pipe = train(InstructDiffusionPipeline(**tiny.components()), SAMPLES, config, folder / "run", resume="latest")
    torch.save(pipe.unet.state_dict(), folder / "weights.pt")


def predicted(folder: Path) -> None:
    model, photos = folder.parent / "model", folder.parent / "photos"
    options = ["--images", photos, "--model", model, "--output", folder / "out", "--batch_size", 2]
    run_main(predict.main, *options, "--task", "segmentation", "--objects", "cat, dog", "--steps", 1)


OPERATIONS = {
    "export": exported,
    "conversion": converted,
    "evaluation": evaluated,
    "caching": cached,
    "training": trained,
    "prediction": predicted,
}


def is_change(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Whether an audit event is a change of the file system in `folder`."""
    writes = event in CHANGES or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(writes) and str(arguments[0]).startswith(str(folder))


def fork(operation: Callable[[Path], None], folder: Path, kind: str = "", number: int = 0) -> int:
    """Run `operation` in a process that is killed at the `number`-th change or event; returns its exit code."""
    child = os.fork()
    if child == 0:
        counts = {"changes": 0, "events": 0}

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "os.kill":  # from this hook itself
                return
            for counted in ("events", *(["changes"] if is_change(event, arguments, folder) else [])):
                if counted == kind and counts[counted] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                counts[counted] += 1

        sys.addaudithook(hook)
        status = 1
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                operation(folder)
            (folder.parent / "counts.json").write_text(json.dumps(counts))
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def new(folder: Path) -> Path:
    """An empty folder with files of the user, whose names are like those of temporary files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("partial", "model.partial", ".model.mine", "run/partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("mine")
    return folder


def main(name: str, count: int, root: Path) -> None:
    operation = OPERATIONS[name]
    PIPELINE.save_pretrained(root / "model")
    (root / "photos").mkdir()
    for seed in range(8):
        tiny.picture(64, 64, seed).save(root / "photos" / f"{seed}.png")
    started = time.monotonic()
    assert fork(operation, new(root / "whole")) == 0
    seconds = round(time.monotonic() - started, 2)
    expected, counts = tiny.contents(root / "whole", LEFT_OUT), json.loads((root / "counts.json").read_text())

    at_changes = min(count, counts["changes"])
    points = [("changes", round(i * counts["changes"] / at_changes)) for i in range(at_changes)]
    points += [
        ("events", round((i + 0.5) * counts["events"] / (count - at_changes))) for i in range(count - at_changes)
    ]
    for point in points:
        folder = new(root / "broken")
        assert fork(operation, folder, *point) == -signal.SIGKILL, point
        assert fork(operation, folder) == 0, point
        found = tiny.contents(folder, LEFT_OUT)
        assert found.keys() == expected.keys(), (point, found.keys() ^ expected.keys())
        assert found == expected, (point, [path for path in found if found[path] != expected[path]])
        assert (folder / ".model.mine" / "notes.txt").read_text() == "mine", point
    print(json.dumps({"operation": name, "killed": len(points), **counts, "seconds": seconds}))


if __name__ == "__main__":
    with suppress(ImportError):
        import transformers

        transformers.logging.set_verbosity_error()
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
