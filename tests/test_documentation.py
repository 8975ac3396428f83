"""README and docs: their Python blocks run, their link targets exist, and they agree with the code."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import instructdiffusion_pipeline

PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]
CARD = tiny.ROOT / "examples" / "instructdiffusion-tiny" / "README.md"
# These two need data. tests/examples/test_training_guide.py runs training.md.
RUN_HERE = [page for page in PAGES if page.name not in ("training.md", "datasets.md")]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [code for name, code in fenced if name == language]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like this repository's after `make demo`."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("examples", "conversion"):
        (folder / part).symlink_to(tiny.ROOT / part)
    run([sys.executable, "examples/demo.py", "--overwrite"], folder)
    return folder


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, after_the_demo: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    if code:
        run([sys.executable, "-c", code], after_the_demo)


def test_the_first_commands_run(after_the_demo: Path) -> None:
    commands = [line for block in blocks(tiny.ROOT / "README.md", "") for line in block.splitlines()]
    assert 'python examples/edit.py --image demo-input.png --instruction "make it night"' in commands
    run(
        [sys.executable, "examples/edit.py", "--image", "demo-input.png", "--instruction", "make it night"],
        after_the_demo,
    )
    assert (after_the_demo / "edited.png").exists()


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, CARD, tiny.ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_link_targets_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        link = target[0] or target[1]
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert fragment in map(anchor, headings), link


def test_the_readme_is_short_and_versions_agree() -> None:
    assert len((tiny.ROOT / "README.md").read_text().splitlines()) <= 130
    metadata = configparser.ConfigParser()
    metadata.read(tiny.ROOT / "setup.cfg")
    assert metadata["metadata"]["version"] == instructdiffusion_pipeline.__version__


def test_public_names_exist() -> None:
    for name in instructdiffusion_pipeline.__all__:
        assert getattr(instructdiffusion_pipeline, name) is not None


def test_the_messages_in_the_table_of_errors_are_those_of_the_code() -> None:
    page = (tiny.ROOT / "docs" / "pipeline.md").read_text()
    quoted = re.findall(r'^\| "([^"]+)" \|', page, re.M)
    code = "".join(path.read_text() for path in (tiny.ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # joins the parts of a message
    assert len(quoted) > 4
    for message in quoted:
        assert all(part in code for part in message.split(" ... ")), message
