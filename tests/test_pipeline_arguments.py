"""Values of all types for all arguments of a call: the output is finite, or the error names the argument."""

import decimal
import fractions
import inspect
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from test_pipeline_diffusers import embeds, load, with_image_encoder

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Segmentation, ask, ask_boxes
from instructdiffusion_pipeline.ask import ask_batch


@pytest.fixture
def pipe() -> InstructDiffusionPipeline:
    """A pipeline that takes one step by default."""
    one_step = {family: {"num_inference_steps": 1} for family in ("editing", "segmentation", "keypoints")}
    pipe = InstructDiffusionPipeline(**tiny.components(), task_settings=one_step)
    pipe.set_progress_bar_config(disable=True)
    return pipe


ARGUMENTS = [name for name in inspect.signature(InstructDiffusionPipeline.__call__).parameters if name != "self"]
SHAPES = [(1, 4, 16, 16), (4, 16, 16), (3, 16, 16), (1, 77, 32)]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
TYPES += [torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64]
ARRAYS = [np.float16, np.longdouble, np.int64, np.uint8, bool, complex, ">f4", "U3", "M8[s]", [("x", "f4")], object]


def values() -> list[Any]:
    """New values, because a call may change them."""
    numbers = [True, 0, 1, -1, 0.5, 10**30, 10**400, 1e30, -1e30, 1e300, float("nan"), float("inf"), -float("inf")]
    numbers += [1j, decimal.Decimal(1), fractions.Fraction(1, 2), np.int8(1), np.True_, np.float16(0.5)]
    numbers += [np.longdouble(0.5), np.float32("nan"), np.float32("inf"), np.array(1.0), torch.tensor(1)]
    texts = ["", "cat", "5", "a \ud800 cat", b"cat", ["a", "b"], ("a",), ["a", None], ["\udfff"], np.array(["a"])]
    containers = [[], [1], [[1], [2]], (), (0.5,), (0.9, 0.5), [0.5, 0.9], range(3), {1}, {}, {3: 4}]
    containers += [{"scale": 1}, {"scale": "x"}, {"other": 1}, ["latents"], ("noise",), [["latents"]], np.arange(3.0)]
    functions = [int, len, print, lambda: None, lambda *_: None, lambda *_: 5, lambda *_: [1], lambda *_: {}]
    others = [object(), (i for i in [1]), "cpu", tiny.generator(), [tiny.generator()], (tiny.generator(),), [None]]
    arrays = [np.zeros((8, 8, 3), dtype) for dtype in ARRAYS]
    arrays += [np.zeros((8, 8, 4)), np.zeros((0, 8, 3)), np.ma.zeros((8, 8, 3)), np.zeros((8, 16, 3))[::-1, ::-2]]
    tensors = [torch.ones(shape).to(dtype) for dtype in TYPES for shape in SHAPES]
    tensors += [torch.full(shape, value) for value in (-0.5, torch.nan, torch.inf, 1e30) for shape in SHAPES]
    tensors += [
        torch.rand(3, 33, 64, requires_grad=True),
        torch.rand(3, 16, 16).to_sparse(),
        torch.rand(SHAPES[0]).to_sparse(),
    ]
    tensors += [torch.rand(3, 16, 16, device="meta"), torch.rand(SHAPES[0], device="meta")]
    tensors += [-torch.rand(1, 4, *size) for size in ((1, 1), (1, 2), (0, 0))]
    tensors += [torch.zeros(shape) for shape in ((1, 0, 32), (2, 77, 32), (1, 77, 33), (1, 5, 32), (3,), ())]
    pictures = [PIL.Image.new(mode, (9, 7)) for mode in ("1", "L", "RGBA", "F", "I", "I;16", "LAB")]
    pictures += [PIL.Image.new("RGB", (1, 1)), PIL.Image.new("RGB", (0, 5)), PIL.Image.new("I", (0, 5))]
    pictures += [[PIL.Image.new("RGB", (8, 8)), PIL.Image.new("RGB", (16, 8))]]
    return [None, *numbers, *texts, *containers, *functions, *others, *arrays, *tensors, *pictures]


