import json
import random
import sys

import score_shapes
import vae
from held_out import held_out_world
from model import build_pipeline
from sources import at_the_rim


def test_each_row_is_scored_at_the_resolution_of_its_images(world_folder, tiny_recipe, tmp_path, monkeypatch):
    pipeline = build_pipeline(tiny_recipe, vae.build(64), world_folder)
    few = {"num_inference_steps": 1, "guidance_scale": 0.5, "image_guidance_scale": 0.5}
    pipeline.register_to_config(task_settings=dict.fromkeys(("segmentation", "editing", "restoration"), few))
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--world", world_folder, "--samples", 2, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["score_shapes.py", *map(str, arguments)])
    score_shapes.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [source.name for source in score_shapes.rows(tiny_recipe, world_folder, 1)]
    assert all(row["samples"] == 2 and not row["failed"] for row in rows)
    edited = {row["row"]: row["scores"]["PSNR"] for row in rows if "384" in row["row"]}
    assert len(edited) == 2 and all({"model", "output alone", "input"} <= scores.keys() for scores in edited.values())
    shapes = {
        source.name: source.read(0, None)[0].size for source in score_shapes.rows(tiny_recipe, world_folder, 1)[:4]
    }
    assert list(shapes.values()) == list(score_shapes.SHAPES.values())


def test_objects_at_the_rim_touch_it(world_folder, tiny_recipe):
    world = held_out_world(tiny_recipe, world_folder, frame=(96, 64))
    for seed in range(20):
        image, masks = at_the_rim(world, random.Random(seed))
        (mask,) = masks.values()
        assert image.size == (96, 64)
        # The outermost pixels of a round object are covered by less than half.
        assert mask[3:-3, 3:-3].sum() < mask.sum()
