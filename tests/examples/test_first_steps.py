"""The notebook of the first steps runs in a new kernel, and its outputs are right."""

import re

import nbformat
import pytest
import tiny
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

NOTEBOOK = tiny.ROOT / "examples" / "first_steps.ipynb"

# Runs after the notebook, and compares its outputs with the objects that it pasted onto the photographs.
CHECKS = """
def iou(mask, place, image, flower):
    pasted = Image.new("L", image.size)
    pasted.paste(255, place, flower)
    pasted = np.asarray(pasted) > 127
    return (mask.pixels & pasted).sum() / (mask.pixels | pasted).sum()


assert iou(sunflower, (20, 20), cat, Image.open("demo/sunflower.png").convert("RGBA")) > 0.75
assert not masks["pizza"].pixels.any()

hands = {"left wrist": (290, 78), "right wrist": (121, 64)}  # read off the figure
assert all(np.hypot(joints[name].x - x, joints[name].y - y) < 12 for name, (x, y) in hands.items())

assert psnr["restored"] > psnr["noisy"] + 2

assert np.asarray(night).mean() < np.asarray(coffee).mean() - 20 < np.asarray(winter).mean()
assert unchanged > 0.8 and (np.asarray(without) != np.asarray(cat))[30:130, 30:90].any(axis=-1).mean() > 0.9

assert not whole.data["sunflower"].pixels.any()
assert iou(parts.data["sunflower"], (500, 40), table, flower) > 0.75
"""


def run(notebook):
    # A kernel may send the text of one cell in several parts; they become one output.
    resources = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(notebook, timeout=600, resources=resources, coalesce_streams=True).execute()


def outputs(notebook):
    """Each output of the notebook: the types of an image, or a text without its numbers."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [re.sub(r"[\d.]+", "#", output["text"]) if "text" in output else sorted(output["data"]) for output in found]


def test_the_notebook_runs_and_its_outputs_are_right():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(new_code_cell(CHECKS))
    run(notebook)
    assert outputs(notebook) == outputs(stored)


def test_a_failing_cell_raises_an_error():
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(notebook)


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size <= 300_000
