"""The worked example in CONTRIBUTING.md works: a fifth task needs only its two files."""

import re
import subprocess
import sys

import tiny

# Allows importing the task's file from another folder as if it were in the package.
CONFTEST = """
import sys
from pathlib import Path
from instructdiffusion_pipeline import tasks
tasks.__path__.append(str(Path(__file__).parent))
sys.path[:0] = [{tests!r}, {scenes!r}]
"""


def test_the_worked_example(tmp_path):
    task, test = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "cutout.py").write_text(task)
    (tmp_path / "test_cutout.py").write_text(test)
    folders = {"tests": str(tiny.ROOT / "tests"), "scenes": str(tiny.ROOT / "tests" / "tasks")}
    (tmp_path / "conftest.py").write_text(CONFTEST.format(**folders))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=ci", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout + run.stderr
