"""Values of every type for every argument of a call: the answer is finite, or the error names the argument."""

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

from instructdiffusion_pipeline import InstructDiffusionPipeline, Segmentation, ask

ARGUMENTS = [name for name in inspect.signature(InstructDiffusionPipeline.__call__).parameters if name != "self"]
SHAPES = [(1, 4, 16, 16), (4, 16, 16), (3, 16, 16), (1, 77, 32)]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
TYPES += [torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64]
ARRAYS = [np.float16, np.longdouble, np.int64, np.uint8, bool, complex, ">f4", "U3", "M8[s]", [("x", "f4")], object]


def values() -> list[Any]:
    """Fresh values, as a call may change them."""
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


def check(call: Callable[..., Any], argument: str, value: Any) -> None:
    """Call it; an answer must be finite, and an error must be of the two kinds and name the argument."""
    names = [argument, argument.removesuffix("_embeds"), "prompt" if argument == "instruction" else argument]
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
    """A call of `pipe` that the argument can be added to."""
    instead = {"timesteps": "num_inference_steps", "sigmas": "num_inference_steps", "prompt_embeds": "prompt"}
    call = tiny.inputs(num_inference_steps=1)
    call.pop(instead.get(argument, ""), None)
    if argument in ("timesteps", "sigmas"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if argument == "eta":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return lambda **change: pipe(**(call | change))


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_type_of_an_argument(pipe: InstructDiffusionPipeline, argument: str) -> None:
    """A sample of the values, the same in every run."""
    call = pipeline_call(pipe, argument)
    for value in random.Random(argument).sample(values(), 60):
        check(call, argument, value)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_value_of_an_argument(pipe: InstructDiffusionPipeline, argument: str) -> None:
    call = pipeline_call(pipe, argument)
    for value in values():
        check(call, argument, value)


OF_ASK = [name for name in inspect.signature(ask).parameters if name != "settings"]
SET_BY_ASK = {"prompt", "image", "output_type", "return_dict", "num_images_per_prompt"}


@pytest.mark.parametrize("argument", OF_ASK + [name for name in ARGUMENTS if name not in SET_BY_ASK])
def test_every_type_of_an_argument_of_ask(pipe: InstructDiffusionPipeline, argument: str) -> None:
    call = {"pipeline": pipe, "image": tiny.picture(), "task": Segmentation({"cat": "blue"}), "resolution": 64}
    call |= {} if argument in ("timesteps", "sigmas") else {"num_inference_steps": 1}
    for value in random.Random(argument).sample(values(), 40):
        check(lambda **change: ([ask(**(call | change)).data["cat"].score], None), argument, value)
