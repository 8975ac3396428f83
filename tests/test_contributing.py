"""CONTRIBUTING.md: a fifth task needs only the two files of its example, and the code has the layers of its table."""

import ast
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

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


def imported_modules(path: Path, package: str) -> set[str]:
    """The full names that a module of `package` imports with `from`, which is the style of this project."""
    statements = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {
        f"{resolve_name('.' * statement.level + (statement.module or ''), package)}.{name.name}"
        for statement in statements
        for name in statement.names
    }


def test_modules_import_only_from_modules_above_them():
    layers = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", (tiny.ROOT / "CONTRIBUTING.md").read_text(), re.M)
    layers = layers[: layers.index("conversion")]
    source = tiny.ROOT / "src"
    found = set()
    for path in source.rglob("*.py"):
        _, *folders, name = path.relative_to(source).with_suffix("").parts
        layer = [*folders, name][0]
        if layer == "__init__":
            continue
        found.add(layer)
        for imported in imported_modules(path, ".".join(["instructdiffusion_pipeline", *folders])):
            if imported.startswith("instructdiffusion_pipeline."):
                assert layers.index(imported.split(".")[1]) <= layers.index(layer), f"{path} imports {imported}"
    assert found == set(layers)
