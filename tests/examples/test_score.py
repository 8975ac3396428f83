import json
import sys
from functools import partial

import numpy as np
import pytest
import readout
import score
import vae
from held_out import rows as rows_of
from model import build_pipeline
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.evaluation import Example
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.training.readout import ReadoutConfig
from instructdiffusion_pipeline.types import Joint

GRAY = Image.new("RGB", (64, 64), (120, 120, 120))


def test_every_row_is_scored(world_folder, tiny_recipe, tmp_path, monkeypatch, capsys):
    untrained, model, output = tmp_path / "untrained", tmp_path / "model", tmp_path / "out"
    pipeline = build_pipeline(tiny_recipe, vae.build(64), world_folder)
    few = {"num_inference_steps": 1, "guidance_scale": 0.5, "image_guidance_scale": 0.5}
    families = ("segmentation", "keypoints", "restoration", "editing")
    pipeline.register_to_config(task_settings=dict.fromkeys(families, few))
    pipeline.save_pretrained(untrained)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()

    monkeypatch.setattr(readout, "QUESTIONS", {"segmentation": 3, "few keypoints": 3})
    monkeypatch.setattr(readout, "ReadoutConfig", partial(ReadoutConfig, max_train_steps=3))
    folders = ("--work_dir", tmp_path / "readout", "--output_dir", model)
    run(readout, "--model", untrained, "--world", world_folder, *folders)
    trained = InstructDiffusionPipeline.from_pretrained(model)
    assert trained.readout.config.sample_size == 64 and trained.config.task_settings == pipeline.config.task_settings
    table = (tmp_path / "readout" / "held-out" / "table.md").read_text()
    assert "decoding by color" in table and "| few keypoints | PCK" in table
    with pytest.raises(SystemExit):
        run(readout, "--model", untrained, "--world", world_folder, *folders)
    assert "already exists" in capsys.readouterr().err
    run(score, "--model", model, "--world", world_folder, "--samples", 2, "--output", output)
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [source.name for source in rows_of(tiny_recipe, world_folder, 1)]
    assert all(row["samples"] == 2 and not row["failed"] for row in rows)
    for row in rows:
        for values in row["scores"].values():
            assert ("decoding by color" in values) == row["row"].startswith(
                ("segmentation", "one joint", "keypoints", "pose")
            )
            assert ("classical" in values) == (row["row"] in ("noise", "blur", "watermark"))

    with pytest.raises(ValueError, match="model was .* and is"):
        run(score, "--model", untrained, "--world", world_folder, "--samples", 2, "--output", output)
    records = (output / "records.jsonl").read_text()
    (output / "records.jsonl").write_text(records[:-20])
    run(score, "--model", model, "--world", world_folder, "--samples", 2, "--output", output)
    assert (output / "records.jsonl").read_text() == records, "an interrupted run continues"
    beyond = json.loads((output / "beyond.json").read_text())
    assert beyond.keys() == {row["row"] for row in rows}
    # Masks are decoded as by `evaluate`: in rows without absent objects, both have the same mIoU.
    present = [row for row in rows if "of the side" in row["row"]]
    found = [beyond[row["row"]]["mIoU where present"] for row in present]
    assert found == pytest.approx([row["scores"]["mIoU"]["model"] for row in present], abs=1e-4)
    own = json.loads((output / "own" / "results.json").read_text())["rows"]
    assert [row["samples"] for row in own] == [2, 2]
    lines = (output / "scores.md").read_text().splitlines()
    assert {line.count(" | ") for line in lines} == {2}
    (pairs,) = (row["scores"]["mIoU"] for row in rows if row["row"] == "segmentation, left or right of two")
    ours, ceiling, by_color = (f"{pairs[of]:.2f}" for of in ("model", "ceiling", "decoding by color"))
    assert f"| ... mIoU | **{ours}** ({ceiling}) | {by_color} decoded by color |" in lines
    (small,) = (row["scores"]["mIoU"] for row in rows if "0.2 to 0.3" in row["row"])
    (line,) = (line for line in lines if "objects of 0.2 to 0.3" in line)
    assert f"| **{small['model']:.2f}** ({small['ceiling']:.2f}) |" in line and line.endswith(
        f"{small['decoding by color']:.2f} decoded by color |"
    )
    read_twice = [row for row in rows if any("decoding by color" in values for values in row["scores"].values())]
    assert sum("decoded by color" in line for line in lines) == len(read_twice)
    (noise,) = (row["scores"]["PSNR"] for row in rows if row["row"] == "noise")
    (line,) = (line for line in lines if "noise" in line)
    assert line == (
        f"| noise, sigma 25: PSNR | **{noise['model']:.1f} dB** ({noise['ceiling']:.1f}) | {noise['input']:.1f} input,"
        f" {noise['input through the VAE']:.1f} through the VAE, {noise['classical']:.1f} non-local means |"
    )


def test_painting_all_objects_is_detected():
    cat, dog = np.zeros((2, 64, 64), bool)
    cat[:20, :20], dog[40:, 40:] = True, True
    task = Segmentation({"cat": "red"})
    example = Example(GRAY, [task], {"cat": cat, "dog": dog, "car": np.zeros_like(cat)})
    found = score.in_masks(example, task.draw(GRAY, {"cat": cat}))
    assert found["mIoU among several"] == [1]
    assert found["mIoU among several, all objects painted"] == [pytest.approx(400 / 976)]
    assert found["the asked one of several"] == [True]
    assert score.in_masks(example, task.draw(GRAY, {"cat": dog}))["the asked one of several"] == [False]
    absent = Segmentation({"car": "red"})
    assert score.in_masks(example._replace(tasks=[absent]), GRAY) == {"painted though absent": [False]}
    painted = absent.draw(GRAY, {"car": cat})
    assert score.in_masks(example._replace(tasks=[absent]), painted) == {"painted though absent": [True]}


def test_confused_left_and_right_joints_are_counted():
    truth = {"left wrist": Joint(10, 10), "right wrist": Joint(50, 50), "nose": None}
    task = Keypoints({"left wrist": "red", "nose": "blue"})
    example = Example(GRAY, [task], truth)
    right = score.in_joints(example, task.draw(GRAY, truth))
    assert right == {"left and right confused": [False], "no disc": [False], "disc on what is outside": [False]}
    swapped = score.in_joints(example, task.draw(GRAY, {"left wrist": Joint(50, 50), "nose": Joint(30, 10)}))
    assert swapped == {"left and right confused": [True], "no disc": [False], "disc on what is outside": [True]}


def test_images_are_scored_inside_and_outside_the_change():
    edited = GRAY.copy()
    edited.paste((220, 120, 120), (0, 0, 32, 64))
    values = score.in_pictures(GRAY, edited, {"": GRAY, ", input": GRAY})
    assert values["PSNR outside the change"] == [100]
    # 100 levels in one channel of three
    assert values["PSNR inside the change"] == values["PSNR inside the change, input"]
    assert values["PSNR inside the change"] == [pytest.approx(10 * np.log10(3 * 255**2 / 100**2))]