def returned() -> list[Any]:
    """Invalid results of a callback."""
    latents, texts = torch.rand(1, 4, 16, 16), torch.rand(1, 77, 32)
    tensors: list[Any] = [
        None,
        5,
        "x",
        [1],
        latents.numpy(),
        latents[:, :2],
        latents.int(),
        latents.to(torch.complex64),
    ]
    tensors += [latents.to_sparse(), latents * torch.nan, latents.double(), texts, texts[:, :5], texts.repeat(2, 1, 1)]
    names = InstructDiffusionPipeline._callback_tensor_inputs
    return [None, 5, {}, {"other": 1}, {3: 4}, *({name: tensor} for name in names for tensor in tensors)]


def attention_settings() -> list[Any]:
    """Values for the entries of `cross_attention_kwargs` that the UNet sets or an IP-Adapter uses."""
    mask = torch.ones(1, 1, 16, 16)
    masks = [None, 5, "x", [], [1], [None], mask, [mask], [mask[0]], [mask, mask], [mask.repeat(1, 2, 1, 1)]]
    masks += [[mask * torch.nan], mask[:, 0], torch.tensor(1.0)]
    names = ["attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "gligen"]
    return [{"ip_adapter_masks": value} for value in masks] + [{name: value} for name in names for value in (1, mask)]


def check(call: Callable[..., Any], argument: str, value: Any) -> None:
    """Run a call. The output must be finite; an error must have one of two types and name the argument."""
    names = [argument, argument.removesuffix("_embeds"), argument.removesuffix("s")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = call(**{argument: value})
    except (TypeError, ValueError) as error:
        assert any(f"`{name}`" in str(error) for name in names)
    else:
        images = answer[0] if isinstance(answer, tuple) else answer.images
        assert all(np.isfinite(np.asarray(image)).all() for image in images)


def pipeline_call(pipe: InstructDiffusionPipeline, argument: str) -> Callable[..., Any]:
    """A call of `pipe` to which the argument can be added."""
    instead = {"timesteps": "num_inference_steps", "sigmas": "num_inference_steps", "prompt_embeds": "prompt"}
    call = tiny.inputs(num_inference_steps=1)
    call.pop(instead.get(argument, ""), None)
    if argument in ("timesteps", "sigmas"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if argument == "eta":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return lambda **change: pipe(**(call | change))


def some(candidates: list[Any], count: int | None, seed: str) -> list[Any]:
    """A sample, the same in each run; None: all."""
    return candidates if count is None else random.Random(seed).sample(candidates, min(count, len(candidates)))


# A few of the values in the default suite, all of them in the slow one.
few_and_all = pytest.mark.parametrize("count", [25, pytest.param(None, marks=pytest.mark.slow)])


@few_and_all
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_all_types_of_an_argument(pipe: InstructDiffusionPipeline, argument: str, count: int | None) -> None:
    call = pipeline_call(pipe, argument)
    for value in some(values(), count, argument):
        check(call, argument, value)


@few_and_all
@pytest.mark.parametrize("argument", ["ip_adapter_image", "ip_adapter_image_embeds"])
def test_all_types_of_ip_adapter_arguments(pipe: InstructDiffusionPipeline, argument: str, count: int | None) -> None:
    call = tiny.inputs(num_inference_steps=1)
    pipe = load(with_image_encoder(pipe))
    pictures = [tiny.picture(), PIL.Image.new("F", (9, 7), 300.0), torch.rand(1, 3, 32, 32), torch.rand(1, 3, 33, 31)]
    shown = [embeds(), embeds(rows=0), embeds(rows=3), embeds(pictures=3), embeds()[..., :9], embeds()[:, 0]]
    plain = [*values(), *pictures, *shown]
    nested = [[value] for value in plain] + [[value, value] for value in plain]
    for value in some([*plain, *nested, *([value] for value in nested)], count and 3 * count, argument):
        check(lambda **change: pipe(**(call | change)), argument, value)


@pytest.mark.parametrize("shows", [True, False])
def test_all_settings_of_attention_processors(pipe: InstructDiffusionPipeline, shows: bool) -> None:
    call = tiny.inputs(num_inference_steps=1)
    if shows:
        load(pipe)
        call["ip_adapter_image_embeds"] = [embeds()]
    for value in attention_settings():
        check(lambda **change: pipe(**(call | change)), "cross_attention_kwargs", value)


@few_and_all
def test_all_types_of_results_of_a_callback(pipe: InstructDiffusionPipeline, count: int | None) -> None:
    def setter(name: str, value: Any) -> Callable[..., Any]:
        return lambda pipe, *_: setattr(pipe, name, value)

    call = tiny.inputs(num_inference_steps=2)
    callbacks = [lambda *_, value=value: value for value in returned()]
    callbacks += [setter(name, value) for name in ("_guidance_scale", "_image_guidance_scale") for value in values()]
    for callback in some(callbacks, count, "callback"):
        check(lambda **change: pipe(**(call | change)), "callback_on_step_end", callback)


def test_a_callback_may_change_the_number_of_tokens(pipe: InstructDiffusionPipeline) -> None:
    call = tiny.inputs(num_inference_steps=2)
    texts = ["prompt_embeds", "negative_prompt_embeds"]

    def repeat(names: list[str]) -> Callable[..., Any]:
        return lambda pipe, i, t, tensors: {name: tensors[name].repeat(1, 2, 1) for name in names}

    plain = pipe(**call).images[0]
    longer = pipe(**call, callback_on_step_end=repeat(texts), callback_on_step_end_tensor_inputs=texts).images[0]
    assert longer.size == plain.size
    with pytest.raises(ValueError, match=r"same number of tokens; got \[77, 154\]"):
        pipe(**call, callback_on_step_end=repeat(texts[:1]), callback_on_step_end_tensor_inputs=texts)
    with pytest.raises(ValueError, match=r"must return names among \['latents', .*got 'noise'"):
        pipe(**call, callback_on_step_end=lambda *_: {"noise": torch.zeros(1)})


OF_ASK = [(ask, name) for name in inspect.signature(ask).parameters if name != "settings"]
OF_ASK += [(ask_batch, name) for name in ("images", "tasks", "instructions")]
OF_ASK += [(ask_boxes, name) for name in ("image", "task", "boxes", "batch_size")]
SET_BY_ASK = {"prompt", "image", "output_type", "return_dict", "num_images_per_prompt"}
OF_ASK += [(ask, name) for name in ARGUMENTS if name not in SET_BY_ASK]


@few_and_all
@pytest.mark.parametrize(("function", "argument"), OF_ASK)
def test_all_types_of_an_argument_of_ask(
    pipe: InstructDiffusionPipeline, function: Callable[..., Any], argument: str, count: int | None
) -> None:
    call: dict[str, Any] = {"pipeline": pipe, "resolution": 64}
    call |= {} if argument in ("timesteps", "sigmas") else {"num_inference_steps": 1}
    if function is ask_batch:
        call |= {"images": [tiny.picture()], "tasks": [Segmentation({"cat": "blue"})]}
    elif function is ask_boxes:
        call |= {"image": tiny.picture(), "task": Keypoints({"nose": "red"}), "boxes": [(0, 0, 1, 1)]}
    else:
        call |= {"image": tiny.picture(), "task": Segmentation({"cat": "blue"})}
    candidates = values()
    if function is not ask:
        candidates += [[value] for value in values()] + [[(0, 0, value, 9)] for value in values()]
    for value in some(candidates, count, argument):
        check(lambda **change: (function(**(call | change)) and [0], None), argument, value)
