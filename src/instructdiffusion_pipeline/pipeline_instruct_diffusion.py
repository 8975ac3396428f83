"""InstructDiffusion as a diffusers pipeline: one model for many vision tasks, described by instructions.

The method is "InstructDiffusion: A Generalist Modeling Interface for Vision Tasks" (Geng et al., CVPR 2024, arXiv
2309.03895). This file imports nothing from its package, because Hub repositories contain a copy of it.
"""

import functools
import inspect
import json
import math
import os
import re
import reprlib
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.models import ImageProjection
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
    retrieve_latents,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import (
    USE_PEFT_BACKEND,
    BaseOutput,
    is_accelerate_available,
    logging,
    replace_example_docstring,
    scale_lora_layers,
    unscale_lora_layers,
)
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import file_exists
from PIL import ImageOps
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

logger = logging.get_logger(__name__)

Box = tuple[float, float, float, float]
# For each IP-Adapter: one PIL image, several, or a tensor of them.
IPAdapterImages = PIL.Image.Image | torch.Tensor | Sequence[PIL.Image.Image | torch.Tensor | Sequence[PIL.Image.Image]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
RESIZE_MODES = ("crop", "stretch")
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_RESOLUTION = 16384
MAX_IMAGES_PER_PROMPT = 1000
# Of the integers in `task_settings`.
SETTING_RANGES = {
    "num_inference_steps": (1, 10_000),  # a call compares it with the scheduler
    "ensemble_size": (1, MAX_IMAGES_PER_PROMPT),
    "resolution": (16, MAX_RESOLUTION),
}
# torch cannot compare numbers of these types.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
# Arguments of attention processors that the UNet sets; "gligen" needs another UNet.
SET_BY_UNET = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "gligen")
FINITE_TENSOR = "a floating-point tensor of finite values"
# The original code's settings for editing, used if neither the caller nor the model gives a value.
DEFAULT_SETTINGS = {
    "num_inference_steps": 100,
    "guidance_scale": 5.0,
    "image_guidance_scale": 1.25,
    "ensemble_size": 1,
}

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from instructdiffusion_pipeline import InstructDiffusionPipeline

        >>> pipe = InstructDiffusionPipeline.from_pretrained("path/to/model", dtype=torch.float16).to("cuda")
        >>> image = pipe("make it winter", load_image("photo.jpg"), generator=torch.manual_seed(0)).images[0]
        >>> image.save("winter.png")
        ```
"""


class Guidance(NamedTuple):
    """The weights of up to three predictions in the guided prediction (arXiv 2309.03895).

        eps = 1/2 (no_text + no_image) + s_T (both - no_text) + s_I (both - no_image)

    `both` is conditioned on the instruction and the image, `no_text` on the image alone, `no_image` on the instruction
    alone. The weights sum to 1. With both scales at 1/2, only `both` has a weight: plain conditional sampling.
    """

    both: float
    no_text: float
    no_image: float

    @classmethod
    def from_scales(cls, guidance_scale: float, image_guidance_scale: float) -> "Guidance":
        """The weights for a text scale s_T and an image scale s_I."""
        return cls(guidance_scale + image_guidance_scale, 0.5 - guidance_scale, 0.5 - image_guidance_scale)

    @property
    def branches(self) -> list[str]:
        """The predictions with a nonzero weight; the others need not be computed."""
        return [name for name, weight in self._asdict().items() if weight != 0]

    def combine(self, predictions: torch.Tensor) -> torch.Tensor:
        """The guided prediction (N, C, h, w) from those of the K `branches`, concatenated (K * N, C, h, w)."""
        parts = predictions.chunk(len(self.branches))
        return sum(getattr(self, name) * part for name, part in zip(self.branches, parts, strict=True))


class WorkingSize(NamedTuple):
    """The size at which the model works, and the part of the image that its output shows.

    `size` is (width, height), `box` is (left, top, right, bottom) in pixels of the input. `box` is for PIL outputs,
    which are resized back to the input size. Outputs of type np, pt and latent show the region
    `center_crop(input_size, size)`.
    """

    size: tuple[int, int]
    box: Box


def center_crop(size: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centered box inside `size` with the aspect ratio of `target`: the part that `ImageOps.fit` keeps."""
    width, height = size
    crop_width = min(width, height * target[0] / target[1])
    crop_height = min(height, width * target[1] / target[0])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def working_size(
    width: int,
    height: int,
    resolution: int,
    vae_scale_factor: int = 8,
    resize_mode: str = "crop",
    size_multiple: int = 64,
) -> WorkingSize:
    """The size at which the model works for an input of `width` x `height` pixels, and the box that its output shows.

    With a `resolution` of 0 both sides are rounded down to a multiple of `vae_scale_factor`, at least one multiple;
    nothing is cropped. Otherwise `resize_mode` decides:

    - "crop", as in the original code: `resolution` refers to the long side. Both sides are multiples of
      `size_multiple`, in the original code of 64, and the long side is near `resolution`. The image is fitted to that
      size, and the output is fitted back to the input size. Both steps crop to the center, so the output shows the
      box that remains after both crops.
    - "stretch": `resolution` refers to the short side, which is the multiple of `size_multiple` nearest to it. The
      long side is the multiple that best preserves the aspect ratio. The whole image is resized.

    Raises:
        ValueError: if a side or the resolution is too small, the mode is unknown, or the long side would exceed four
            times `resolution` ("crop") or the short side ("stretch").
    """
    if width < 1 or height < 1:
        raise ValueError(f"`image` must be at least 1 x 1 pixel; got {width} x {height}.")
    _check_size(resolution, resize_mode)
    resolution = int(resolution)
    if resolution == 0:
        own_width, own_height = (max(1, side // vae_scale_factor) * vae_scale_factor for side in (width, height))
        return WorkingSize((own_width, own_height), (0.0, 0.0, float(width), float(height)))
    short_side, long_side = min(width, height), max(width, height)
    if resize_mode == "stretch":
        short = size_multiple * max(1, round(resolution / size_multiple))
        long = size_multiple * round(long_side * short / (short_side * size_multiple))
        size = (short, long) if width < height else (long, short)
        if long > 4 * short:
            raise ValueError(
                f"`image` of {width} x {height} pixels is too elongated: it would become {size[0]} x {size[1]} pixels,"
                " and no side may exceed four times the other. Crop it."
            )
        return WorkingSize(size, (0.0, 0.0, float(width), float(height)))
    # Integer arithmetic, because floating-point rounding would make one in seventeen sizes too small by one multiple.
    short = size_multiple * -(-short_side * resolution // (size_multiple * long_side))
    long = size_multiple * (long_side * short // (size_multiple * short_side))
    size = (short, long) if width < height else (long, short)
    if long > 4 * resolution:
        raise ValueError(
            f"`image` of {width} x {height} pixels is too elongated for `resolution={resolution}`: it would become"
            f" {size[0]} x {size[1]}, and no side may exceed four times the resolution. Crop it or raise `resolution`."
        )
    left, top, right, bottom = center_crop((width, height), size)
    x, y = (right - left) / size[0], (bottom - top) / size[1]
    shown = center_crop(size, (width, height))
    return WorkingSize(size, (left + x * shown[0], top + y * shown[1], left + x * shown[2], top + y * shown[3]))


def upright_rgb(picture: PIL.Image.Image, name: str = "image") -> PIL.Image.Image:
    """The image in 8-bit RGB, with its EXIF orientation applied. Transparency is dropped, not blended.

    The range of the modes F and I follows from the values: 0 to 1 or 0 to 255 in F, 0 to 255 or 0 to 65535 in I.

    Raises:
        ValueError: if values of the modes F and I are outside of these ranges. The message names the argument `name`.
    """
    picture.load()  # outside the block below, so that a damaged file raises an error
    with suppress(Exception):  # a damaged EXIF block can raise any exception; its orientation is ignored
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        # Pillow opens 16-bit files in modes that start with I, and `convert` would clip values above 255 to white.
        levels = np.asarray(picture)
        lowest, highest = levels.min(initial=0), levels.max(initial=0)
        whites = {"F": (1, 255), "I": (255, 65535)}.get(picture.mode, (65535,))
        if not (lowest >= 0 and highest <= whites[-1]):
            raise ValueError(
                f"`{name}` of mode {picture.mode} must have values from 0 to {whites[-1]}; got values from {lowest} to"
                f" {highest}."
            )
        white = next(white for white in whites if highest <= white)
        levels = levels // (white // 255) if white > 255 else np.rint(levels * (255 // white))
        picture = PIL.Image.fromarray(levels.astype(np.uint8))
    elif picture.mode == "La":
        picture = picture.convert("LA")
    rgb = picture.convert("RGB")
    # Otherwise a result that is saved would have transparent pixels, or the profile of another color space.
    rgb.info.pop("transparency", None)
    if not picture.mode.startswith(("RGB", "P")):
        rgb.info.pop("icc_profile", None)
    return rgb


def _as_pictures(image: Any) -> list[PIL.Image.Image | torch.Tensor]:
    """The argument `image` as a flat list: PIL images unchanged, arrays as tensors (C, H, W)."""
    if isinstance(image, PIL.Image.Image):
        return [image]
    if isinstance(image, (list, tuple)) and len(image) > 0:
        return [picture for item in image for picture in _as_pictures(item)]
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] == 3 and _is_numeric(image):
        # torch supports neither negative strides nor foreign byte orders, and warns about read-only arrays.
        native = np.array(image, dtype=image.dtype.newbyteorder("="), order="C")
        image = torch.from_numpy(native).movedim(-1, -3)
    if _is_readable(image) and image.ndim in (3, 4) and len(image) > 0:
        image = image.detach()
        return [image] if image.ndim == 3 else list(image)
    raise ValueError(
        "`image` must be a PIL image, a tensor (3, H, W) or (B, 3, H, W), an array (H, W, 3) or (B, H, W, 3), image"
        f" latents (B, C, h, w), or a non-empty list of these; got {_described(image)}."
    )


def _is_numeric(array: np.ndarray) -> bool:
    """Whether torch supports the array's type. It does not support objects, texts, dates and long doubles."""
    return array.dtype.kind in "fiub" and array.dtype.itemsize <= 8


def _is_image_latents(picture: Any, channels: int) -> TypeGuard[torch.Tensor]:
    """Whether an item of `image` is image latents (C, h, w), and not an RGBA image.

    The values of an image are in [0, 1] or are 8-bit levels; those of image latents are neither, unless all are zero.
    """
    if not isinstance(picture, torch.Tensor) or picture.shape[0] != channels or not picture.is_floating_point():
        return False
    is_picture = picture.numel() > 0 and picture.min() >= 0 and (picture.max() <= 1 or not picture.frac().any())
    return not is_picture or not picture.any()


def _require(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raises a ValueError with an argument's name, its expected value and its value if `condition` is False."""
    if not condition:
        raise ValueError(f"`{name}` must be {expected}; got {_described(value)}.")


def _check_size(resolution: int | None, resize_mode: str) -> None:
    """Raises a ValueError for an invalid `resolution` or `resize_mode`."""
    is_size = _is_integer(resolution, 16, MAX_RESOLUTION) or _is_integer(resolution, 0, 0)
    expected = f"0 (the image's own size) or an integer of at least 16 and at most {MAX_RESOLUTION}"
    _require(resolution is None or is_size, "resolution", expected, resolution)
    is_mode = isinstance(resize_mode, str) and resize_mode in RESIZE_MODES
    _require(is_mode, "resize_mode", f"one of {RESIZE_MODES}", resize_mode)


def _check_copies(num_images_per_prompt: int, ensemble_size: int = 1) -> None:
    for name, copies in (("num_images_per_prompt", num_images_per_prompt), ("ensemble_size", ensemble_size)):
        expected = f"an integer of at least 1 and at most {MAX_IMAGES_PER_PROMPT}"
        _require(_is_integer(copies, 1, MAX_IMAGES_PER_PROMPT), name, expected, copies)


def _check_generator(generator: torch.Generator | list[torch.Generator] | None) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    _require(
        generator is None or all(isinstance(item, torch.Generator) for item in generators),
        "generator",
        "a torch.Generator or a list of them",
        generator,
    )


def _check_eta(eta: float) -> None:
    _require(_is_number(eta, 0, 1), "eta", "a number from 0 to 1", eta)


def _check_output_type(output_type: str, choices: tuple[str, ...]) -> None:
    is_choice = isinstance(output_type, str) and output_type in choices
    _require(is_choice, "output_type", f"one of {choices}", output_type)


def _described(value: Any) -> str:
    """A short text for any argument in an error message."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    return reprlib.repr(value)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= int(value) <= high


def _is_number(value: Any, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> bool:
    """Whether a value is an int or float in a range, finite, and not too large for float32."""
    is_real = isinstance(value, (int, float, np.integer, np.float16, np.float32)) and not isinstance(value, bool)
    # Python compares integers of any size with a float exactly.
    return is_real and bool(low <= (value if isinstance(value, int) else float(value)) <= high)


def _is_readable(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor whose values torch can compare: dense, with data, not of 8-bit floats."""
    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
    return is_dense and value.dtype not in FLOAT8


def _is_finite_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return _is_readable(value) and value.is_floating_point() and value.numel() > 0 and bool(value.isfinite().all())


def _accepts_step(callback: Any) -> bool:
    """Whether a callback may be called as `callback(pipeline, step, timestep, tensors)`."""
    if not callable(callback):
        return False
    try:
        inspect.signature(callback).bind(None, 0, None, {})
    except (TypeError, ValueError):  # It takes other arguments, or is built in and has no signature.
        return False
    return True


def is_text(value: Any) -> bool:
    """Whether a value is a text without unpaired surrogates, which cannot be encoded."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _resize_tensor(picture: torch.Tensor, size: tuple[int, int], crop: bool) -> torch.Tensor:
    """An image tensor (3, H, W) in [0, 1], resized on the CPU to (width, height) with the filter of PIL images."""
    picture = picture.cpu()
    if (picture.shape[2], picture.shape[1]) == size:
        return picture
    channels = [_resize_picture(PIL.Image.fromarray(channel), size, crop) for channel in picture.float().numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 1)


def _resize_picture(picture: PIL.Image.Image, size: tuple[int, int], crop: bool) -> PIL.Image.Image:
    """The image in the given (width, height): cropped to the aspect ratio first, or stretched."""
    if crop:
        return ImageOps.fit(picture, size, PIL.Image.Resampling.LANCZOS)
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


def _expand(name: str, tensor: torch.Tensor, batch_size: int, copies: int) -> torch.Tensor:
    """Repeats (1 or batch_size, ...) to (batch_size * copies, ...); the copies of one sample are adjacent."""
    if tensor.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`{name}` must have one entry, or one per sample of the call; got {tensor.shape[0]}. The call has"
            f" {batch_size} samples, the largest number of entries of `prompt`, `negative_prompt` and `image`."
        )
    return tensor.repeat_interleave(copies * (batch_size // tensor.shape[0]), dim=0)


def _repeat_generators(
    generator: torch.Generator | list[torch.Generator] | None, outputs: int, ensemble_size: int
) -> torch.Generator | list[torch.Generator] | None:
    """Repeats a list of one generator per output to one per image of the ensembles."""
    if not isinstance(generator, list):
        return generator
    if len(generator) != outputs:
        raise ValueError(f"`generator` must be one or a list of {outputs}, one per output; got {len(generator)}.")
    return [single for single in generator for _ in range(ensemble_size)]


def _mean_of_ensembles(images: torch.Tensor, ensemble_size: int) -> torch.Tensor:
    """The means (N, 3, H, W) of ensembles of adjacent images (N * ensemble_size, 3, H, W)."""
    return images if ensemble_size == 1 else images.unflatten(0, (-1, ensemble_size)).mean(1)


def _check_caches(unet: UNet2DConditionModel) -> None:
    """Raises a ValueError if FasterCache is applied to the UNet."""
    if "faster_cache_denoiser" in getattr(getattr(unet, "_diffusers_hook", None), "hooks", {}):
        raise ValueError(
            "`unet` must not have FasterCache, which expects two predictions in a batch; this pipeline has one to"
            " three. Use PyramidAttentionBroadcast."
        )


def _hook_registries(unet: UNet2DConditionModel) -> Iterator[Any]:
    """The `HookRegistry` of each module to which hooks of diffusers are applied."""
    return (module._diffusers_hook for module in unet.modules() if hasattr(module, "_diffusers_hook"))


def _has_caches(unet: UNet2DConditionModel | None) -> bool:
    """Whether one of diffusers' caches, such as PyramidAttentionBroadcast, is applied to the UNet."""
    registries = () if unet is None else _hook_registries(unet)
    return any(hook._is_stateful for registry in registries for hook in registry.hooks.values())


def _reset_caches(unet: UNet2DConditionModel) -> None:
    """Empty the caches of diffusers' hooks, which contain the attention of an earlier call or of other predictions."""
    for registry in _hook_registries(unet):
        registry.reset_stateful_hooks(recurse=False)


# Ids of the objects that serve one call only: pipelines and schedulers, which store its state, and models that it
# changes. `_calls` counts the calls of each model.
_in_call: set[int] = set()
_calls: Counter[int] = Counter()
_in_call_lock = threading.Lock()


def _exclusive(call: Callable[..., Any]) -> Callable[..., Any]:
    """Raise a RuntimeError if another call runs the pipeline, its scheduler, or a model that one of them changes."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def exclusive_call(self: "InstructDiffusionPipeline", *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            return call(self, *args, **kwargs)  # raises the same error with the name of the method
        own = {id(self), id(self.scheduler)}
        models = {id(model) for model in (self.unet, self.text_encoder) if model is not None}
        changed = {id(model) for model in _changed_models(self, arguments.get("cross_attention_kwargs"))}
        with _in_call_lock:
            if own & _in_call:
                raise RuntimeError(
                    "This pipeline or its scheduler is already running, in another thread or in its own callback. For"
                    " concurrent calls create a second pipeline that shares all components except the scheduler:"
                    " InstructDiffusionPipeline.from_pipe(pipe,"
                    " scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))"
                )
            if models & _in_call or any(_calls[model] for model in changed):
                raise RuntimeError(
                    "`unet` or `text_encoder` is already running in another call, and a LoRA scale or a cache changes"
                    " it during a call. For concurrent calls load a second pipeline with `from_pretrained`."
                )
            _in_call.update(own | changed)
            _calls.update(models)
        try:
            return call(self, *args, **kwargs)
        finally:
            with _in_call_lock:
                _in_call.difference_update(own | changed)
                for model in models:
                    _calls[model] -= 1
                    if not _calls[model]:
                        del _calls[model]

    return exclusive_call


def _changed_models(pipeline: "InstructDiffusionPipeline", attention_kwargs: Any) -> list[torch.nn.Module]:
    """The models that a call changes while it runs: LoRA layers are scaled, and caches are filled."""
    scale = attention_kwargs.get("scale") if isinstance(attention_kwargs, dict) else None
    scaled = _is_number(scale) and scale != 1
    models = [pipeline.unet, pipeline.text_encoder] if scaled else []
    return [model for model in models if getattr(model, "peft_config", None)] + (
        [pipeline.unet] if _has_caches(pipeline.unet) else []
    )


def _checked_task_settings(task_settings: Any) -> dict[str, dict[str, Any]]:
    """The argument `task_settings` in the form that is stored as JSON."""
    value = {} if task_settings is None else task_settings
    _require(
        isinstance(value, Mapping)
        and all(isinstance(own, Mapping) and set(own) <= {*DEFAULT_SETTINGS, "resolution"} for own in value.values()),
        "task_settings",
        f"a mapping of task families to values for {', '.join(DEFAULT_SETTINGS)} or resolution, as in"
        ' {"editing": {"guidance_scale": 4.0}}',
        task_settings,
    )
    return {
        family: {name: _checked_setting(family, name, setting) for name, setting in own.items()}
        for family, own in value.items()
    }


def _checked_setting(family: str, name: str, value: Any) -> float:
    """A setting of a task family as an int or, for guidance scales, a float: JSON has no numbers of NumPy."""
    described = f"task_settings[{family!r}][{name!r}]"
    if name.endswith("guidance_scale"):
        _require(_is_number(value), described, "a finite number", value)
        return float(value)
    low, high = SETTING_RANGES[name]
    _require(_is_integer(value, low, high), described, f"an integer of at least {low} and at most {high}", value)
    return int(value)


def _checked_calibration(calibration: Any) -> dict[str, list[float]]:
    """The argument `score_calibration` in the form that is stored as JSON."""
    value = {} if calibration is None else calibration
    pairs = value.values() if isinstance(value, Mapping) and value.keys() <= {"segmentation", "keypoints"} else [None]
    _require(
        all(
            isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_number, pair)) and pair[0] > 0
            for pair in pairs
        ),
        "score_calibration",
        'a mapping of "segmentation" or "keypoints" to [slope above 0, intercept], as {"keypoints": [0.9, 0.1]}',
        calibration,
    )
    return {family: [float(number) for number in pair] for family, pair in value.items()}


def _missing_weights(model: Any, variant: str | None) -> list[str]:
    """The names of the parameters of a component that its files lack."""
    folder = Path(model.config._name_or_path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    plain = [file for file in files if "." not in file.stem]
    files = [file for file in files if f".{variant}" in file.name] or plain
    stored = {name for file in files for name in _weight_names(file)}
    current = {current_name(name) for name in stored}
    # In transformers before 5.6, text encoders have this prefix, and cannot read files without it.
    return [
        name
        for name, _ in model.named_parameters()
        if files and (name not in stored if name.startswith("text_model.") else current_name(name) not in current)
    ]


def _check_missing(component: str, missing: list[str], source: str | os.PathLike[str]) -> None:
    """Raises a ValueError that names the missing weights, if there are any."""
    if missing:
        raise ValueError(
            f"{source} must have all weights of `{component}`; {len(missing)} are missing: {', '.join(missing)}."
        )


def _weight_names(file: Path) -> list[str]:
    """The names of the weights in a file; those of a safetensors file are read from its header."""
    if file.suffix != ".safetensors":
        return list(load_state_dict(str(file)))
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def current_name(name: str) -> str:
    """The name of a weight in current versions of diffusers and transformers, without transformers' prefix."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return re.sub(r"^((text|vision)_model\.)+", "", name)


def add_code(folder: str | os.PathLike[str]) -> None:
    """Copy this file into the folder of a saved model, and name it in the folder's `model_index.json`.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then works without this package.
    """
    code, index = Path(__file__), Path(folder, InstructDiffusionPipeline.config_name)
    shutil.copyfile(code, index.with_name(code.name))
    config = json.loads(index.read_text(encoding="utf-8"))
    # If the name has the form [file, class], diffusers looks for the class in that file of the folder.
    config["_class_name"] = [code.stem, InstructDiffusionPipeline.__name__]
    index.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass
class InstructDiffusionPipelineOutput(BaseOutput):
    """
    Args:
        images: the outputs. A list of PIL images, each in the size of its input; or, at working size, an array
            (N, H, W, 3) or a tensor (N, 3, H, W) in [0, 1]; or latents (N, C, h, w), multiplied by the VAE's scaling
            factor.
        nsfw_content_detected: one `bool` per output, or `None` without a safety checker. Flagged outputs are black.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None


class InstructDiffusionPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """
    Pipeline for instruction-based editing, restoration, segmentation and keypoint detection. Its output is an image.

    The method is InstructDiffusion (Geng et al., CVPR 2024, arXiv 2309.03895). LoRA weights, IP-Adapters, textual
    inversions and single-file checkpoints load as in diffusers' Stable Diffusion pipelines.

    Args:
        vae: encodes the input and decodes the output.
        text_encoder: CLIP text model, whose last hidden state is the embedding of the instruction.
        tokenizer: the tokenizer that belongs to `text_encoder`.
        unet: takes the noisy latents concatenated with the image latents (8 channels for Stable Diffusion 1.5).
        scheduler: the original code uses `EulerAncestralDiscreteScheduler(timestep_spacing="linspace")`.
        safety_checker: replaces outputs that it classifies as offensive with black images; needs `feature_extractor`.
        feature_extractor: prepares images for `safety_checker` and `image_encoder`.
        image_encoder: encodes the images given to an IP-Adapter.
        readout: a `UNet2DModel` that decodes masks and keypoints. `instructdiffusion_pipeline.ask` uses it;
            the pipeline itself only stores it.
        requires_safety_checker: whether to warn if `safety_checker` is missing.
        task_settings: the steps, guidance scales, ensemble size and resolution that suit this model, by task family,
            for example `{"editing": {"num_inference_steps": 20, "guidance_scale": 4.0}}`. `__call__` uses those of
            "editing", `instructdiffusion_pipeline.ask` those of its task. They are saved in `model_index.json`.
        score_calibration: slope and intercept that `instructdiffusion_pipeline.ask` uses to convert the scores of
            masks and joints to probabilities, as `{"segmentation": [1.2, -0.5], "keypoints": [0.9, 0.1]}`. The script
            `examples/calibrate.py` computes them. They are saved in `model_index.json`.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae->readout"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder", "readout"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"]
    _current_timestep: torch.Tensor | None = None

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        readout: UNet2DModel | None = None,
        requires_safety_checker: bool = False,
        task_settings: Mapping[str, Mapping[str, Any]] | None = None,
        score_calibration: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if safety_checker is None and requires_safety_checker:
            logger.warning(
                "`requires_safety_checker` is True, but there is no `safety_checker`: outputs are returned unfiltered."
            )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("`safety_checker` needs a `feature_extractor` to prepare its images; got None.")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            readout=readout,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            task_settings=task_settings,
            score_calibration=score_calibration,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        # The processor only converts between value ranges; `working_size` determines the size.
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_resize=False)

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers, but raises a ValueError if `task_settings` or `score_calibration` is invalid."""
        if "task_settings" in kwargs:
            kwargs["task_settings"] = _checked_task_settings(kwargs["task_settings"])
        if "score_calibration" in kwargs:
            kwargs["score_calibration"] = _checked_calibration(kwargs["score_calibration"])
        super().register_to_config(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers, but raises an error for missing weights, for which diffusers would use arbitrary values.

        Without `dtype`, all models are loaded in float32. diffusers would load its own models in float32, and those of
        transformers in the precision of their files.

        Raises:
            ValueError: if the files of a component lack weights; the message names them.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for component, model in pipe.components.items():
            if isinstance(model, torch.nn.Module) and component not in kwargs:
                missing = _missing_weights(model, kwargs.get("variant"))
                _check_missing(component, missing, pretrained_model_name_or_path)
        return pipe

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str, **kwargs: Any) -> Any:
        """As in diffusers, but raises an error if the file lacks weights, which diffusers would leave uninitialized.

        Raises:
            ImportError: if accelerate is not installed, because missing weights then cannot be detected.
            ValueError: if the file lacks weights.
        """
        if not is_accelerate_available():
            raise ImportError("`from_single_file` needs accelerate, to detect weights that the file lacks.")
        try:
            pipe = super().from_single_file(pretrained_model_link_or_path, **kwargs)
        except NotImplementedError as error:  # diffusers cannot move a weight that has no values
            raise ValueError(
                f"{pretrained_model_link_or_path} must have all weights of the VAE and the UNet; some are missing."
            ) from error
        for component, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                missing = [name for name, weight in model.named_parameters() if weight.is_meta]
                _check_missing(component, missing, pretrained_model_link_or_path)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As in diffusers, but the models keep their precision unless `dtype` is given.

        diffusers would convert them to float32, also those of `pipeline`, because the two pipelines share them.
        """
        if kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None:
            return super().from_pipe(pipeline, **kwargs)
        # diffusers converts at the end, by `to`.
        unconverted: Any = type(cls.__name__, (cls,), {"to": lambda self, *args, **kwargs: self})
        pipe = unconverted.from_pipe(pipeline, **kwargs | {"dtype": torch.float32})
        pipe.__class__ = cls
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a model's `model_index.json`, and replace a class name of the form [file, class] with the class alone.

        A folder with that form contains a copy of this file, which diffusers would run only with
        `trust_remote_code=True`. This class does not need the copy. This method is called whether a model is loaded
        from a folder or from the Hub.
        """
        settings = super()._dict_from_json_file(json_file)
        name = settings.get("_class_name")
        if isinstance(name, list) and name[-1] == "InstructDiffusionPipeline":
            settings["_class_name"] = name[-1]
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but neither with adapters nor into a folder that has code for Modular Diffusers.

        Raises:
            ValueError: if a model has LoRA layers or an IP-Adapter, because the folder could not be loaded.
            FileExistsError: if `save_directory` was written by `export`. Its blocks would keep the earlier settings.
        """
        self.check_no_adapters()
        if Path(save_directory, "modular_model_index.json").exists():
            raise FileExistsError(
                "`save_directory` must not be a folder with blocks, which would keep their earlier weights and"
                f" settings; got {save_directory}. Save to another folder, or use `instructdiffusion_pipeline.export`."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Called by `push_to_hub`, and by `save_pretrained` with that argument."""
        index = "/".join(filter(None, (kwargs.get("subfolder"), "modular_model_index.json")))
        if file_exists(repo_id, index, token=kwargs.get("token")):
            raise FileExistsError(
                f"The repository {repo_id} must not have {index}: these blocks would keep their earlier settings. Use"
                " `instructdiffusion_pipeline.push`, or another repository."
            )
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def check_no_adapters(self) -> None:
        """Raise a ValueError if the pipeline has LoRA layers or an IP-Adapter, with which its weights do not load."""
        for component in ("unet", "text_encoder"):
            if getattr(getattr(self, component), "peft_config", None):
                raise ValueError(
                    f"The pipeline must not have LoRA layers, but its {component} has. Call fuse_lora() to keep their"
                    " effect, then unload_lora_weights()."
                )
        if self.unet is not None and self.unet.config.encoder_hid_dim_type == "ip_image_proj":
            raise ValueError("The pipeline must not have an IP-Adapter. Call unload_ip_adapter() first.")

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json`; called by `save_pretrained` and `push_to_hub`.

        If this class was loaded from a folder or repository (`trust_remote_code=True`), the code is saved too.
        Otherwise the new folder would need the package.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        # diffusers imports the code of folders and repositories as modules of this package.
        if __name__.startswith("diffusers_modules."):
            add_code(save_directory)

    @property
    def default_settings(self) -> dict[str, Any]:
        """The settings of a call that gives none: those of the model for "editing", or else `DEFAULT_SETTINGS`."""
        return DEFAULT_SETTINGS | self.config.task_settings.get("editing", {})

    @property
    def default_resolution(self) -> int:
        """The resolution of a call that gives none, in pixels: that of "editing", see `task_resolution`."""
        return self.task_resolution("editing")

    def task_resolution(self, family: str) -> int:
        """The resolution of a task family in pixels: that in `task_settings`, or else that of the UNet.

        The UNet of Stable Diffusion 1.5 has 512. `instructdiffusion_pipeline.ask` uses it for the short side.

        Raises:
            ValueError: if neither is there.
        """
        own = self.config.task_settings.get(family, {})
        if "resolution" in own:
            return int(own["resolution"])
        sample_size = None if self.unet is None else self.unet.config.sample_size
        if sample_size is None:
            raise ValueError(
                "`resolution` must be given, because there is no `unet` or its configuration has no `sample_size`."
            )
        return self.vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))

    @property
    def size_multiple(self) -> int:
        """The sides at which the UNet works are multiples of this number of pixels: 64 for Stable Diffusion 1.5.

        Each UNet level except the last halves the latent size.
        """
        if self.unet is None:
            raise ValueError(
                '`resize_mode` must be "crop" and `resolution` a multiple of 64, because there is no `unet` to'
                " determine the working size."
            )
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def working_size(
        self, width: int, height: int, resolution: int | None = None, resize_mode: str = "crop"
    ) -> WorkingSize:
        """The function `working_size` for this pipeline. The default of `resolution` is `default_resolution`.

        Sides are multiples of `size_multiple`. With "crop" and a resolution that is a multiple of 64, they are
        multiples of 64, as in the original code. For Stable Diffusion 1.5 there is no difference.
        """
        resolution = self.default_resolution if resolution is None else resolution
        _check_size(resolution, resize_mode)
        original = resolution == 0 or (resize_mode == "crop" and resolution % 64 == 0)
        multiple = {} if original else {"size_multiple": self.size_multiple}
        return working_size(width, height, resolution, self.vae_scale_factor, resize_mode, **multiple)

    @property
    def guidance_scale(self) -> float:
        """Text scale s_T. Each step reads it, so a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float:
        """Image scale s_I. Each step reads it, so a callback may change `_image_guidance_scale`."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the scales differ from (1/2, 1/2), which is plain conditional sampling."""
        return (self._guidance_scale, self._image_guidance_scale) != (0.5, 0.5)

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step that runs now; `None` before the first and after the last step of a call."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the current call; Heun-like schedulers have several per step."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped. A callback may set `_interrupt`."""
        return self._interrupt

    @_exclusive
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        resolution: int | None = None,
        resize_mode: str = "crop",
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        ensemble_size: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: IPAdapterImages | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> InstructDiffusionPipelineOutput | tuple:
        """
        Applies the instruction `prompt` to `image`.

        Each of prompt, negative prompt and image is a single value or a list. All lists have the same length; a single
        value is used for all samples. B is the number of samples of the call, N = B * num_images_per_prompt the number
        of outputs.

        Args:
            prompt: the instruction. Longer prompts are truncated to 77 tokens, with a warning that contains the
                removed text.
            image: one of

                - a PIL image of any mode: EXIF orientation is applied, transparency is dropped, 16-bit values are
                  scaled to 8 bits;
                - a tensor (3, H, W) or (B, 3, H, W) or an array (H, W, 3) or (B, H, W, 3), with floating-point values
                  in [0, 1] or 8-bit values. Values in [-1, 1] raise an error;
                - a tensor of image latents (B, C, h, w): the mode of the VAE's posterior, not multiplied by its
                  scaling factor. C is 4 for Stable Diffusion 1.5;
                - a list of these.
            num_inference_steps: number of denoising steps, at least 1. If this, a scale or `ensemble_size` is `None`,
                the value in `pipe.config.task_settings["editing"]` is used, or, if there is none, the default of the
                original code (100, 5.0, 1.25 and 1).
            guidance_scale: guidance scale for the instruction (s_T). Any finite number; see `Guidance`.
            image_guidance_scale: guidance scale for the input image (s_I). If both scales are 0.5, guidance is
                disabled.
            negative_prompt: used instead of the empty prompt in the branch without the instruction.
            resolution: the size at which the model works, in pixels; see `pipe.working_size`. `None` is the size that
                the model was made for, 0 the image's own size, rounded down to a multiple of the VAE's factor. Must
                be `None` or 0 for image latents.
            resize_mode: "crop" crops the image to a size near `resolution`, as the original code does; "stretch"
                resizes the whole image. No effect for image latents or a `resolution` of 0.
            timesteps: custom timesteps, in descending order, instead of `num_inference_steps`; for schedulers whose
                `set_timesteps` takes them.
            sigmas: custom noise levels, in descending order, instead of `num_inference_steps`; for schedulers whose
                `set_timesteps` takes them.
            strength: the fraction of the steps to run, in (0, 1]. 1.0 runs all steps from pure noise. Below 1.0, the
                last `round(num_inference_steps * strength)` steps run, starting from the noised image latents. If
                these are all steps, it is like 1.0.
            num_images_per_prompt: number of outputs per sample.
            ensemble_size: number of images whose mean is an output, as in Marigold (arXiv 2312.02145). They start from
                different noise, so that random errors of single images are weaker in the mean. M = N * ensemble_size
                images are denoised, all in one batch. Must be 1 for `output_type="latent"`.
            eta: the eta of DDIM (arXiv 2010.02502), in [0, 1]; used by DDIM-like schedulers only.
            generator: one generator for the call, or a list of N. A CPU generator gives the same noise on any device.
            latents: standard normal noise (M, C, h, w) to start from, instead of noise from `generator`.
            prompt_embeds: (1 or B, 77, D), instead of `prompt`.
            negative_prompt_embeds: (1 or B, 77, D), instead of `negative_prompt`.
            ip_adapter_image: for each IP-Adapter, a PIL image, a list of K PIL images, or the feature extractor's
                tensor (K, 3, H, W).
            ip_adapter_image_embeds: instead of `ip_adapter_image`, one tensor per IP-Adapter, with shape (2, K, D):
                negative and positive embeddings of K images; or (2 * B, K, D), one pair per sample, all negative
                embeddings first; or (1, K, D), positive embeddings only (the negative ones are zeros).
            output_type: "pil" for 8-bit images in the size of their input; "np", "pt" or "latent" for outputs
                at working size.
            return_dict: whether to return an [`InstructDiffusionPipelineOutput`] instead of a plain tuple.
            cross_attention_kwargs: passed to the attention processors. Its "scale" is the scale of LoRA layers,
                including those in the text encoder.
            clip_skip: how many of the text encoder's last layers to skip.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; returns the
                tensors to continue with, or `None`. It may set `_guidance_scale`, `_image_guidance_scale` and
                `_interrupt`.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives, among
                `_callback_tensor_inputs`: latents and image_latents (M, C, h, w) in float32, prompt_embeds and
                negative_prompt_embeds (M, 77, D).

        Examples:

        Returns:
            [`InstructDiffusionPipelineOutput`] or `tuple`: the N outputs, and the results of the safety checker.

        Raises:
            ValueError: if an argument is invalid. All images of a call must have the same working
                size, which must not be too elongated (see `working_size`).
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callbacks = getattr(callback_on_step_end, "callbacks", [callback_on_step_end])
        cuts_off_guidance = any(isinstance(callback, SDCFGCutoffCallback) for callback in callbacks)

        # 0. Resolve the defaults and check the inputs, before anything slow runs.
        settings = self.default_settings
        ensemble_size = settings["ensemble_size"] if ensemble_size is None else ensemble_size
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = settings["num_inference_steps"]
        guidance_scale = settings["guidance_scale"] if guidance_scale is None else guidance_scale
        if image_guidance_scale is None:
            image_guidance_scale = settings["image_guidance_scale"]
        self.check_inputs(
            prompt,
            image,
            num_inference_steps,
            guidance_scale,
            image_guidance_scale,
            timesteps,
            sigmas,
            strength,
            num_images_per_prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            generator,
            output_type,
            clip_skip,
            callback_on_step_end_tensor_inputs,
            callback_on_step_end,
            eta,
            latents,
            return_dict,
            cross_attention_kwargs,
            ensemble_size,
        )
        self._guidance_scale = float(guidance_scale)
        self._image_guidance_scale = float(image_guidance_scale)
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device

        # 1. Resize the images to their working size: (1 or B, 3, H, W) in [-1, 1].
        pixels, answer_sizes = self.preprocess_image(image, resolution, resize_mode)

        # 2. Encode the instruction and the negative prompt: (1 or B, 77, D) each.
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )

        # 3. Expand all conditions to one entry per denoised image, M = B * copies.
        batch_size = max(prompt_embeds.shape[0], pixels.shape[0])
        # Products of 8-bit integers of NumPy would wrap around.
        num_images_per_prompt, ensemble_size = int(num_images_per_prompt), int(ensemble_size)
        copies = num_images_per_prompt * ensemble_size
        prompt_embeds = _expand("prompt", prompt_embeds, batch_size, copies)
        negative_prompt_embeds = _expand("negative_prompt", negative_prompt_embeds, batch_size, copies)
        ip_adapter_embeds = [
            [_expand("ip_adapter_image_embeds", half, batch_size, copies) for half in embeds.chunk(2)]
            for embeds in self.prepare_ip_adapter_image_embeds(ip_adapter_image, ip_adapter_image_embeds, device)
        ]
        generator = _repeat_generators(generator, batch_size * num_images_per_prompt, ensemble_size)
        masks = (cross_attention_kwargs or {}).get("ip_adapter_masks")
        self._check_masks(masks, [positive.shape[1] for _, positive in ip_adapter_embeds])

        # 4. Encode each image once with the VAE: (M, C, h, w).
        image_latents = self.encode_image_latents(pixels, device)
        image_latents = _expand("image", image_latents, batch_size, copies)

        # 5. Prepare the timesteps and the initial latents: (M, C, h, w).
        schedule = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, strength, device)
        self._num_timesteps = len(schedule)
        started_late = len(schedule) < len(self.scheduler.timesteps)
        latents = self.prepare_latents(image_latents, schedule[:1] if started_late else None, generator, latents)

        # 6. Denoise.
        step_kwargs = self.step_kwargs(generator, eta)
        order, dtype = self.scheduler.order, self.unet.dtype
        branches: list[str] = []
        with self.progress_bar(total=-(-len(schedule) // order)) as progress_bar:
            for i, t in enumerate(schedule):
                if self.interrupt:
                    continue
                self._current_timestep = t
                # Computed in every step, because callbacks may change the scales. There are K = 1, 2 or 3 branches.
                guidance = Guidance.from_scales(self.guidance_scale, self.image_guidance_scale)
                if branches != guidance.branches:
                    _reset_caches(self.unet)
                branches = guidance.branches

                # Concatenate the K branches: (K * M, 2 * C, h, w), noisy latents first. Without an image, the latents
                # are zeros.
                noisy_latents = self.scheduler.scale_model_input(latents, t)
                pictures = [torch.zeros_like(image_latents) if b == "no_image" else image_latents for b in branches]
                texts = [negative_prompt_embeds if b == "no_text" else prompt_embeds for b in branches]
                shown = [
                    torch.cat([negative if b == "no_text" else positive for b in branches]).to(dtype)
                    for negative, positive in ip_adapter_embeds
                ]
                inputs = torch.cat([torch.cat([noisy_latents, picture], dim=1) for picture in pictures])
                predictions = self.unet(
                    inputs.to(dtype),
                    t,
                    encoder_hidden_states=torch.cat(texts).to(dtype),
                    added_cond_kwargs={"image_embeds": shown} if shown else None,
                    cross_attention_kwargs=cross_attention_kwargs,
                    return_dict=False,
                )[0]

                # Combine the predictions (M, C, h, w) and step to the next noise level.
                prediction = guidance.combine(predictions.to(latents.dtype))
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                        "image_latents": image_latents,
                    }
                    shown_tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, shown_tensors)
                    changed = {} if changed is None else changed
                    expected = "a callable that returns a dict or None"
                    _require(isinstance(changed, dict), "callback_on_step_end", expected, changed)
                    is_cut_off = changed.get("prompt_embeds", prompt_embeds) is not prompt_embeds
                    if cuts_off_guidance and is_cut_off and self._guidance_scale == 0:
                        # SDCFGCutoffCallback sets the scale that disables guidance in Stable Diffusion, and keeps
                        # only the last prompt.
                        self._guidance_scale = self._image_guidance_scale = 0.5
                        del changed["prompt_embeds"]
                    self._check_callback(changed, tensors)
                    tensors |= changed
                    latents, image_latents = tensors["latents"], tensors["image_latents"]
                    prompt_embeds, negative_prompt_embeds = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]

                if (i + 1) % order == 0 or i == len(schedule) - 1:
                    progress_bar.update()

        self._current_timestep = None
        self._check_finite("unet", latents)

        # 7. Decode the outputs with the VAE, (N, 3, H, W) in [0, 1], and run the safety checker.
        nsfw_content_detected = None
        images: Any = latents.to(dtype)
        if output_type != "latent":
            images = _mean_of_ensembles(self.decode_latents(latents), ensemble_size)
            images, nsfw_content_detected = self.run_safety_checker(images, device)
            crop = resize_mode == "crop" and resolution != 0
            images = self.postprocess_image(images, output_type, answer_sizes, crop)

        self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw_content_detected
        return InstructDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw_content_detected)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        image: PipelineImageInput | None,
        num_inference_steps: int | None,
        guidance_scale: float,
        image_guidance_scale: float,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        strength: float,
        num_images_per_prompt: int,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        ip_adapter_image: IPAdapterImages | None,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        clip_skip: int | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        ensemble_size: int = 1,
    ) -> None:
        """Raises a ValueError with the argument's name, expected value and value if an argument is invalid."""
        for name in ("vae", "unet", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline has no `{name}`.")
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise ValueError(
                "`scheduler` must be a scheduler for Stable Diffusion, such as EulerDiscreteScheduler; got"
                f" {type(self.scheduler).__name__}."
            )
        if 2 * self.vae.config.latent_channels != self.unet.config.in_channels:
            raise ValueError(
                f"`unet` must be a UNet of InstructDiffusion with {2 * self.vae.config.latent_channels} input channels"
                f" (noisy latents and image latents); got {self.unet.config.in_channels} channels."
            )
        _check_caches(self.unet)

        # Texts, images and tensors.
        self._check_text("prompt", prompt, prompt_embeds)
        self._check_text("negative_prompt", negative_prompt, negative_prompt_embeds)
        if image is None:
            raise ValueError("`image` must be given.")
        _require(latents is None or _is_finite_tensor(latents), "latents", FINITE_TENSOR, latents)
        self._check_ip_adapter(ip_adapter_image, ip_adapter_image_embeds)

        self._check_schedule(num_inference_steps, timesteps, sigmas, strength)
        _check_eta(eta)

        # Other numbers and choices.
        _check_copies(num_images_per_prompt, ensemble_size)
        for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
            _require(_is_number(scale), name, "a finite number", scale)
        if negative_prompt and any(negative_prompt) and guidance_scale == 0.5 and callback_on_step_end is None:
            logger.warning(
                "`negative_prompt` has no effect with `guidance_scale=0.5`, because `no_text` has the weight 0."
            )
        self._check_clip_skip(clip_skip)
        _check_generator(generator)
        _check_output_type(output_type, OUTPUT_TYPES)
        if output_type == "latent" and ensemble_size > 1:
            raise ValueError(
                '`ensemble_size` must be 1 for `output_type="latent"`, because decoded images are averaged; got'
                f" {ensemble_size}."
            )
        _require(isinstance(return_dict, bool), "return_dict", "True or False", return_dict)
        attention = {} if cross_attention_kwargs is None else cross_attention_kwargs
        _require(
            isinstance(attention, dict)
            and all(isinstance(name, str) and name not in SET_BY_UNET for name in attention)
            and (attention.get("scale") is None or _is_number(attention["scale"])),
            "cross_attention_kwargs",
            f'a dict of names other than {", ".join(SET_BY_UNET)}, whose "scale" is a finite number',
            cross_attention_kwargs,
        )
        _require(
            callback_on_step_end is None or _accepts_step(callback_on_step_end),
            "callback_on_step_end",
            "a callable (pipeline, step, timestep, tensors)",
            callback_on_step_end,
        )
        names = callback_on_step_end_tensor_inputs
        _require(
            isinstance(names, (list, tuple)) and all(name in self._callback_tensor_inputs for name in names),
            "callback_on_step_end_tensor_inputs",
            f"a list of names among {self._callback_tensor_inputs}",
            names,
        )

    def _check_callback(self, changed: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Raises a ValueError if a callback `changed` `tensors` to invalid ones, or set an invalid scale."""
        for name in ("guidance_scale", "image_guidance_scale"):
            scale = getattr(self, name)
            _require(_is_number(scale), "callback_on_step_end", f"a callable that sets {name} to a number", scale)
        for name, tensor in changed.items():
            if name not in tensors:
                raise ValueError(f"`callback_on_step_end` must return names among {list(tensors)}; got {name!r}.")
            shape = list(tensors[name].shape)
            if name.endswith("embeds") and _is_readable(tensor) and tensor.ndim == 3:
                shape[1] = tensor.shape[1]  # the number of tokens may change
            if not (_is_readable(tensor) and tensor.is_floating_point() and list(tensor.shape) == shape):
                raise ValueError(
                    f"`callback_on_step_end` must return a floating-point tensor of shape {tuple(shape)} for {name!r};"
                    f" got {_described(tensor)}."
                )
        lengths = {(tensors | changed)[name].shape[1] for name in ("prompt_embeds", "negative_prompt_embeds")}
        if len(lengths) > 1:
            raise ValueError(
                "`callback_on_step_end` must return `prompt_embeds` and `negative_prompt_embeds` with the same number"
                f" of tokens; got {sorted(lengths)}."
            )

    def _check_schedule(
        self,
        num_inference_steps: int | None,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        strength: float,
    ) -> None:
        schedules = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        given = [name for name, value in schedules.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                "Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given; got"
                f" {' and '.join(given) or 'none of them'}."
            )
        train_steps = self.scheduler.config.num_train_timesteps
        _require(
            num_inference_steps is None or _is_integer(num_inference_steps, 1, train_steps),
            "num_inference_steps",
            f"an integer of at least 1 and at most {train_steps}",
            num_inference_steps,
        )
        ranges = {"timesteps": (timesteps, 0.0, train_steps - 1), "sigmas": (sigmas, 0.0, FLOAT32_MAX)}
        for name, (custom, low, high) in ranges.items():
            if custom is None:
                continue
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`{name}` must be None, because {type(self.scheduler).__name__} does not support it."
                )
            numbers = custom.tolist() if isinstance(custom, np.ndarray) else custom
            _require(
                isinstance(numbers, (list, tuple))
                and len(numbers) > 0
                and all(_is_number(number, low, high) for number in numbers)
                and all(before > after for before, after in pairwise(numbers)),
                name,
                f"a non-empty list of numbers from {low:g} to {high:g} in descending order",
                custom,
            )
        _require(_is_number(strength, 0, 1) and strength > 0, "strength", "above 0 and at most 1", strength)

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        layers = None if self.text_encoder is None else self.text_encoder.config.num_hidden_layers
        _require(
            clip_skip is None or layers is None or _is_integer(clip_skip, 0, layers - 1),
            "clip_skip",
            f"an integer of at least 0 and below the text encoder's {layers} layers",
            clip_skip,
        )

    def _check_text(self, name: str, text: str | list[str] | None, embeds: torch.Tensor | None) -> None:
        if text is not None and embeds is not None:
            raise ValueError(f"`{name}` and `{name}_embeds` must not both be given.")
        is_list_of_texts = isinstance(text, list) and len(text) > 0 and all(map(is_text, text))
        expected = "a text or a non-empty list of texts, without unpaired surrogates"
        _require(text is None or is_text(text) or is_list_of_texts, name, expected, text)
        if embeds is None:
            return
        width = self.unet.config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        _require(
            _is_finite_tensor(embeds) and embeds.ndim == 3 and embeds.shape[2] == width,
            f"{name}_embeds",
            f"{FINITE_TENSOR} of shape (B, 77, {width})",
            embeds,
        )

    def _check_ip_adapter(self, image: Any, embeds: list[torch.Tensor] | None) -> None:
        if image is not None and embeds is not None:
            raise ValueError("`ip_adapter_image` and `ip_adapter_image_embeds` must not both be given.")
        has_ip_adapter = self.unet.config.encoder_hid_dim_type == "ip_image_proj"
        shows_image = image is not None or embeds is not None
        if shows_image and not has_ip_adapter:
            raise ValueError(
                "`ip_adapter_image` and `ip_adapter_image_embeds` must be None, because no IP-Adapter is loaded."
            )
        if has_ip_adapter and not shows_image:
            raise ValueError(
                "`ip_adapter_image` or `ip_adapter_image_embeds` must be given, because an IP-Adapter is loaded."
            )
        tensors = embeds if isinstance(embeds, list) else [embeds]
        _require(
            embeds is None or all(_is_finite_tensor(tensor) and tensor.ndim >= 3 for tensor in tensors),
            "ip_adapter_image_embeds",
            f"a list with, for each IP-Adapter, {FINITE_TENSOR} of shape (2, K, D)",
            embeds,
        )

    def _check_masks(self, masks: Any, image_counts: list[int]) -> None:
        """Raises a ValueError for invalid `ip_adapter_masks`. `image_counts`: the images of each IP-Adapter."""
        is_stacked = isinstance(masks, torch.Tensor) and masks.ndim == 4
        listed = list(masks.unsqueeze(1)) if is_stacked else masks
        shapes = [(1, count) for count in image_counts]
        _require(
            masks is None
            or isinstance(listed, list)
            and len(listed) == len(shapes)
            and all(
                mask is None or _is_finite_tensor(mask) and mask.ndim == 4 and mask.shape[:2] == shape
                for mask, shape in zip(listed, shapes, strict=True)
            ),
            "cross_attention_kwargs",
            f'a dict whose "ip_adapter_masks" is a list of finite tensors (1, K, H, W), here with (1, K) = {shapes}',
            masks,
        )

    def _check_finite(self, name: str, result: torch.Tensor) -> None:
        """Raises a ValueError with the likely cause if the result of the component `name` is not finite."""
        if result.isfinite().all():
            return
        model = getattr(self, name)
        weights = [
            key
            for key, weight in model.named_parameters()
            if weight.is_floating_point() and not weight.is_meta and not weight.float().isfinite().all()
        ]
        if weights:
            cause = f"{len(weights)} of its weights are NaN or infinite, such as {weights[0]}"
        elif model.dtype == torch.float16:
            cause = "float16 overflowed; use bfloat16 or float32"
        else:
            cause = (
                "values overflowed; look for large values in `guidance_scale`, `image_guidance_scale`, `sigmas`,"
                " `latents`, `image`, `prompt_embeds`, `negative_prompt_embeds`, `ip_adapter_image`,"
                " `ip_adapter_image_embeds`, `cross_attention_kwargs`, and the tensors from `callback_on_step_end`"
            )
        raise ValueError(f"`{name}` returned values that are NaN or infinite: {cause}.")

    def preprocess_image(
        self, image: PipelineImageInput, resolution: int | None = None, resize_mode: str = "crop"
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """
        Resizes images to their working size.

        Args:
            image: as in `__call__`.
            resolution, resize_mode: see the method `working_size`.

        Returns:
            The images (B, 3, H, W) in [-1, 1], or unchanged image latents; and for each the (width, height) of its
            PIL output.

        Raises:
            ValueError: if an image is invalid, or if the working sizes differ.
        """
        _check_size(resolution, resize_mode)
        pictures = _as_pictures(image)
        channels = self.vae.config.latent_channels
        image_latents = [p for p in pictures if _is_image_latents(p, channels)]
        if len(image_latents) == len(pictures):
            if resolution:
                raise ValueError(f"`resolution` must be None or 0 for image latents; got {resolution}.")
            shapes = [tuple(latents.shape) for latents in image_latents]
            if len(set(shapes)) > 1:
                raise ValueError(f"`image` must have image latents of one shape; got {shapes}.")
            _require(all(map(_is_finite_tensor, image_latents)), "image", "finite if it is image latents", image)
            height, width = (side * self.vae_scale_factor for side in shapes[0][1:])
            return torch.stack(image_latents), [(width, height)] * len(shapes)

        crop = resize_mode == "crop" and resolution != 0
        answer_sizes, sizes, tensors = [], [], []
        for picture in pictures:
            if isinstance(picture, PIL.Image.Image):
                picture = upright_rgb(picture)
                answer_sizes.append(picture.size)
            elif picture.shape[0] != 3:
                raise ValueError(f"`image` must have 3 channels, or be all image latents; got {picture.shape[0]}.")
            else:
                answer_sizes.append((picture.shape[2], picture.shape[1]))
            size, shown = self.working_size(*answer_sizes[-1], resolution, resize_mode)
            sizes.append(size)
            input_lacks, pil_lacks = (
                1 - (right - left) * (bottom - top) / math.prod(answer_sizes[-1])
                for left, top, right, bottom in (center_crop(answer_sizes[-1], size), shown)
            )
            if crop and pil_lacks > 0.005:
                warnings.warn(
                    f'`resize_mode="crop"` cuts off {input_lacks:.0%} of the image, {pil_lacks:.0%} with PIL output;'
                    ' "stretch" uses all of it.',
                    stacklevel=3,
                )
            if len(set(sizes)) > 1:
                continue  # This raises an error below; only the sizes for its message are collected.
            if isinstance(picture, PIL.Image.Image):
                fitted = _resize_picture(picture, sizes[0], crop)
                tensors.append(torch.from_numpy(VaeImageProcessor.pil_to_numpy(fitted)[0]).movedim(-1, 0))
            else:
                tensors.append(_resize_tensor(self._unit_range(picture), sizes[0], crop))
        if len(set(sizes)) > 1:
            raise ValueError(
                "`image` must have images of one working size; got images of"
                f" {', '.join(f'{w} x {h}' for w, h in answer_sizes)} pixels with the working sizes"
                f" {', '.join(f'{w} x {h}' for w, h in sizes)}. Pass them in separate calls."
            )
        return self.image_processor.preprocess(torch.stack(tensors)), answer_sizes

    @staticmethod
    def _unit_range(picture: torch.Tensor) -> torch.Tensor:
        """Converts an image tensor to floating-point values in [0, 1]: 8-bit values are divided by 255."""
        if picture.dtype == torch.uint8:
            return picture / 255
        if not picture.is_floating_point():
            found = f"{picture.dtype} values"
        elif not (picture.min() >= 0 and picture.max() <= 1):
            found = f"values from {picture.min().item()} to {picture.max().item()}"
        else:
            return picture
        raise ValueError(
            "`image` must have floating-point values in [0, 1] or 8-bit values if it is a tensor or an array; got"
            f" {found}."
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """
        Encodes the instruction and the negative prompt.

        Args:
            prompt: the instruction, or a list of B; `None` if `prompt_embeds` is given.
            device: the device to encode on; by default the pipeline's.
            num_images_per_prompt: the number of copies of each embedding.
            do_classifier_free_guidance: whether to encode the negative prompt too.
            negative_prompt: used instead of the empty prompt; one, or a list of B.
            prompt_embeds: (B, 77, D), used instead of `prompt`.
            negative_prompt_embeds: (1 or B, 77, D), used instead of `negative_prompt`.
            lora_scale: scale of the text encoder's LoRA layers while it runs.
            clip_skip: how many of the text encoder's last layers to skip.

        Returns:
            The embeddings of the instruction and of the negative prompt, (B * num_images_per_prompt, 77, D) each.
            Without `do_classifier_free_guidance`, `negative_prompt_embeds` is returned as it was passed.

        Raises:
            ValueError: if the numbers or shapes of the embeddings do not match.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("`prompt` or `prompt_embeds` must be given; both are None.")
            prompt_embeds = self._encode_text(prompt, device, lora_scale, clip_skip)
        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        batch_size = prompt_embeds.shape[0]
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self._encode_text(negative_prompt or "", device, lora_scale, clip_skip)
            if prompt_embeds.shape[1:] != negative_prompt_embeds.shape[1:]:
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` must have the same length and width; got the shapes"
                    f" {tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}."
                )
            batch_size = max(batch_size, negative_prompt_embeds.shape[0])
            negative_prompt_embeds = _expand(
                "negative_prompt", negative_prompt_embeds.to(device, dtype), batch_size, num_images_per_prompt
            )
        prompt_embeds = _expand("prompt", prompt_embeds.to(device, dtype), batch_size, num_images_per_prompt)
        return prompt_embeds, negative_prompt_embeds

    def _encode_text(
        self, text: str | list[str], device: torch.device, lora_scale: float | None, clip_skip: int | None
    ) -> torch.Tensor:
        """The hidden states of the text encoder (B, 77, D)."""
        if self.text_encoder is None:
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must be given, because there is no text encoder."
            )
        texts = self.maybe_convert_prompt([text] if isinstance(text, str) else text, self.tokenizer)
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        for whole in self.tokenizer(texts).input_ids:
            if len(whole) > limit:
                # The end token takes the last position, so the text is truncated there.
                lost = self.tokenizer.decode(whole[limit - 1 : -1])
                logger.warning(f"CLIP takes at most {limit} tokens; this part of the prompt was removed: {lost!r}")
        with self._lora_scaled(lora_scale):
            states = self.text_encoder(ids.input_ids.to(device), output_hidden_states=clip_skip is not None)
        self._check_finite("text_encoder", states.last_hidden_state)
        if clip_skip is None:
            return states.last_hidden_state
        return self.text_encoder.final_layer_norm(states.hidden_states[-(clip_skip + 1)])

    @contextmanager
    def _lora_scaled(self, scale: float | None) -> Iterator[None]:
        """Scales the LoRA layers of the text encoder inside the block. The UNet scales its own."""
        if scale is None or not USE_PEFT_BACKEND:
            yield
            return
        self._lora_scale = scale
        scale_lora_layers(self.text_encoder, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.text_encoder, scale)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[torch.Tensor]:
        """
        Encodes the images for the IP-Adapters. The result can be passed to `__call__` as `ip_adapter_image_embeds`.

        Args:
            ip_adapter_image: as in `__call__`.
            ip_adapter_image_embeds: as in `__call__`, instead of `ip_adapter_image`.
            device: the device to encode on; by default the pipeline's.
            num_images_per_prompt: the number of copies of each embedding.
            do_classifier_free_guidance: whether to return the negative embeddings too.

        Returns:
            For each IP-Adapter a tensor (2 * B * num_images_per_prompt, K, ...), the negative embeddings first;
            without `do_classifier_free_guidance` only the positive ones.

        Raises:
            ValueError: if the number of inputs is not the number of IP-Adapters, or the number of embeddings is odd.
        """
        if ip_adapter_image is None and ip_adapter_image_embeds is None:
            return []
        device = device or self._execution_device
        adapters = self.unet.encoder_hid_proj.image_projection_layers
        given = ip_adapter_image if ip_adapter_image_embeds is None else ip_adapter_image_embeds
        given = given if isinstance(given, list) else [given]
        if len(given) != len(adapters):
            name = "ip_adapter_image" if ip_adapter_image_embeds is None else "ip_adapter_image_embeds"
            raise ValueError(f"`{name}` must have {len(adapters)} entries, one per IP-Adapter; got {len(given)}.")
        if ip_adapter_image_embeds is None:
            given = [
                self.encode_ip_adapter_image(image, device, pooled=isinstance(adapter, ImageProjection))
                for image, adapter in zip(given, adapters, strict=True)
            ]
        prepared = []
        for embeds, adapter in zip(given, adapters, strict=True):
            # Adapters of all types begin with a linear layer.
            width = next(layer.in_features for layer in adapter.modules() if isinstance(layer, torch.nn.Linear))
            shape = ("K", width) if isinstance(adapter, ImageProjection) else ("K", "...", width)
            _require(
                embeds.shape[-1] == width and (embeds.ndim == 3 or not isinstance(adapter, ImageProjection)),
                "ip_adapter_image_embeds",
                f"a tensor of shape (2, {', '.join(map(str, shape))}) for this IP-Adapter",
                embeds,
            )
            if len(embeds) == 1:
                # Only positive embeddings; the negative ones are zeros.
                embeds = torch.cat([torch.zeros_like(embeds), embeds])
            elif len(embeds) % 2 == 1:
                raise ValueError(
                    "`ip_adapter_image_embeds` must have negative embeddings and as many positive ones; got an odd"
                    f" number of entries: shape {tuple(embeds.shape)}."
                )
            embeds = embeds.to(device, self.unet.dtype)
            negative, positive = embeds.repeat_interleave(num_images_per_prompt, dim=0).chunk(2)
            prepared.append(torch.cat([negative, positive]) if do_classifier_free_guidance else positive)
        return prepared

    def encode_ip_adapter_image(self, image: Any, device: torch.device, pooled: bool) -> torch.Tensor:
        """Negative and positive embeddings (2, K, ...) of K images: pooled ones, or penultimate hidden states."""
        if self.image_encoder is None or self.feature_extractor is None:
            raise ValueError("`ip_adapter_image` needs an `image_encoder` and a `feature_extractor`; one is None.")
        side = self.image_encoder.config.image_size
        if not isinstance(image, torch.Tensor):
            pictures = image if isinstance(image, (list, tuple)) else [image]
            _require(
                len(pictures) > 0 and all(isinstance(p, PIL.Image.Image) and 0 not in p.size for p in pictures),
                "ip_adapter_image",
                f"for each IP-Adapter, a PIL image, a list of them, or a tensor (K, 3, {side}, {side})",
                image,
            )
            pictures = [upright_rgb(picture, "ip_adapter_image") for picture in pictures]
            image = self.feature_extractor(pictures, return_tensors="pt").pixel_values
            if image.shape[1:] != (3, side, side):
                raise ValueError(
                    f"`feature_extractor` must return images of {side} x {side} pixels, the size of `image_encoder`;"
                    f" got shape {tuple(image.shape)}."
                )
        _require(
            _is_finite_tensor(image) and image.ndim == 4 and image.shape[1:] == (3, side, side),
            "ip_adapter_image",
            f"{FINITE_TENSOR} of shape (K, 3, {side}, {side}) if it is a tensor",
            image,
        )
        image = image.to(device, self.image_encoder.dtype)
        if pooled:
            positive = self.image_encoder(image).image_embeds
            return torch.stack([torch.zeros_like(positive), positive])
        both = torch.stack([torch.zeros_like(image), image])
        return torch.stack([self.image_encoder(half, output_hidden_states=True).hidden_states[-2] for half in both])

    def encode_image_latents(self, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Image latents (B, C, h, w) of images (B, 3, H, W): the mode of the posterior, unscaled.

        Image latents are returned unchanged.
        """
        if pixels.shape[1] == self.vae.config.latent_channels:
            return pixels.to(device, torch.float32)
        latents = retrieve_latents(self.vae.encode(pixels.to(device, self.vae.dtype)), sample_mode="argmax")
        self._check_finite("vae", latents)
        return latents.float()

    def prepare_timesteps(
        self,
        num_inference_steps: int | None,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        strength: float,
        device: torch.device,
    ) -> torch.Tensor:
        """The timesteps to run: those of the last `round(num_inference_steps * strength)` steps."""
        schedule, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        if num_inference_steps is None:
            # Heun-like schedulers list a timestep for each UNet evaluation; a step has `order` evaluations.
            num_inference_steps = -(-len(schedule) // self.scheduler.order)
        kept = round(num_inference_steps * strength)
        if kept == 0:
            raise ValueError(
                f"`strength` of {strength} leaves none of {num_inference_steps} steps to run. Increase it, or give"
                " more steps in `num_inference_steps`, `timesteps` or `sigmas`."
            )
        first = (num_inference_steps - kept) * self.scheduler.order
        if first > 0 and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return schedule[first:]

    def prepare_latents(
        self,
        image_latents: torch.Tensor,
        start: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The initial latents (M, C, h, w): pure noise, or the image latents noised to the timestep `start` (1,).

        Latents are always float32, so that a seed gives the same noise with every dtype of the UNet.
        """
        shape = image_latents.shape
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"`generator` must be one or a list of {shape[0]}, one per image; got {len(generator)}.")
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=image_latents.device, dtype=torch.float32)
        elif latents.shape == shape:
            noise = latents.to(image_latents)
        else:
            raise ValueError(f"`latents` must have the shape {tuple(shape)}; got {tuple(latents.shape)}.")
        if start is None:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(image_latents, noise, start)

    def step_kwargs(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        """The arguments for the scheduler's `step`: `generator` and `eta`, if it takes them."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1], float32, from denoised latents (N, C, h, w)."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pictures = self.vae.decode(latents, return_dict=False)[0]
        self._check_finite("vae", pictures)
        return self.image_processor.postprocess(pictures.float(), "pt")

    def run_safety_checker(self, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, list[bool] | None]:
        """The images (N, 3, H, W), offensive ones replaced by black, and the checker's results (or None)."""
        if self.safety_checker is None:
            return images, None
        pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        features = self.feature_extractor(pictures, return_tensors="pt").pixel_values
        return self.safety_checker(images=images, clip_input=features.to(device, self.safety_checker.dtype))

    def postprocess_image(
        self, images: torch.Tensor, output_type: str, answer_sizes: list[tuple[int, int]], crop: bool
    ) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
        """Converts images (N, 3, H, W) in [0, 1] to `output_type`; PIL images are resized to their input sizes."""
        if output_type == "pt":
            return images
        arrays = VaeImageProcessor.pt_to_numpy(images)
        if output_type == "np":
            return arrays
        # Truncate instead of rounding, as the original code does, to reproduce its outputs.
        levels = (arrays * 255).astype(np.uint8)
        sizes = [answer_sizes[i * len(answer_sizes) // len(levels)] for i in range(len(levels))]
        return [
            _resize_picture(PIL.Image.fromarray(level), size, crop) for level, size in zip(levels, sizes, strict=True)
        ]
