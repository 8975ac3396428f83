import dataclasses
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image, ImageDraw

from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "tiny")]

from world import STYLES, UNSEEN_STYLE  # noqa: E402

NAMES = tuple(f"thing {i}" for i in range(40))


@pytest.fixture(scope="session")
def tiny_train():
    """examples/tiny/train.py as a module with another name than examples/train.py."""
    spec = importlib.util.spec_from_file_location("tiny_train", EXAMPLES / "tiny" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory):
    """A folder as written by `fetch`, with gray photographs and white discs as objects: white pixels are objects."""
    root = tmp_path_factory.mktemp("work") / "world"
    for part in ("photographs", *(f"objects/{style}" for style in (*STYLES, UNSEEN_STYLE))):
        (root / part).mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (150, 120), (90, 90, 90)).save(root / "photographs" / f"{name}.jpg")
        sprite = Image.new("RGBA", (100, 100))
        ImageDraw.Draw(sprite).ellipse((0, 0, 99, 99), fill=(240, 240, 240, 255))
        for style in (*STYLES, UNSEEN_STYLE):
            sprite.save(root / "objects" / style / f"{name}.png")
    merges = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>"]
    (root / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(["version", *merges]).encode()))
    (root / "CREDITS.md").write_text("# Credits\n")
    return root


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The recipe for CPUs with the objects of `world_folder` and a smaller UNet, also in the scripts."""
    import recipes  # imported here, because the environment of test_app.py has no accelerate

    recipe = dataclasses.replace(recipes.RECIPES["cpu"], names=NAMES, unet_widths=(32, 32, 64), text_width=32)
    monkeypatch.setitem(recipes.RECIPES, "cpu", recipe)
    return recipe


@pytest.fixture
def coco(tmp_path):
    """A folder of COCO keypoints: one person in each split."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    keypoints = [value for i in range(len(COCO_JOINTS)) for value in (20 + 2 * i, 15 + 2 * i, 2)]
    person = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [15, 10, 45, 45], "area": 900, "keypoints": keypoints}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 80, "height": 60}],
        "annotations": [person | {"iscrowd": 0}],
        "categories": [{"id": 1, "name": "person"}],
    }
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        tiny.picture(80, 60).save(root / split / "1.png")
        (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    return root
