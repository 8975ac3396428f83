"""One call: strength, noise, schedulers, precision, callbacks, interruption, outputs and the safety checker."""

from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPConfig

from instructdiffusion_pipeline import InstructDiffusionPipeline, InstructDiffusionPipelineOutput

# The omitted scheduler needs the package torchsde.
SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name != "DPMSolverSDEScheduler"]


class TrainingMetrics:
    """A callback that records its arguments."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.timesteps: list[float] = []
        self.tensors: list[dict[str, torch.Tensor]] = []

    def __call__(self, pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        self.steps.append(step)
        self.timesteps.append(float(timestep))
        self.tensors.append(dict(tensors))
        return tensors


def first_sample(pipe: InstructDiffusionPipeline, **changes: Any) -> torch.Tensor:
    """The first input of the UNet in a call, before the scheduler scales it: (1, 4, h, w)."""
    seen: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipe(**tiny.inputs(**changes))
    hook.remove()
    scheduler = pipe.scheduler
    sigma = scheduler.sigmas[len(scheduler.timesteps) - len(seen)]
    return seen[0][:1, :4] * (sigma**2 + 1) ** 0.5


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 8), (0.95, 8), (0.9, 7), (0.5, 4), (0.1, 1)])
def test_strength_is_the_fraction_of_the_steps(pipe: InstructDiffusionPipeline, strength: float, steps: int) -> None:
    watch = TrainingMetrics()
    pipe(**tiny.inputs(num_inference_steps=8, strength=strength, callback_on_step_end=watch))
    assert watch.steps == list(range(steps))
    assert watch.timesteps == pipe.scheduler.timesteps[8 - steps :].tolist()
    assert pipe.num_timesteps == steps


def test_full_strength_starts_from_pure_noise(pipe: InstructDiffusionPipeline) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=tiny.generator(3))
    start = first_sample(pipe, latents=noise)
    assert torch.allclose(start, noise * pipe.scheduler.sigmas[0], atol=1e-5)


def test_lower_strength_starts_from_the_unscaled_image_latents(pipe: InstructDiffusionPipeline) -> None:
    noise, image = torch.randn(2, 1, 4, 16, 16, generator=tiny.generator(3))
    start = first_sample(pipe, latents=noise, image=image, num_inference_steps=4, strength=0.5)
    assert torch.allclose(start, image + noise * pipe.scheduler.sigmas[2], atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_heun_runs_the_unet_twice_a_step_but_once_in_the_last(
    pipe: InstructDiffusionPipeline, strength: float, capfd: pytest.CaptureFixture
) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=False)
    watch = TrainingMetrics()
    pipe(**tiny.inputs(num_inference_steps=6, strength=strength, callback_on_step_end=watch))
    steps = round(6 * strength)
    assert len(watch.steps) == 2 * steps - 1
    assert f"{steps}/{steps}" in capfd.readouterr().err
    assert first_sample(pipe, num_inference_steps=6, strength=strength).isfinite().all()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_schedulers_work(pipe: InstructDiffusionPipeline, name: str, strength: float) -> None:
    config = dict(pipe.scheduler.config) | {"skip_prk_steps": True}
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    answer = pipe(**tiny.inputs(num_inference_steps=5, strength=strength)).images
    assert answer.shape == (1, 32, 32, 3)
    assert np.isfinite(answer).all()


def test_eta_is_passed_to_ddim_only(pipe: InstructDiffusionPipeline) -> None:
    plain, with_eta = (pipe(**tiny.inputs(eta=eta)).images for eta in (0.0, 1.0))
    assert np.array_equal(plain, with_eta)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plain, with_eta = (pipe(**tiny.inputs(eta=eta)).images for eta in (0.0, 1.0))
    assert abs(plain - with_eta).max() > 1e-4


def test_the_generator_draws_the_initial_noise_and_then_that_of_each_step(pipe: InstructDiffusionPipeline) -> None:
    """As in the original code, nothing else draws from the generator, in particular not the VAE's posterior."""
    generator = tiny.generator(5)
    pipe(**tiny.inputs(generator=generator, num_inference_steps=3))
    other = tiny.generator(5)
    for _ in range(4):
        torch.randn(1, 4, 16, 16, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_noise_and_a_similar_output(
    pipe: InstructDiffusionPipeline, dtype: torch.dtype
) -> None:
    expected = pipe(**tiny.inputs()).images
    start = first_sample(pipe)
    pipe.to(dtype)
    assert torch.allclose(first_sample(pipe).float(), start, rtol=1e-2)
    answer = pipe(**tiny.inputs()).images
    assert answer.dtype == np.float32
    assert abs(answer - expected).mean() < 0.02
    latents = pipe(**tiny.inputs(output_type="latent")).images
    assert latents.dtype == dtype
    assert pipe.vae.decode(latents).sample.dtype == dtype


def test_components_may_differ_in_precision(pipe: InstructDiffusionPipeline) -> None:
    expected = pipe(**tiny.inputs()).images
    pipe.unet.to(torch.bfloat16)
    pipe.vae.to(torch.float16)
    assert abs(pipe(**tiny.inputs()).images - expected).mean() < 0.02


def test_callbacks_receive_the_requested_tensors(pipe: InstructDiffusionPipeline) -> None:
    watch = TrainingMetrics()
    asked = pipe._callback_tensor_inputs
    pipe(**tiny.inputs(callback_on_step_end=watch, callback_on_step_end_tensor_inputs=asked, num_images_per_prompt=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in watch.tensors[-1].items()}
    assert shapes == {
        "latents": (2, 4, 16, 16),
        "prompt_embeds": (2, 77, 32),
        "negative_prompt_embeds": (2, 77, 32),
        "image_latents": (2, 4, 16, 16),
    }


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"])
def test_callbacks_can_change_all_tensors(pipe: InstructDiffusionPipeline, name: str) -> None:
    def erase(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensors[name])}

    call = {"callback_on_step_end_tensor_inputs": [name], "output_type": "latent"}
    kept = pipe(**tiny.inputs(**call, callback_on_step_end=TrainingMetrics())).images
    erased = pipe(**tiny.inputs(**call, callback_on_step_end=erase)).images
    assert (erased - kept).abs().max() > 1e-4
    assert name != "latents" or erased.abs().max() == 0


def test_callback_classes_of_diffusers_set_their_tensor_inputs(pipe: InstructDiffusionPipeline) -> None:
    class Keep(PipelineCallback):
        tensor_inputs = ["image_latents"]
        seen: list = []

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict) -> dict:
            self.seen.append(set(callback_kwargs))
            return callback_kwargs

    pipe(**tiny.inputs(callback_on_step_end=MultiPipelineCallbacks([Keep(), Keep()])))
    assert Keep.seen == [{"image_latents"}] * 4


