"""The wheel and the sdist are complete, pass PyPI's check, and work without this repository."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hub_server import running_hub
from PIL import Image

import instructdiffusion_pipeline
from instructdiffusion_pipeline import InstructDiffusionPipeline, Segmentation, ask, export

ASK = """
import json
import sys

for extra in ("datasets", "matplotlib", "pycocotools", "pywt", "skimage"):
    sys.modules[extra] = None  # as if it were not installed

import torch
from PIL import Image

import instructdiffusion_pipeline
from instructdiffusion_pipeline import InstructDiffusionPipeline, Segmentation, ask

pipe = InstructDiffusionPipeline.from_pretrained("me/tiny")
answer = ask(
    pipe, Image.open(sys.argv[1]), Segmentation({"cat": "blue"}), num_inference_steps=2, generator=torch.manual_seed(0)
)
answer.picture.save("picture.png")
answer.overlay.save("overlay.png")
print(json.dumps([instructdiffusion_pipeline.__file__, instructdiffusion_pipeline.__version__]))
"""


def run(*command: object, folder: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(tiny.ROOT / name, source)
    shutil.copytree(tiny.ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--no-isolation", folder=source)
    return source / "dist"


def test_twine_accepts_wheel_and_sdist(dist: Path) -> None:
    names = sorted(path.name for path in dist.iterdir())
    version = instructdiffusion_pipeline.__version__
    assert names == [f"instructdiffusion_pipeline-{version}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    run(sys.executable, "-m", "twine", "check", "--strict", *names, folder=dist)


def test_the_wheel_has_every_module_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    source = tiny.ROOT / "src"
    package = source / instructdiffusion_pipeline.__name__
    expected = {str(path.relative_to(source)) for path in package.rglob("*") if path.suffix in (".py", ".typed")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_alone_loads_a_model_by_id_and_runs_it(dist: Path, tmp_path: Path) -> None:
    """The environment has the dependencies of this one, but not the package of this repository."""
    (wheel,) = dist.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Paths in a .pth file are searched after the environment's own packages, and their .pth files are not read, so
    # an editable installation is not seen.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    pipe = InstructDiffusionPipeline(**tiny.components())
    export(pipe, tmp_path / "model")
    image = tiny.picture(48, 32)
    image.save(tmp_path / "image.png")
    with running_hub() as hub:
        paths = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
        hub.files["me/tiny"] = {path.relative_to(tmp_path / "model").as_posix(): path.read_bytes() for path in paths}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        said = run(python, "-c", ASK, tmp_path / "image.png", folder=tmp_path, **settings)
    file, version = json.loads(said.splitlines()[-1])
    assert Path(file).is_relative_to(packages) and version == instructdiffusion_pipeline.__version__
    task = Segmentation({"cat": "blue"})
    expected = ask(pipe, image, task, num_inference_steps=2, generator=torch.manual_seed(0)).picture
    with Image.open(tmp_path / "picture.png") as found:
        np.testing.assert_array_equal(found, expected)
