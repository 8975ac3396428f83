"""The types of the public interface in a type checker."""

from pathlib import Path

import pytest

CODE = """
from PIL import Image
from instructdiffusion_pipeline import Editing, InstructDiffusionPipeline, Keypoints, Restoration, Segmentation, ask

pipe = InstructDiffusionPipeline.from_pretrained("x")
image = Image.new("RGB", (1, 1))
reveal_type(ask(pipe, image, Segmentation({"cat": "blue"})).data)
reveal_type(ask(pipe, image, Keypoints({"nose": "blue"})).data)
reveal_type(ask(pipe, image, Restoration("noise")).data)
reveal_type(ask(pipe, image, Editing("make it night")).data)
ask(pipe, image, Segmentation({"cat": "blue"})).data["cat"].pixels
ask(pipe, image, Editing("make it night")).data["cat"]
"""


def test_the_type_of_an_answer_depends_on_its_task(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "question.py"
    file.write_text(CODE)
    root = Path(__file__).parent.parent
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    output, _, _ = api.run([str(file), *options])
    revealed = [
        line.partition("Revealed type is ")[2].strip('"') for line in output.splitlines() if "Revealed" in line
    ]
    package = "instructdiffusion_pipeline"
    masks, joints, *pictures = revealed
    assert masks == f"dict[str, {package}.tasks.segmentation.Mask]", output
    assert joints.startswith("dict[str, ") and f"{package}.types.Joint" in joints and "| None]" in joints, output
    assert pictures == ["PIL.Image.Image"] * 2, output
    errors = [line for line in output.splitlines() if ": error:" in line]
    assert len(errors) == 1 and 'Value of type "Image" is not indexable' in errors[0], output