def test_an_interruption_skips_the_remaining_steps_of_one_call(pipe: InstructDiffusionPipeline) -> None:
    watch = TrainingMetrics()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pipe._interrupt = step == 1
        return watch(pipe, step, timestep, tensors)

    stopped = pipe(**tiny.inputs(num_inference_steps=5, callback_on_step_end=stop, output_type="latent")).images
    assert watch.steps == [0, 1]
    assert torch.equal(stopped, watch.tensors[-1]["latents"])
    whole = TrainingMetrics()
    pipe(**tiny.inputs(num_inference_steps=5, callback_on_step_end=whole))
    assert whole.steps == [0, 1, 2, 3, 4]


def test_clip_skip_takes_an_earlier_layer(pipe: InstructDiffusionPipeline) -> None:
    last, _ = pipe.encode_prompt("a cat")
    assert torch.allclose(pipe.encode_prompt("a cat", clip_skip=0)[0], last, atol=1e-6)
    assert (pipe.encode_prompt("a cat", clip_skip=1)[0] - last).abs().max() > 1e-3
    assert abs(pipe(**tiny.inputs(clip_skip=1)).images - pipe(**tiny.inputs()).images).max() > 1e-5


def test_all_output_types_agree(pipe: InstructDiffusionPipeline) -> None:
    array = pipe(**tiny.inputs()).images
    tensor = pipe(**tiny.inputs(output_type="pt")).images
    pictures = pipe(**tiny.inputs(output_type="pil")).images
    latents = pipe(**tiny.inputs(output_type="latent")).images
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert isinstance(pictures[0], PIL.Image.Image)
    assert np.array_equal(np.asarray(pictures[0]), (array[0] * 255).astype(np.uint8))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), tensor, atol=1e-6)


def test_tuple_and_dictionary_outputs_agree(pipe: InstructDiffusionPipeline) -> None:
    output = pipe(**tiny.inputs())
    images, nsfw = pipe(**tiny.inputs(return_dict=False))
    assert isinstance(output, InstructDiffusionPipelineOutput)
    assert np.array_equal(images, output.images)
    assert nsfw is output.nsfw_content_detected is None


@pytest.mark.parametrize("threshold", [1.0, -1.0])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_the_safety_checker_replaces_detected_outputs_with_black(
    pipe: InstructDiffusionPipeline, threshold: float, output_type: str
) -> None:
    unchecked = pipe(**tiny.inputs(output_type=output_type)).images
    checked = InstructDiffusionPipeline(**pipe.components | tiny.safety_checker(threshold))
    output = checked(**tiny.inputs(output_type=output_type))
    detected = threshold == -1.0
    assert output.nsfw_content_detected == [detected]
    answer = np.asarray(output.images[0])
    assert np.array_equal(answer, np.zeros_like(answer) if detected else np.asarray(unchecked[0]))


@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_the_safety_checker_examines_the_means_of_ensembles(pipe: InstructDiffusionPipeline, threshold: float) -> None:
    call = {"num_images_per_prompt": 2, "ensemble_size": 3, "output_type": "np"}
    unchecked = pipe(**tiny.inputs(**call)).images
    checked = InstructDiffusionPipeline(**pipe.components | tiny.safety_checker(threshold))
    output = checked(**tiny.inputs(**call))
    assert output.nsfw_content_detected == 2 * [threshold == -1.0]
    assert np.array_equal(output.images, np.zeros_like(unchecked) if threshold == -1.0 else unchecked)


