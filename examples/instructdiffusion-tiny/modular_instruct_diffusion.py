"""InstructDiffusion for Modular Diffusers: its guidance as a guider, and its pipeline as blocks.

The blocks call the methods of `InstructDiffusionPipeline`, so they return the same images. Hub repositories contain a
copy of this file and of the pipeline's file. All blocks are in one file, because diffusers loads the code of all local
folders into one package, where files such as `denoise.py` of two models would replace each other.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.image_processor import PipelineImageInput
from diffusers.modular_pipelines import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from .pipeline_instruct_diffusion import (
    DEFAULT_SETTINGS,
    FINITE_TENSOR,
    OUTPUT_TYPES,
    Guidance,
    InstructDiffusionPipeline,
    _check_caches,
    _check_copies,
    _check_eta,
    _check_generator,
    _check_output_type,
    _check_size,
    _expand,
    _is_finite_tensor,
    _is_number,
    _mean_of_ensembles,
    _repeat_generators,
    _require,
    _reset_caches,
)

# Inputs of the UNet for the predictions of `Guidance`: both, no_text, no_image. diffusers' guiders use the first two.
GUIDER_INPUT_FIELDS = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds"),
    "image_latents": ("image_latents", "image_latents", "no_image_latents"),
}
_COMPONENTS = {
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "scheduler": EulerAncestralDiscreteScheduler,
    "safety_checker": StableDiffusionSafetyChecker,
    "feature_extractor": CLIPImageProcessor,
}
# Name: type, default, description. B samples have N = B * num_images_per_prompt outputs, each of which is the mean of
# some of the M = N * ensemble_size denoised images.
_INPUTS: dict[str, tuple[Any, Any, str]] = {
    "prompt": (str | list[str], None, "The instruction, or a list of B."),
    "negative_prompt": (str | list[str], None, "Used instead of the empty prompt; one, or a list of B."),
    "clip_skip": (int, None, "How many of the text encoder's last layers to skip."),
    "image": (PipelineImageInput, None, "An image or a list of B, as in the pipeline."),
    "resolution": (
        int,
        None,
        "The working size in pixels. None is the model's for editing, or else the UNet's; 0 is the image's own.",
    ),
    "resize_mode": (str, "crop", "'crop' or 'stretch', see `working_size`."),
    "num_images_per_prompt": (int, 1, "The number of outputs per sample."),
    "ensemble_size": (
        int,
        None,
        "The number of images whose mean is an output. None is the model's for editing, or 1 for `decode` alone.",
    ),
    "num_inference_steps": (int, None, "The number of denoising steps; None is the model's default for editing."),
    "sigmas": (list[float], None, "Custom noise levels in descending order, instead of `num_inference_steps`."),
    "strength": (float, 1.0, "The fraction of the steps to run, in (0, 1]."),
    "generator": (
        torch.Generator | list[torch.Generator],
        None,
        "One generator, or a list of N; of M for the blocks after `input`.",
    ),
    "eta": (float, 0.0, "The eta of DDIM (arXiv 2010.02502), in [0, 1]."),
    "output_type": (str, "pil", "'pil', 'np' or 'pt'."),
    "prompt_embeds": (torch.Tensor, None, "The encoded instruction (1, B or M, 77, D)."),
    "negative_prompt_embeds": (torch.Tensor, None, "The encoded negative prompt (1, B or M, 77, D)."),
    "image_latents": (torch.Tensor, None, "Unscaled latents of the input (1, B or M, C, h, w), float32."),
    "answer_sizes": (list[tuple[int, int]], None, "The (width, height) of each input; default: the working size."),
    "timesteps": (torch.Tensor, None, "The timesteps to run (T,)."),
    "latents": (torch.Tensor, None, "Noisy or denoised latents (M, C, h, w), float32."),
    "images": (list[PIL.Image.Image] | np.ndarray | torch.Tensor, None, "The N outputs, of the type `output_type`."),
    "nsfw_content_detected": (list[bool], None, "One value per output; None without a safety checker."),
}


def _components(*names: str) -> list[ComponentSpec]:
    return [ComponentSpec(name, _COMPONENTS[name]) for name in names]


def _inputs(*names: str, required: tuple[str, ...] = ()) -> list[InputParam]:
    return [
        InputParam(name, type_hint=kind, default=default, required=name in required, description=text)
        for name in (*required, *names)
        for kind, default, text in [_INPUTS[name]]
    ]


def _outputs(*names: str) -> list[OutputParam]:
    return [OutputParam(name, type_hint=_INPUTS[name][0], description=_INPUTS[name][2]) for name in names]


def _settings() -> list[ConfigSpec]:
    return [ConfigSpec("task_settings", {}, "The call arguments that suit the model, by task family.")]


def _pipeline(components: ModularPipeline, *needed: str) -> InstructDiffusionPipeline:
    """A pipeline with the loaded components.

    Raises:
        ValueError: if one of the `needed` components is not loaded.
    """
    for name in needed:
        if getattr(components, name) is None:
            raise ValueError(
                f"`{name}` must be loaded before the call: use `load_components()` or `update_components({name}=...)`."
            )
    # A single block has only its own components.
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    parts: dict[str, Any] = {name: getattr(components, name, None) for name in names}
    return InstructDiffusionPipeline(**parts, task_settings=components.config.get("task_settings"))


def _check_latents(name: str, latents: Any) -> None:
    _require(_is_finite_tensor(latents) and latents.ndim == 4, name, f"{FINITE_TENSOR} of shape (M, C, h, w)", latents)


# --- Guider ---------------------------------------------------------------------------------------------------------


class InstructDiffusionGuidance(BaseGuidance):
    """The guidance of InstructDiffusion (arXiv 2309.03895), with up to three predictions in each step; see `Guidance`.

    Args:
        guidance_scale: guidance scale for the instruction (s_T), any finite number. `None` is the model's default for
            editing, or, if it has none, 5.0 as in the original code.
        image_guidance_scale: guidance scale for the input image (s_I). `None` is the model's default for editing, or,
            if it has none, 1.25.
        start, stop: guidance is on from `start` to `stop`, as fractions of the steps from 0 to 1. The other steps use
            plain conditional sampling, one prediction.
        enabled: whether guidance is on.

    Raises:
        ValueError: if a scale is not a finite number, or `start` and `stop` are not in order and from 0 to 1.
    """

    _input_predictions = list(Guidance._fields)
    # Used for scales that are None. The denoising block replaces them with the model's.
    default_scales: Mapping[str, Any] = DEFAULT_SETTINGS

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
            _require(scale is None or _is_number(scale), name, "a finite number or None", scale)
        self.guidance_scale = guidance_scale
        self.image_guidance_scale = image_guidance_scale

    @property
    def guidance(self) -> Guidance:
        """The weights of the predictions in the current step."""
        if not self._is_on():
            return Guidance.from_scales(0.5, 0.5)
        scales = {name: getattr(self, name) for name in ("guidance_scale", "image_guidance_scale")}
        scales = {name: self.default_scales[name] if scale is None else scale for name, scale in scales.items()}
        return Guidance.from_scales(*map(float, scales.values()))

    def _is_on(self) -> bool:
        steps = self._num_inference_steps
        return self._enabled and (steps is None or int(self._start * steps) <= self._step < int(self._stop * steps))

    @property
    def num_conditions(self) -> int:
        """The number of predictions in the current step: 1, 2 or 3."""
        return len(self.guidance.branches)

    @property
    def is_conditional(self) -> bool:
        """Whether the models were last prepared for the first prediction of the step."""
        return self._count_prepared == 1

    def prepare_inputs(self, data: dict[str, tuple[Any, Any, Any]]) -> list[BlockState]:
        """The inputs of each prediction from the inputs (both, no_text, no_image) of the model."""
        return [self._prepare_batch(data, Guidance._fields.index(name), name) for name in self.guidance.branches]

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str, str]]
    ) -> list[BlockState]:
        """The inputs of each prediction from the names (both, no_text, no_image) of values in a block state."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, Guidance._fields.index(name), name)
            for name in self.guidance.branches
        ]

    def forward(self, **predictions: torch.Tensor) -> GuiderOutput:
        """The guided prediction (M, C, h, w) from the predictions of the step, by name."""
        guidance = self.guidance
        return GuiderOutput(
            pred=guidance.combine(torch.cat([predictions[name] for name in guidance.branches])),
            pred_cond=predictions.get("both"),
            pred_uncond=predictions.get("no_text"),
        )


