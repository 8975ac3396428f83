"""Tests that need a GPU. run.sh of the bundle starts them; its rehearsal runs them on a CPU as far as possible."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Segmentation, ask
from instructdiffusion_pipeline.datasets.label_maps import CocoStuff
from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.datasets.specs import load_sources, load_test_sources
from instructdiffusion_pipeline.evaluation import examples_from
from instructdiffusion_pipeline.modular_instruct_diffusion import (
    InstructDiffusionBlocks,
    InstructDiffusionTextEncoderStep,
)
from instructdiffusion_pipeline.readout import read_with_readout
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, save_lora, train
from instructdiffusion_pipeline.training.encoding import FrozenEncoders, draw_step_noise
from instructdiffusion_pipeline.training.loss import denoising_loss
from instructdiffusion_pipeline.training.readout import ReadoutConfig, train_readout
from instructdiffusion_pipeline.types import Joint

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
pytestmark = pytest.mark.cuda
TASK = Segmentation({"sunflower": "blue"})


@pytest.fixture(scope="module")
def scenes(data):
    """Photographs with a sunflower, and its mask."""
    stuff = CocoStuff(data, "val2017")
    return [(image, masks["sunflower"]) for image, masks in (stuff[index] for index in range(4))]


def answer(pipe, scene, seed=0, **settings):
    return ask(pipe, scene[0], TASK, generator=torch.Generator().manual_seed(seed), **settings)


def levels(picture, other):
    """Mean difference of two images, in gray levels."""
    return np.abs(np.asarray(picture, float) - np.asarray(other, float)).mean()


# Inference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=needs_cuda)])
def test_ask_finds_the_sunflower(load, device, scenes, dtype):
    pipe = load(dtype).to(device)
    if dtype == torch.bfloat16 and not CUDA:
        scenes = scenes[:1]  # a CPU without instructions for bfloat16 needs 20 seconds for a scene
    found = [answer(pipe, scene).data["sunflower"].pixels for scene in scenes]
    overlaps = [(mask & pixels).sum() / (mask | pixels).sum() for pixels, (_, mask) in zip(found, scenes, strict=True)]
    assert np.mean(overlaps) > 0.5


def test_a_seed_gives_the_answer_of_the_cpu(load, device, scenes, exact):
    expected = answer(load(), scenes[0]).picture
    assert levels(answer(load().to(device), scenes[0]).picture, expected) < 0.5
    assert levels(answer(load(), scenes[0], seed=1).picture, expected) > 0.5


def test_images_of_several_kinds_and_devices_make_one_batch(load, device, scenes):
    pipe = load(torch.float32).to(device)
    pixels = torch.from_numpy(np.array(scenes[1][0])).permute(2, 0, 1).to(device) / 255
    call = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    images = [scenes[0][0], pixels, pixels[:, ::2, ::2].cpu()]
    assert len(pipe("make it night", images, resolution=64, **call).images) == 3


def test_blocks_take_inputs_from_blocks_on_another_device(load, device, scenes):
    pipe = load(torch.float32)
    text, rest = InstructDiffusionTextEncoderStep().init_pipeline(), InstructDiffusionBlocks()
    text.update_components(**{name: pipe.components[name] for name in text.component_names})
    embeds = text(prompt="make it night", output=["prompt_embeds", "negative_prompt_embeds"])
    rest.sub_blocks.pop("text_encoder")
    blocks = rest.init_pipeline()
    blocks.update_components(**{name: pipe.components[name] for name in blocks.component_names if name != "guider"})
    blocks.to(device)
    call = {"image": scenes[0][0], "num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    assert blocks(**embeds, **call, output="images")[0].size == scenes[0][0].size


@needs_cuda
@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloading_changes_no_answer_and_leaves_the_gpu_empty(load, scenes, way):
    expected = answer(load(torch.float16).to("cuda"), scenes[0])
    pipe = load(torch.float16)
    if way == "model":
        pipe.enable_model_cpu_offload()
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    for _ in range(2):
        found = answer(pipe, scenes[0])
        assert levels(found.picture, expected.picture) < 0.5
        mask, pixels = expected.data["sunflower"].pixels, found.data["sunflower"].pixels
        assert (mask != pixels).mean() < 0.01
    assert {parameter.device.type for parameter in pipe.unet.parameters()} != {"cuda"}


def test_weights_stored_in_fp8_give_nearly_the_same_answer(load, device, scenes):
    settings = {"num_inference_steps": 1, "ensemble_size": 1}
    expected = answer(load(torch.bfloat16).to(device), scenes[0], **settings).picture
    pipe = load(torch.bfloat16)
    before = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert sum(parameter.nbytes for parameter in pipe.unet.parameters()) < 0.6 * before
    assert levels(answer(pipe.to(device), scenes[0], **settings).picture, expected) < 8


def test_a_compiled_unet_is_not_compiled_again_by_other_calls(load, device, scenes):
    dtype = torch.float16 if CUDA else torch.float32
    expected = [answer(load(dtype).to(device), scene, seed).picture for seed, scene in enumerate(scenes[:2])]
    pipe = load(dtype).to(device)
    pipe.unet.compile(backend="inductor" if CUDA else "eager")
    answer(pipe, scenes[2])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [answer(pipe, scene, seed).picture for seed, scene in enumerate(scenes[:2])]
    assert max(map(levels, found, expected)) < 2
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        pipe(["make it night"] * 3, scenes[0][0], num_inference_steps=1)  # another batch size


def test_the_readout_reads_what_it_reads_on_the_cpu(load, device, scenes, exact):
    image, mask = scenes[0]
    joints = Keypoints({"nose": "red", "left wrist": "yellow"})
    places = {"nose": Joint(200, 300), "left wrist": Joint(420, 100)}
    answers = [
        (TASK, TASK.draw(image, {"sunflower": mask})),
        (joints, joints.draw(image, places)),
    ]
    expected, found = (
        [read_with_readout(pipe.readout, task, image, picture) for task, picture in answers]
        for pipe in (load(), load().to(device))
    )
    assert (found[0]["sunflower"].pixels != expected[0]["sunflower"].pixels).mean() < 0.001
    assert found[0]["sunflower"].pixels.any()
    for name, joint in expected[1].items():
        assert (joint is None) == (found[1][name] is None)
        assert joint is None or np.allclose(joint, found[1][name], atol=0.5)


# Training


def test_a_readout_is_trained_on_the_gpu(load, device, data, tmp_path):
    pipe = load(torch.float16 if CUDA else torch.float32).to(device)
    entry = f"coco-stuff={data}"
    ((source, _),), (test_source,) = load_sources([entry], 64), load_test_sources([entry], 64)
    steps, batch_size, num_workers, examples = (100, 16, 8, 32) if CUDA else (4, 2, 0, 2)
    config = ReadoutConfig(64, steps, batch_size, num_workers=num_workers)
    groups = [examples_from(each, examples) for each in (source, test_source)]
    readout = train_readout(pipe, *groups, tmp_path, config)
    assert pipe.readout is readout and readout.device.type == device and readout.dtype == pipe.unet.dtype
    (row,) = json.loads((tmp_path / "held-out" / "results.json").read_text())["rows"]
    assert not row["failed"] and row["scores"]["mIoU"].keys() == {"model", "ceiling", "decoding by color"}
    assert not CUDA or row["scores"]["mIoU"]["model"] > 0.6


@pytest.fixture
def pipe():
    return InstructDiffusionPipeline(**tiny.components())


@pytest.fixture
def samples(pipe, data):
    return ImageDataset(Mixture(load_sources([f"coco-stuff={data}"], 32)), pipe.tokenizer)


# The rehearsal is short, because a CPU without instructions for bfloat16 computes it slowly.
STEPS, BATCH_SIZE = (20, 8) if CUDA else (4, 2)
CONFIG = TrainingConfig(max_train_steps=STEPS, batch_size=BATCH_SIZE, learning_rate=1e-3, ema_decay=0.5)
HALF = "fp16" if CUDA else "bf16"


def mean_loss(pipe, samples, positions=32):
    """The loss of a pipeline on the CPU, in float32, for many timesteps."""
    batch = torch.utils.data.default_collate([samples[position] for position in range(positions)])
    batch = FrozenEncoders(pipe.vae, pipe.text_encoder).encode(batch)
    noise = draw_step_noise(99, range(positions), batch["target_mean"].shape[1:], 1000)
    latents = pipe.vae.config.scaling_factor * batch["target_mean"]
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        conditions = batch["image_latents"], batch["prompt_embeds"]
        return denoising_loss(pipe.unet, scheduler, latents, *conditions, noise.noise, noise.timesteps).mean()


def weights(pipe):
    return {name: tensor.detach().cpu().clone() for name, tensor in pipe.unet.state_dict().items()}


def assert_same_updates(first, second, start, tolerance=0.02):
    """AdamW amplifies rounding errors of gradients that are nearly zero, so means are compared."""
    step, difference = (sum((first[name] - other[name]).abs().sum() for name in first) for other in (start, second))
    assert step > 0 and difference < tolerance * step


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        pytest.param({"mixed_precision": "fp16"}, marks=needs_cuda),
        {"mixed_precision": HALF, "lora_rank": 8, "learning_rate": 1e-2},
        pytest.param(
            {"mixed_precision": "bf16", "train_text_encoder": True, "gradient_checkpointing": True}, marks=needs_cuda
        ),
    ],
    ids=["bf16", "fp16", "LoRA", "text encoder"],
)
def test_training_in_half_precision_lowers_the_loss(settings, pipe, samples, tmp_path):
    before = mean_loss(pipe, samples)
    train(pipe, samples, dataclasses.replace(CONFIG, num_workers=4 if CUDA else 0, **settings), tmp_path)
    if settings["mixed_precision"] == "fp16":
        state = tmp_path / f"checkpoint-{CONFIG.max_train_steps}" / "state"
        assert torch.load(state / "scaler.pt")["scale"] > 1
    if "lora_rank" in settings:
        save_lora(pipe, tmp_path / "lora")
        pipe = InstructDiffusionPipeline(**tiny.components())
        pipe.load_lora_weights(tmp_path / "lora")
    assert {tensor.dtype for tensor in weights(pipe).values()} == {torch.float32}
    assert mean_loss(pipe.to("cpu"), samples) < (0.95 if CUDA else 1) * before


def test_an_update_is_that_of_the_cpu(pipe, samples, tmp_path, monkeypatch, exact):
    start, config = weights(pipe), dataclasses.replace(CONFIG, max_train_steps=1, ema_decay=0)
    train(pipe, samples, config, tmp_path / "gpu")
    assert pipe.device.type == ("cuda" if CUDA else "cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = train(InstructDiffusionPipeline(**tiny.components()), samples, config, tmp_path / "cpu")
    assert expected.device.type == "cpu"
    assert_same_updates(weights(pipe), weights(expected), start)


def test_a_resumed_run_goes_on_where_it_stopped(pipe, samples, tmp_path):
    config = dataclasses.replace(CONFIG, max_train_steps=6, mixed_precision=HALF, num_workers=2)
    start, whole = weights(pipe), weights(train(pipe, samples, config, tmp_path / "whole"))
    shorter = dataclasses.replace(config, max_train_steps=3)
    stopped = train(InstructDiffusionPipeline(**tiny.components()), samples, shorter, tmp_path / "resumed")
    resumed = InstructDiffusionPipeline(**tiny.components())
    train(resumed, samples, config, tmp_path / "resumed", resume="latest")
    assert_same_updates(whole, weights(resumed), start, tolerance=0.05)
    with pytest.raises(AssertionError):
        assert_same_updates(whole, weights(stopped), start, tolerance=0.05)


def test_attention_has_gradients_where_all_logits_of_a_query_are_very_low(pipe, samples, tmp_path, device):
    train(pipe, samples, dataclasses.replace(CONFIG, max_train_steps=1), tmp_path)
    query, key, value = (0.1 * torch.randn(1, 4, 64, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120.0 * 64**0.5
    query.requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert torch.isfinite(query.grad).all()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@needs_cuda
def test_an_update_waits_for_the_gpu_once_at_most(pipe, samples, tmp_path):
    def waits(updates):
        config = dataclasses.replace(CONFIG, max_train_steps=updates, mixed_precision="bf16", logging_steps=100)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(InstructDiffusionPipeline(**tiny.components()), samples, config, tmp_path / str(updates))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    waits(1)  # the first run of a process compiles and tunes
    assert waits(22) - waits(12) <= 10


@needs_cuda
def test_compiled_training_makes_the_same_updates(pipe, samples, tmp_path):
    config = dataclasses.replace(CONFIG, max_train_steps=2, mixed_precision="bf16", ema_decay=0)
    trained = []
    for compiled in (False, True):
        each = InstructDiffusionPipeline(**tiny.components())
        train(each, samples, dataclasses.replace(config, torch_compile=compiled), tmp_path / str(compiled))
        trained.append(weights(each))
    assert_same_updates(*trained, weights(pipe), tolerance=0.1)
