"""Programs that are killed and started again write the same files, and keep the user's files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

OPERATIONS = ["export", "conversion", "evaluation", "caching", "training", "prediction"]


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_program_killed_at_50_points_ends_with_the_same_files(operation: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tests" / "kill_points.py", operation, "50", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["killed"] == 50