# --- Encoders -------------------------------------------------------------------------------------------------------


class InstructDiffusionTextEncoderStep(ModularPipelineBlocks):
    """Encodes the instruction and the negative prompt.

    Raises:
        ValueError: if `prompt` or `negative_prompt` is invalid, or their lengths differ.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Encodes the instruction and the negative prompt."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("text_encoder", "tokenizer")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("negative_prompt", "clip_skip", required=("prompt",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("prompt_embeds", "negative_prompt_embeds")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "text_encoder", "tokenizer")
        pipe._check_text("prompt", block.prompt, None)
        pipe._check_text("negative_prompt", block.negative_prompt, None)
        pipe._check_clip_skip(block.clip_skip)
        block.prompt_embeds, block.negative_prompt_embeds = pipe.encode_prompt(
            block.prompt,
            components._execution_device,
            negative_prompt=block.negative_prompt,
            clip_skip=block.clip_skip,
        )
        self.set_block_state(state, block)
        return components, state


class InstructDiffusionVaeEncoderStep(ModularPipelineBlocks):
    """Resizes the images and encodes them with the VAE.

    `resize_mode="stretch"`, and a `resolution` of `None` or one that is not a multiple of 64, need the configuration
    of the UNet, which another block loads.

    Raises:
        ValueError: if an argument is invalid, or the images have different working sizes.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Resizes the images to their working size and encodes them with the VAE."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("vae")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("resolution", "resize_mode", required=("image",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("image_latents", "answer_sizes")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "vae")
        pixels, block.answer_sizes = pipe.preprocess_image(block.image, block.resolution, block.resize_mode)
        block.image_latents = pipe.encode_image_latents(pixels, components._execution_device)
        self.set_block_state(state, block)
        return components, state