def test_a_callback_gets_all_images_of_the_ensembles(pipe: InstructDiffusionPipeline) -> None:
    """The latents of an argument are also one per image; each output is the mean of three adjacent ones."""
    latents = torch.randn(6, 4, 16, 16, generator=tiny.generator(3))
    names, shapes = tuple(pipe._callback_tensor_inputs), []

    def callback(pipe, step, timestep, tensors):
        shapes.append([len(tensors[name]) for name in names])
        return {}

    call = {"output_type": "pt", "generator": None, "latents": latents}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # draws no noise
    singles = pipe(**tiny.inputs(num_images_per_prompt=6, **call)).images
    observed = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    means = pipe(**tiny.inputs(num_images_per_prompt=2, ensemble_size=3, **call, **observed)).images
    assert set(map(tuple, shapes)) == {(6, 6, 6, 6)}
    assert torch.equal(means, torch.stack([singles[:3].mean(0), singles[3:].mean(0)]))


def test_a_safety_checker_needs_a_feature_extractor(pipe: InstructDiffusionPipeline) -> None:
    config = CLIPConfig(projection_dim=8)
    with pytest.raises(ValueError, match="`safety_checker` needs a `feature_extractor`"):
        InstructDiffusionPipeline(**pipe.components | {"safety_checker": StableDiffusionSafetyChecker(config)})


def test_a_missing_safety_checker_warns_only_if_required(
    pipe: InstructDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    InstructDiffusionPipeline(**pipe.components)
    assert not caplog.records
    InstructDiffusionPipeline(**pipe.components, requires_safety_checker=True)
    assert "`requires_safety_checker` is True, but there is no `safety_checker`" in caplog.text


def test_a_call_does_not_change_components(pipe: InstructDiffusionPipeline) -> None:
    before = {name: component.state_dict() for name, component in models(pipe).items()}
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in before.items()}
    configs = {name: dict(component.config) for name, component in pipe.components.items() if name in ("unet", "vae")}
    pipe(**tiny.inputs(num_images_per_prompt=2, cross_attention_kwargs={"scale": 0.5}))
    for name, component in models(pipe).items():
        assert all(torch.equal(value, before[name][key]) for key, value in component.state_dict().items())
    assert configs == {name: dict(component.config) for name, component in pipe.components.items() if name in configs}
    assert isinstance(pipe.scheduler, EulerAncestralDiscreteScheduler)


def models(pipe: InstructDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.slow
def test_a_cpu_generator_gives_the_same_output_on_cuda(pipe: InstructDiffusionPipeline) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = pipe(**tiny.inputs()).images
    assert abs(pipe.to("cuda")(**tiny.inputs()).images - expected).max() < 1e-2


def test_custom_timesteps_and_sigmas_replace_the_number_of_steps(pipe: InstructDiffusionPipeline) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = pipe(**tiny.inputs(num_inference_steps=4)).images
    timesteps, sigmas = pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist()
    for custom in ({"timesteps": [round(t) for t in timesteps]}, {"sigmas": sigmas}, {"sigmas": np.array(sigmas)}):
        images = pipe(**tiny.inputs(num_inference_steps=None, **custom)).images
        # The scheduler computes timesteps from sigmas, and sigmas from timesteps, by interpolation.
        assert np.abs(images - expected).max() <= 1 / 255 / 2 and pipe.num_timesteps == 4
    pipe(**tiny.inputs(num_inference_steps=None, sigmas=sigmas, strength=0.5))
    assert pipe.num_timesteps == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [500, 1]}, "Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given"),
        (
            {"num_inference_steps": None, "timesteps": [500, 1], "sigmas": [1.0]},
            "must be given; got timesteps and sigmas",
        ),
        ({"num_inference_steps": None, "timesteps": [500, 1]}, "EulerAncestralDiscreteScheduler does not support it"),
    ],
)
def test_contradictory_schedules_raise_errors(pipe: InstructDiffusionPipeline, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**tiny.inputs(**change))


@pytest.mark.parametrize("wrong", [[], 5, "abc"])
def test_invalid_schedules_raise_errors(pipe: InstructDiffusionPipeline, wrong: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`sigmas` must be a non-empty list of numbers"):
        pipe(**tiny.inputs(num_inference_steps=None, sigmas=wrong))


def test_the_current_timestep_is_that_of_the_step(pipe: InstructDiffusionPipeline) -> None:
    seen = []
    assert pipe.current_timestep is None
    pipe(**tiny.inputs(callback_on_step_end=lambda p, i, t, k: seen.append(p.current_timestep == t)))
    assert seen == [True, True] and pipe.current_timestep is None


def test_encode_prompt_takes_the_arguments_of_diffusers_by_position(pipe: InstructDiffusionPipeline) -> None:
    embeds, negative = pipe.encode_prompt("a cat", pipe.device, 2, True, "fog")
    assert len(embeds) == len(negative) == 2
    assert torch.equal(negative[:1], pipe.encode_prompt("fog")[0])
    alone, nothing = pipe.encode_prompt("a cat", pipe.device, 1, False)
    assert nothing is None and torch.equal(alone, embeds[:1])
