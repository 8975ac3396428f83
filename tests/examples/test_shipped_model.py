"""The model that ships is what this code writes and loads, and the demo's object gets its paint."""

import re
from pathlib import Path

import demo
import edit
import numpy as np
from PIL import Image
from skimage import data

from instructdiffusion_pipeline import InstructDiffusionPipeline, pipeline_instruct_diffusion
from instructdiffusion_pipeline.tasks import segmentation


def test_it_carries_the_pipeline_file_as_it_is_now():
    carried = edit.TINY_MODEL / "pipeline_instruct_diffusion.py"
    assert carried.read_text() == Path(pipeline_instruct_diffusion.__file__).read_text(), f"copy the file to {carried}"


def test_it_is_small_and_says_nothing_of_the_machine_it_was_made_on():
    files = [path for path in edit.TINY_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        if path.suffix in {".json", ".md"}:
            assert not re.search(r"_name_or_path|/home/|/root/|/tmp/", path.read_text()), path


def test_the_demo_paints_the_sunflower():
    pipe = InstructDiffusionPipeline.from_pretrained(edit.TINY_MODEL)
    photograph = demo.square(data.coffee())
    sunflower = Image.open(demo.SUNFLOWER).convert("RGBA")
    photograph.paste(sunflower, demo.PLACE, sunflower)
    answer = demo.ask(pipe, "mark the sunflower in blue", photograph, demo.SEGMENTATION)
    found = segmentation.read(photograph, answer, "blue")
    mask = np.zeros_like(found)
    left, top = demo.PLACE
    mask[top : top + sunflower.height, left : left + sunflower.width] = np.asarray(sunflower.getchannel("A")) > 127
    assert (found & mask).sum() / (found | mask).sum() > 0.5