# --- Before denoising -----------------------------------------------------------------------------------------------


class InstructDiffusionInputStep(ModularPipelineBlocks):
    """Repeats all conditions and generators to one entry per image: M = B * num_images_per_prompt * ensemble_size.

    Raises:
        ValueError: if the conditions have different numbers of entries, other than 1.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return (
            "Repeats conditions and generators to one entry per image, M = B * num_images_per_prompt * ensemble_size."
        )

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return _settings()

    @property
    def inputs(self) -> list[InputParam]:
        conditions = ("prompt_embeds", "negative_prompt_embeds", "image_latents")
        return _inputs("num_images_per_prompt", "ensemble_size", "generator", required=conditions)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("prompt_embeds", "negative_prompt_embeds", "image_latents", "generator", "ensemble_size")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        if block.ensemble_size is None:
            block.ensemble_size = _pipeline(components).default_settings["ensemble_size"]
        _check_copies(block.num_images_per_prompt, block.ensemble_size)
        _check_generator(block.generator)
        _check_latents("image_latents", block.image_latents)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(block, name)
            is_embeds = _is_finite_tensor(embeds) and embeds.ndim == 3
            _require(is_embeds, name, f"{FINITE_TENSOR} of shape (B, 77, D)", embeds)
        batch_size = max(len(block.prompt_embeds), len(block.negative_prompt_embeds), len(block.image_latents))
        # Products of 8-bit integers of NumPy would wrap around.
        outputs, ensemble_size = batch_size * int(block.num_images_per_prompt), int(block.ensemble_size)
        block.generator = _repeat_generators(block.generator, outputs, ensemble_size)
        copies = int(block.num_images_per_prompt) * ensemble_size
        block.prompt_embeds = _expand("prompt", block.prompt_embeds, batch_size, copies)
        block.negative_prompt_embeds = _expand("negative_prompt", block.negative_prompt_embeds, batch_size, copies)
        block.image_latents = _expand("image", block.image_latents, batch_size, copies)
        self.set_block_state(state, block)
        return components, state


class InstructDiffusionSetTimestepsStep(ModularPipelineBlocks):
    """Sets the timesteps of the scheduler.

    Raises:
        ValueError: if an argument is invalid, or no step is left to run.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Sets the timesteps of the scheduler, and selects those to run."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("scheduler")

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return _settings()

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("num_inference_steps", "sigmas", "strength")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("timesteps")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "scheduler")
        steps = block.num_inference_steps
        if steps is None and block.sigmas is None:
            steps = pipe.default_settings["num_inference_steps"]
        pipe._check_schedule(steps, None, block.sigmas, block.strength)
        device = components._execution_device
        block.timesteps = pipe.prepare_timesteps(steps, None, block.sigmas, block.strength, device)
        self.set_block_state(state, block)
        return components, state


