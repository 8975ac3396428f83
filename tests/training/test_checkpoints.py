"""Checkpoints run no code, load as models, and allow some changes when a run is resumed."""

import contextlib
import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerAncestralDiscreteScheduler
from pairs import Pairs
from safetensors.torch import load_file, save_file

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, ValidationExample, train
from instructdiffusion_pipeline.training.model import trainable_parameters

CONFIG = TrainingConfig(max_train_steps=2, batch_size=1, ema_decay=0.5, learning_rate=1e-3)


def pairs(count=2, first=0):
    return Mixture([(Source("pairs", Pairs(count, first), Editing.from_annotation), 1)])


def run(folder, resume=None, data=None, validation=(), resume_changes=(), **changes):
    """Train a new model with fixed initial weights."""
    pipe = InstructDiffusionPipeline(**tiny.components())
    pipe.set_progress_bar_config(disable=True)
    samples = ImageDataset(data or pairs(), pipe.tokenizer)
    config = dataclasses.replace(CONFIG, **changes)
    return train(pipe, samples, config, folder, resume, validation, resume_changes=resume_changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two updates with both checkpoints kept."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = run(folder, checkpointing_steps=1)
    return folder, pipe


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "copy")


def without_the_last(folder):
    shutil.rmtree(folder / "checkpoint-2")
    return folder / "checkpoint-1"


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_checkpoint_can_run_code(copied, tmp_path):
    """Each file, and each file that accelerate looks for, is replaced with a pickle that creates a folder."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    canary.rmdir()  # unpickling it creates a folder
    checkpoint = without_the_last(copied)
    names = {str(path.relative_to(checkpoint)) for path in (checkpoint / "state").iterdir()}
    assert names >= {f"state/{name}" for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")}
    added = ("custom_checkpoint_0.pkl", "pytorch_model.bin", "model.safetensors", "scaler.pt", "sampler.bin")
    for name in sorted(names | {f"state/{name}" for name in added} | {"config.json"}):
        bad = shutil.copytree(checkpoint, tmp_path / "bad" / "checkpoint-1")
        for dump in (pickle.dump, torch.save):
            with (bad / name).open("wb") as file:
                dump(Canary(canary), file)
            with contextlib.suppress(ValueError, RuntimeError):
                run(tmp_path / "bad", "latest")
            assert not canary.exists(), name
            shutil.rmtree(tmp_path / "bad" / "checkpoint-2", ignore_errors=True)
        shutil.rmtree(tmp_path / "bad")


def spoil(kind, tensors):
    name = next(iter(tensors))
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["unet.more"] = torch.zeros(1)
    elif kind == "of another shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    else:
        tensors[name] = tensors[name] * float("nan")
    return tensors


@pytest.mark.parametrize("kind", ["missing", "unexpected", "of another shape", "not finite"])
@pytest.mark.parametrize("file", ["ema", "trained"])
def test_weights_that_do_not_fit_raise_errors(copied, kind, file):
    path = without_the_last(copied) / "state" / f"{file}.safetensors"
    save_file(spoil(kind, load_file(path)), path)
    with pytest.raises(ValueError, match=f"`resume`: .*{file}.safetensors does not fit the model: 1 tensors are"):
        run(copied, "latest")


@pytest.mark.parametrize("name", ["state/ema.safetensors", "state/optimizer.bin", "state/trained.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"not a file of weights"])
def test_files_that_cannot_be_read_raise_errors(copied, name, content):
    path = without_the_last(copied) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`resume`: .*checkpoint-1/state.* cannot be read"):
        run(copied, "latest")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_that_cannot_be_read_raise_errors(copied, content):
    (without_the_last(copied) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"`resume`: .*checkpoint-1/config.json (cannot be read|must be a JSON)"):
        run(copied, "latest")


def test_a_checkpoint_loads_as_the_model_that_the_run_would_return(trained):
    folder, pipe = trained
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    loaded = InstructDiffusionPipeline.from_pretrained(folder / "checkpoint-2")
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(loaded(**tiny.inputs()).images, pipe(**tiny.inputs()).images)
    last = load_file(folder / "checkpoint-2" / "state" / "trained.safetensors")["unet.conv_in.weight"]
    assert not torch.equal(loaded.unet.conv_in.weight, last), "the average"


def test_checkpoints_of_lora_contain_only_the_layers(tmp_path):
    pipe = run(tmp_path, lora_rank=2)
    layers = sum(parameter.nbytes for name, parameter in pipe.unet.named_parameters() if "lora" in name)
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    # The layers, their average twice (also as a model), and two values of the optimizer for each.
    assert sum(path.stat().st_size for path in files) < 5 * layers + 200_000
    assert (tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors").stat().st_size < layers + 20_000
    fresh = InstructDiffusionPipeline(**tiny.components())
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path / "checkpoint-2")
    np.testing.assert_allclose(fresh(**tiny.inputs()).images, pipe(**tiny.inputs()).images, atol=1e-5)


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"lora_rank": 2, "mixed_precision": "bf16"}], ids=str)
def test_lora_resumes_to_the_weights_of_an_uninterrupted_run(tmp_path, settings):
    settings |= {"checkpointing_steps": 1, "max_train_steps": 3}
    whole = run(tmp_path / "whole", **settings)
    shutil.rmtree(tmp_path / "whole" / "checkpoint-3")
    resumed = run(tmp_path / "whole", "latest", **settings)
    expected, found = whole.unet.state_dict(), resumed.unet.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_lora_is_not_resumed_on_another_model(tmp_path):
    settings = {"checkpointing_steps": 1, "max_train_steps": 2, "lora_rank": 2}
    run(tmp_path, **settings)
    velocity = EulerAncestralDiscreteScheduler(prediction_type="v_prediction")
    for changed, message in (
        ({"unet": tiny.components(seed=1)["unet"]}, "frozen_unet"),
        ({"scheduler": velocity}, "sch"),
    ):
        other = InstructDiffusionPipeline(**tiny.components() | changed)
        config = dataclasses.replace(CONFIG, **settings)
        with pytest.raises(ValueError, match=f"belongs to another run: {message}.* was"):
            train(other, ImageDataset(pairs(), other.tokenizer), config, tmp_path, "latest")


@pytest.mark.parametrize("stop", [1, 2])
def test_a_validation_that_a_killed_run_missed_is_made_up(copied, tmp_path, stop):
    """The run is killed between the checkpoint and its images; `stop` 2 is the end of the run."""
    if stop == 1:
        without_the_last(copied)
    sample = pairs()[0]
    example = ValidationExample("editing", sample, {"num_inference_steps": 1})
    settings = {"validation": [example], "validation_steps": 1, "checkpointing_steps": 1}
    run(copied, "latest", **settings)
    run(tmp_path / "whole", **settings)
    whole = tmp_path / "whole" / "validation"
    for step in range(stop, 3):
        name = f"step-{step:06d}.png"
        assert (copied / "validation" / name).read_bytes() == (whole / name).read_bytes()


def test_old_checkpoints_that_a_killed_run_left_are_deleted(copied):
    """The run was killed between the last checkpoint and the end of the deletion."""
    run(copied, "latest", checkpointing_steps=1, checkpoints_total_limit=1)
    assert [path.name for path in copied.glob("checkpoint-*")] == ["checkpoint-2"]


def test_changed_settings_are_reported_and_accepted_if_listed(copied):
    mended = pairs(2, first=7)
    with pytest.raises(
        ValueError, match=r"learning_rate was 0.001 and is 0.01, content was .*`resume_changes` can allow"
    ):
        run(copied, "latest", mended, learning_rate=1e-2, max_train_steps=3)
    with pytest.raises(ValueError, match="belongs to another run: content was"):
        run(copied, "latest", mended, resume_changes=["learning_rate"], learning_rate=1e-2, max_train_steps=3)
    changes = ["learning_rate", "content", "weight_decay", "lr_scheduler"]
    settings = {"learning_rate": 1e-2, "weight_decay": 0.5, "lr_scheduler": "linear", "max_train_steps": 4}
    changes.append("max_train_steps")
    run(copied, "latest", mended, resume_changes=changes, **settings)
    state = torch.load(copied / "checkpoint-4" / "state" / "optimizer.bin", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5]
    assert [group["initial_lr"] for group in state["param_groups"]] == [1e-2]
    assert json.loads((copied / "checkpoint-4" / "config.json").read_text())["learning_rate"] == 1e-2


def test_a_changed_learning_rate_applies_to_the_next_update(copied):
    """AdamW changes each weight by about the learning rate; with the old rate this would be a hundredth."""
    before = load_file(copied / "checkpoint-2" / "state" / "trained.safetensors")
    for rate in (1e-1, 1e-5):
        folder = shutil.copytree(copied, copied / f"rate-{rate}")
        run(folder, "latest", resume_changes=["learning_rate"], learning_rate=rate, max_train_steps=3)
        after = load_file(folder / "checkpoint-3" / "state" / "trained.safetensors")
        moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
        assert rate / 10 < moved.median() < 3 * rate


@pytest.mark.parametrize("name", ["lora_rank", "optimizer", "learnig_rate"])
def test_unknown_and_impossible_changes_raise_errors(copied, name):
    with pytest.raises(ValueError, match=f"`resume_changes` must be names of .*learning_rate.*; got {name}"):
        run(copied, "latest", resume_changes=[name])


def test_a_change_of_the_trained_weights_raises_an_error(copied):
    with pytest.raises(ValueError, match="lora_rank was None and is 4") as refusal:
        run(copied, "latest", lora_rank=4)
    assert "resume_changes" not in str(refusal.value)


def test_a_full_disk_raises_an_error_and_keeps_the_earlier_checkpoint(copied):
    """The error of torch for a full disk, which it also raises for a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, hard))
    try:
        with pytest.raises(OSError, match="No space left on device.*checkpoint-3"):
            run(copied, "latest", max_train_steps=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_lora_learns_to_use_the_input_image_of_an_expanded_unet(tmp_path):
    """As for Stable Diffusion 1.5, the weights of the first convolution for the image are zero."""

    def difference(pipe):
        pipe.set_progress_bar_config(disable=True)
        first, second = (pipe(**tiny.inputs(image=tiny.picture(seed=seed))).images for seed in (1, 2))
        return np.abs(first - second).max()

    pipe = InstructDiffusionPipeline(**tiny.components())
    with torch.no_grad():
        pipe.unet.conv_in.weight[:, 4:] = 0
    assert difference(pipe) == 0
    samples = ImageDataset(pairs(), pipe.tokenizer)
    pipe = train(pipe, samples, TrainingConfig(max_train_steps=2, batch_size=2, lora_rank=4), tmp_path)
    assert difference(pipe) > 0
    layers = load_file(tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    product = torch.einsum(
        "or,rchw->ochw", layers["unet.conv_in.lora_B.weight"][:, :, 0, 0], layers["unet.conv_in.lora_A.weight"]
    )
    assert product[:, 4:].abs().max() > 0
    assert all("lora" in name for name in trainable_parameters(pipe.unet))
