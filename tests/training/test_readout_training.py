"""Training of a readout: its targets, its scores, resuming, and saving in a model's folder."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Segmentation
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.evaluation import Example, LazyExample, examples_from
from instructdiffusion_pipeline.evaluation.report import answer_name
from instructdiffusion_pipeline.readout import CHANNELS, HEATMAP, MASK, heatmap_peak, read_with_readout, run_readout
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.training import readout as training
from instructdiffusion_pipeline.training.readout import (
    ReadoutConfig,
    ReadoutDataset,
    build_readout,
    fit,
    heatmap_target,
    mask_target,
    readout_loss,
    save_readout,
    train_readout,
)
from instructdiffusion_pipeline.types import Joint

FEW = ReadoutConfig(sample_size=32, max_train_steps=6, batch_size=4, checkpointing_steps=2)
SIZE = 64


def scene(seed: int) -> Example:
    """Soft clouds, and a disc that is the cat or a joint. Both have tasks with random colors."""
    rng = random.Random(seed)
    clouds = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(clouds).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if seed % 2:
        joints = {"nose": Joint(rng.uniform(8, 55), rng.uniform(8, 55)), "left wrist": None}
        colors = rng.sample(["red", "green", "blue", "yellow"], 2)
        return Example(image, [Keypoints(dict(zip(joints, colors, strict=True)))], joints)
    mask, radius = Image.new("L", image.size), rng.randint(8, 18)
    x, y = rng.randint(radius, SIZE - radius), rng.randint(radius, SIZE - radius)
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    masks = {"cat": np.asarray(mask) > 0}
    return Example(image, [Segmentation.from_annotation(image, masks, rng)], masks)


def faint(example: Example) -> Image.Image:
    """An output of a model that paints with a third of the opacity."""
    return Image.blend(example.image, example.tasks[0].draw(example.image, example.truth), 0.33)


@pytest.fixture
def answered(tmp_path):
    """A dataset of faint outputs for the scenes of some seeds."""

    def answered(seeds, config):
        (tmp_path / "answers").mkdir()
        for index, seed in enumerate(seeds):
            faint(scene(seed)).save(tmp_path / "answers" / answer_name(index, 0))
        records = [{"index": index, "box": [0, 0, SIZE, SIZE]} for index in range(len(seeds))]
        (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
        examples = [LazyExample(str(seed), "scenes", lambda seed=seed: scene(seed)) for seed in seeds]
        return ReadoutDataset(examples, tmp_path, config)

    return answered


def test_a_readout_learns_to_decode_the_outputs_of_its_model(answered, tmp_path):
    config = ReadoutConfig(sample_size=32, max_train_steps=100, batch_size=8, learning_rate=4e-3)
    readout = fit(answered(range(60), config), config, tmp_path, torch.device("cpu"))
    overlaps, found, by_color = [], [], []
    for seed in range(1000, 1020):
        example = scene(seed)
        (task,), answer = example.tasks, faint(example)
        reading = read_with_readout(readout, task, example.image, answer)
        if "cat" in reading:
            mask, truth = reading["cat"].pixels, example.truth["cat"]
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
            by_color.append(task.read(example.image, answer)["cat"].pixels.any())
        else:
            nose = reading["nose"]
            found.append(nose is not None and np.hypot(*np.subtract(nose[:2], example.truth["nose"][:2])) < 2)
            by_color.append(task.read(example.image, answer)["nose"] is not None)
    assert np.mean(overlaps) > 0.8 and np.mean(found) > 0.7 and np.mean(by_color) < 0.2


def test_a_resumed_run_gives_the_readout_of_an_uninterrupted_one(answered, tmp_path):
    dataset = answered(range(6), FEW)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = fit(dataset, FEW, tmp_path / "whole", torch.device("cpu"))
    opened = []

    class Stopping(list):
        def __getitem__(self, index):
            opened.append(index)
            if len(opened) > 13:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    dataset.examples = Stopping(dataset.examples)
    with pytest.raises(KeyboardInterrupt):
        fit(dataset, FEW, tmp_path / "stopped", torch.device("cpu"))
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt")[0] == 2
    dataset.examples = list(dataset.examples)
    resumed = fit(dataset, dataclasses.replace(FEW, num_workers=1), tmp_path / "stopped", torch.device("cpu"))
    weights = resumed.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(ValueError, match="max_train_steps was 6 and is 7"):
        fit(dataset, dataclasses.replace(FEW, max_train_steps=7), tmp_path / "stopped", torch.device("cpu"))


def test_an_epoch_has_each_color_of_each_output_once(answered, tmp_path):
    dataset = answered([0, 1, 3, 5], FEW)
    expected = sum(len(scene(seed).tasks[0].colors) for seed in (0, 1, 3, 5))
    assert len(dataset) == expected
    for epoch in range(2):
        items = [dataset[epoch * expected + offset] for offset in range(expected)]
        assert [channel for *_, channel in items].count(MASK) == 1
        assert sum(channel == HEATMAP and bool(plane.max() > 0.5) for _, plane, channel in items) == 3  # the noses
        assert all(inputs.shape == (10, 32, 32) and plane.shape == (32, 32) for inputs, plane, _ in items)
    first, second = (torch.stack([dataset[start + i][0] for i in range(expected)]) for start in (0, expected))
    assert not torch.equal(first, second), "another order"


def test_examples_without_an_output_are_left_out(answered, tmp_path):
    dataset = answered([0, 2], FEW)
    records = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text("\n".join([json.dumps({"index": 0, "error": "OSError"}), records[1]]))
    assert [index for index, *_ in ReadoutDataset(dataset.examples, tmp_path, FEW).rows] == [1]


def test_each_of_several_objects_has_its_own_output(tmp_path):
    """The output for an object shows this object alone."""
    image = Image.new("RGB", (SIZE, SIZE), "gray")
    masks = {name: np.zeros((SIZE, SIZE), bool) for name in ("cat", "dog")}
    masks["cat"][4:30, 4:30] = masks["dog"][34:60, 34:60] = True
    task = Segmentation({"cat": "red", "dog": "blue"})
    (tmp_path / "answers").mkdir()
    for part, single in enumerate(task.split()):
        single.draw(image, masks).save(tmp_path / "answers" / answer_name(0, 0, part))
    (tmp_path / "records.jsonl").write_text(json.dumps({"index": 0, "box": [0, 0, SIZE, SIZE]}))
    dataset = ReadoutDataset([LazyExample("a", "a", lambda: Example(image, [task], masks))], tmp_path, FEW)
    assert len(dataset) == 2
    for position in range(2):
        inputs, target, _ = dataset[position]
        changed = (inputs[:3] - inputs[3:6]).abs().sum(0) > 0.1  # from the input image to the output
        assert torch.equal(changed, target > 0) and 0 < target.mean() < 0.3


@pytest.mark.parametrize("box", [None, (20.0, 8.0, 84.0, 56.0)])
def test_targets_are_in_pixels_of_the_frame(box):
    image, joint = tiny.picture(100, 60), Joint(61.5, 21.25)
    mask = np.zeros((60, 100), bool)
    mask[10:30, 40:70] = True
    frame = Frame.of(image, image.resize((64, 48)), box, shortest=24)
    x, y, value = heatmap_peak(heatmap_target(joint, frame))
    assert frame.point(x, y) == pytest.approx(joint[:2], abs=0.2) and value > 0.7
    placed = frame.place(mask_target(mask, frame) - 0.5, outside=-0.5) > 0
    assert (placed ^ mask).sum() < 0.15 * mask.sum()
    assert not mask_target(None, frame).any() and not heatmap_target(None, frame).any()


@pytest.mark.parametrize("size", [(40, 30), (96, 72), (320, 240)])
def test_images_of_one_aspect_ratio_have_frames_of_one_size(size):
    for output in ((64, 48), (128, 96)):  # working sizes
        frame = Frame.of(tiny.picture(*size), tiny.picture(*output), shortest=64, enlarge=True)
        assert frame.source.shape == frame.answer.shape == (64, 85, 3) and frame.size == size


@pytest.mark.parametrize("size", [32, 96])
def test_a_readout_is_trained_on_the_inputs_that_it_decodes(answered, size):
    """Also if they are smaller than its `sample_size`."""
    dataset = answered([0], dataclasses.replace(FEW, sample_size=size))
    example, readout, seen = scene(0), build_readout(size), []
    readout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run_readout(readout, example.tasks[0], example.image, faint(example))
    inputs, _, _ = dataset[0]
    assert inputs.shape[1:] == (size, size)
    assert any(torch.equal(each, seen[0][0]) for each in (inputs, inputs.flip(-1)))  # samples are flipped at random


def test_a_readout_is_trained_on_inputs_of_any_size():
    inputs, targets = torch.zeros(2, CHANNELS, 64, 85), torch.zeros(2, 64, 85)
    assert readout_loss(build_readout(64), inputs, targets, torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize(("size", "levels"), [(64, 3), (128, 4), (256, 5), (100, 4), (16, 3)])
def test_larger_readouts_have_more_levels(size, levels):
    readout = build_readout(size)
    assert len(readout.config.block_out_channels) == levels and readout.config.sample_size == size
    if size == 64:
        assert sum(parameter.numel() for parameter in readout.parameters()) == pytest.approx(0.6e6, rel=0.1)


def test_training_of_a_readout_can_be_repeated(pipe, tmp_path, monkeypatch):
    class Scenes(list):
        skipped: list[tuple[str, str]] = []

        def name(self, index):
            return f"scene {index}"

    few = {"num_inference_steps": 1}
    pipe.register_to_config(task_settings={"segmentation": few, "keypoints": few})
    groups = []
    for name, start in (("train", 0), ("test", 10)):
        scenes = Scenes((example.image, example.truth) for example in map(scene, range(start, start + 6, 2)))
        groups.append(examples_from(Source(name, scenes, Segmentation.from_annotation), 3))
    readout = train_readout(pipe, *groups, tmp_path / "run", FEW)
    assert pipe.readout is readout
    results = json.loads((tmp_path / "run" / "held-out" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["row"] == "test" and row["samples"] == 3
    assert row["scores"]["mIoU"].keys() == {"model", "ceiling", "decoding by color"}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/answers/*.png")}
    again = InstructDiffusionPipeline(**tiny.components(), task_settings=pipe.config.task_settings)
    again.set_progress_bar_config(disable=True)
    monkeypatch.delattr(training, "readout_loss")  # nothing is trained again
    repeated = train_readout(again, *groups, tmp_path / "run", FEW).state_dict()
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in readout.state_dict().items())
    assert all(path.stat().st_mtime_ns == written for path, written in files.items())


@pytest.mark.parametrize(
    "class_name", ["InstructDiffusionPipeline", ["pipeline_instruct_diffusion", "InstructDiffusionPipeline"]]
)
def test_a_readout_is_saved_in_the_folder_of_a_model(pipe, tmp_path, class_name):
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": class_name}))
    readout = build_readout(32)
    save_readout(readout, tmp_path)
    assert json.loads(index.read_text())["_class_name"] == class_name
    loaded = InstructDiffusionPipeline.from_pretrained(tmp_path).readout
    assert all(torch.equal(tensor, readout.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    other = build_readout(64)
    with pytest.raises(FileExistsError, match="readout exists"):
        save_readout(other, tmp_path)
    save_readout(other, tmp_path, overwrite=True)
    assert InstructDiffusionPipeline.from_pretrained(tmp_path).readout.config.sample_size == 64
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_loads_if_saving_a_readout_is_killed_at_any_point(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    save_readout(build_readout(32), tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"score_calibration": {"segmentation": [1, 0]}}))

    def states(replace):
        """The readout's size and the calibration of the model after each change of a file or folder."""
        found = []

        def note(call):
            def noting(*args, **kwargs):
                result = call(*args, **kwargs)
                loaded = InstructDiffusionPipeline.from_pretrained(tmp_path)
                size = loaded.readout and loaded.readout.config.sample_size
                found.append((size, dict(loaded.config.score_calibration)))
                return result

            return noting

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", note(Path.replace))
            patched.setattr(shutil, "rmtree", note(shutil.rmtree))
            replace()
        return list(dict.fromkeys((size, bool(calibration)) for size, calibration in found))

    # The calibration of the old readout is never saved with the new one.
    assert states(lambda: save_readout(build_readout(64), tmp_path, overwrite=True)) == [(None, False), (64, False)]