class InstructDiffusionPrepareLatentsStep(ModularPipelineBlocks):
    """Prepares the initial latents: noise, or the noised image latents if `strength` is below 1.

    Raises:
        ValueError: if the shape of `latents` or the number of generators is wrong.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Prepares the initial latents: noise, or the noised image latents if `strength` is below 1."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("scheduler")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("latents", "generator", required=("image_latents", "timesteps"))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("latents")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "scheduler")
        _check_generator(block.generator)
        _check_latents("image_latents", block.image_latents)
        if block.latents is not None:
            _check_latents("latents", block.latents)
        started_late = len(block.timesteps) < len(components.scheduler.timesteps)
        start = block.timesteps[:1] if started_late else None
        block.latents = pipe.prepare_latents(block.image_latents, start, block.generator, block.latents)
        self.set_block_state(state, block)
        return components, state


# --- Denoising ------------------------------------------------------------------------------------------------------


class InstructDiffusionLoopBeforeDenoiser(ModularPipelineBlocks):
    """Scale the noisy latents for the UNet, in each step of the denoising loop."""

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Scales the noisy latents for the UNet."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("scheduler")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(required=("latents",))

    def __call__(
        self, components: ModularPipeline, block: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        block.scaled_latents = components.scheduler.scale_model_input(block.latents, t)
        return components, block


class InstructDiffusionLoopDenoiser(ModularPipelineBlocks):
    """Predict the noise with the guider, in each step of the denoising loop."""

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Predicts the noise with the guider."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        guider = ComponentSpec("guider", InstructDiffusionGuidance, default_creation_method="from_config")
        return [guider, *_components("unet")]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(required=("timesteps", "prompt_embeds", "negative_prompt_embeds", "image_latents"))

    def __call__(
        self, components: ModularPipeline, block: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        guider, unet = components.guider, components.unet
        guider.set_state(step=i, num_inference_steps=len(block.timesteps), timestep=t)
        batches = guider.prepare_inputs_from_block_state(block, GUIDER_INPUT_FIELDS)
        branches = [getattr(batch, guider._identifier_key) for batch in batches]
        if branches != block.branches:
            _reset_caches(unet)
        block.branches = branches
        # The UNet is called once for all predictions, as in the pipeline. If the guider changes the UNet between
        # predictions, as skip-layer guidance does, it is called once for each.
        changes_unet = type(guider).prepare_models is not BaseGuidance.prepare_models
        for run in [[batch] for batch in batches] if changes_unet else [batches]:
            guider.prepare_models(unet)
            inputs = torch.cat([torch.cat([block.scaled_latents, batch.image_latents], dim=1) for batch in run])
            texts = torch.cat([batch.encoder_hidden_states for batch in run])
            predictions = unet(
                inputs.to(unet.dtype), t, encoder_hidden_states=texts.to(unet.dtype), return_dict=False
            )[0]
            for batch, prediction in zip(run, predictions.to(block.latents.dtype).chunk(len(run)), strict=True):
                batch.noise_pred = prediction
            guider.cleanup_models(unet)
        block.noise_pred = guider(batches)[0]
        return components, block


class InstructDiffusionLoopAfterDenoiser(ModularPipelineBlocks):
    """Compute the latents of the next noise level, in each step of the denoising loop."""

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return "Steps the latents to the next noise level."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("scheduler")

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("generator", "eta")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("latents")

    def __call__(
        self, components: ModularPipeline, block: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        block.latents = components.scheduler.step(
            block.noise_pred, t, block.latents, **block.step_kwargs, return_dict=False
        )[0]
        return components, block


class InstructDiffusionDenoiseStep(LoopSequentialPipelineBlocks):
    """Runs the denoising loop.

    Raises:
        ValueError: if the UNet is not one of InstructDiffusion, or its output is not finite.
    """

    model_name = "instruct-diffusion"
    block_classes = [
        InstructDiffusionLoopBeforeDenoiser,
        InstructDiffusionLoopDenoiser,
        InstructDiffusionLoopAfterDenoiser,
    ]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]

    @property
    def description(self) -> str:
        return "Denoises the latents over `timesteps`; each step runs the sub-blocks."

    @property
    def loop_expected_configs(self) -> list[ConfigSpec]:
        return _settings()

    @property
    def loop_inputs(self) -> list[InputParam]:
        return _inputs("generator", "eta", required=("timesteps", "image_latents"))

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "unet", "scheduler", "guider")
        _check_eta(block.eta)
        _check_generator(block.generator)
        for name in ("latents", "image_latents"):
            _check_latents(name, getattr(block, name))
        channels = block.latents.shape[1] + block.image_latents.shape[1]
        if channels != components.unet.config.in_channels:
            raise ValueError(
                f"`unet` must be a UNet of InstructDiffusion with {channels} input channels (noisy latents and image"
                f" latents); got {components.unet.config.in_channels} channels."
            )
        if components.unet.config.encoder_hid_dim_type == "ip_image_proj":
            raise ValueError(
                "`unet` must not have an IP-Adapter: the blocks do not support IP-Adapters. Use the pipeline."
            )
        _check_caches(components.unet)
        # The inputs may come from blocks that ran on another device.
        for name in ("latents", "image_latents", "prompt_embeds", "negative_prompt_embeds"):
            setattr(block, name, getattr(block, name).to(components._execution_device))
        block.branches = []
        if hasattr(components.guider, "default_scales"):  # Guiders of diffusers do not have it.
            components.guider.default_scales = pipe.default_settings
        block.no_image_latents = torch.zeros_like(block.image_latents)
        block.step_kwargs = pipe.step_kwargs(block.generator, block.eta)
        order = components.scheduler.order
        with self.progress_bar(total=-(-len(block.timesteps) // order)) as progress_bar:
            for i, t in enumerate(block.timesteps):
                components, block = self.loop_step(components, block, i=i, t=t)
                if (i + 1) % order == 0 or i == len(block.timesteps) - 1:
                    progress_bar.update()
        pipe._check_finite("unet", block.latents)
        self.set_block_state(state, block)
        return components, state


# --- Decoder --------------------------------------------------------------------------------------------------------


class InstructDiffusionVaeDecoderStep(ModularPipelineBlocks):
    """Decodes the latents and runs the safety checker, if there is one.

    Raises:
        ValueError: if an argument is invalid.
    """

    model_name = "instruct-diffusion"

    @property
    def description(self) -> str:
        return (
            "Decodes the latents, runs the safety checker if there is one, and resizes PIL images to the input size."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _components("vae", "safety_checker", "feature_extractor")

    @property
    def inputs(self) -> list[InputParam]:
        names = ("output_type", "answer_sizes", "resolution", "resize_mode", "ensemble_size")
        return _inputs(*names, required=("latents",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("images", "nsfw_content_detected")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = _pipeline(components, "vae")
        _check_latents("latents", block.latents)
        _check_size(block.resolution, block.resize_mode)
        _check_output_type(block.output_type, tuple(kind for kind in OUTPUT_TYPES if kind != "latent"))
        ensemble_size = 1 if block.ensemble_size is None else block.ensemble_size
        _check_copies(1, ensemble_size)
        expected = f"a tensor whose first dimension is a multiple of the ensemble size {ensemble_size}"
        _require(len(block.latents) % ensemble_size == 0, "latents", expected, block.latents)
        pictures = _mean_of_ensembles(pipe.decode_latents(block.latents), ensemble_size)
        pictures, block.nsfw_content_detected = pipe.run_safety_checker(pictures, components._execution_device)
        sizes = block.answer_sizes or [(pictures.shape[3], pictures.shape[2])]
        crop = block.resize_mode == "crop" and block.resolution != 0
        block.images = pipe.postprocess_image(pictures, block.output_type, sizes, crop)
        self.set_block_state(state, block)
        return components, state


# --- The whole pipeline ---------------------------------------------------------------------------------------------


class InstructDiffusionBlocks(SequentialPipelineBlocks):
    """All blocks.

    They do what `InstructDiffusionPipeline` does, without IP-Adapters, LoRA scales, callbacks, `timesteps` and
    `output_type="latent"`.
    """

    block_classes = [
        InstructDiffusionTextEncoderStep,
        InstructDiffusionVaeEncoderStep,
        InstructDiffusionInputStep,
        InstructDiffusionSetTimestepsStep,
        InstructDiffusionPrepareLatentsStep,
        InstructDiffusionDenoiseStep,
        InstructDiffusionVaeDecoderStep,
    ]
    block_names = [
        "text_encoder",
        "vae_encoder",
        "input",
        "set_timesteps",
        "prepare_latents",
        "denoise",
        "decode",
    ]

    @property
    def description(self) -> str:
        return "Applies an instruction to an image (InstructDiffusion, arXiv 2309.03895)."

    @property
    def outputs(self) -> list[OutputParam]:
        return _outputs("images", "nsfw_content_detected")
