"""The model at full size with random weights is converted in little memory, loads, and runs."""

import gzip
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import MODEL, OPTIONS
from safetensors.torch import save_file
from tiny import ROOT, picture

from instructdiffusion_pipeline import InstructDiffusionPipeline

MEMORY_BOUND = 1.3  # peak memory of the conversion, in sizes of the file
# The value that Linux reports for the process; ru_maxrss would start at the peak of the parent process.
MEASURE = (
    "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, 'conversion')\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
    "print('peak', int(status['VmHWM'].split()[0]) * 1024)"
)


def random_weights() -> dict[str, torch.Tensor]:
    """Values for each of the 1,143 entries, which are small, so that two steps are finite in bfloat16."""
    entries = json.loads(gzip.decompress((MODEL / "full-size.keys.json.gz").read_bytes()))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.arange(77)[None] if dtype == "int64" else torch.randn(shape, generator=generator).mul_(0.02)
        for name, (shape, dtype) in entries.items()
    }
    weights["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    return weights


def convert_measured(checkpoint: Path, target: Path, *options: str) -> float:
    """Run the script, and return its peak memory in sizes of the file."""
    script = ["conversion/convert_original_checkpoint.py", "--checkpoint_path", str(checkpoint)]
    # CLIP's vocabulary is not available without a network. The tiny one has valid ids, but fewer of them.
    script += ["--tokenizer", OPTIONS["tokenizer"], "--dump_path", str(target), *options]
    done = subprocess.run([sys.executable, "-c", MEASURE, *script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    peak = int(done.stdout.split()[-1])
    ratio = peak / checkpoint.stat().st_size
    print(f"\n{checkpoint.name} {' '.join(options)}: peak {peak / 1e9:.2f} GB, {ratio:.2f} of the file's size")
    return ratio


@pytest.mark.slow
def test_full_size_converts_loads_and_runs(tmp_path: Path):
    """Writes up to 13 GB to the temporary folder, and removes them."""
    weights = random_weights()
    assert len(weights) == 1143
    checkpoints = tmp_path / "full.ckpt", tmp_path / "full.safetensors"
    torch.save({"state_dict": weights}, checkpoints[0])
    save_file(weights, checkpoints[1])
    del weights

    target = tmp_path / "pipe"
    try:
        for checkpoint in checkpoints:
            for options in ((), ("--half",)):
                assert convert_measured(checkpoint, target.with_name("new"), *options) <= MEMORY_BOUND
                if not options:
                    remove(target)
                    target.with_name("new").rename(target)
                remove(target.with_name("new"))

        pipe = InstructDiffusionPipeline.from_pretrained(target, dtype=torch.bfloat16)
        started = time.perf_counter()
        answer = pipe(
            "tint the cat blue",
            picture(512, 512),
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="pt",
        ).images
        print(f"two steps at 512 x 512 in bfloat16: {time.perf_counter() - started:.0f} s")
        print(f"peak of the test itself: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
        assert answer.shape == (1, 3, 512, 512)
        assert answer.isfinite().all()
    finally:
        for path in (*checkpoints, target, target.with_name("new")):
            remove(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
