"""The inputs of a training step: encoded images and text, noise, and conditioning dropout."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch.utils.data import default_collate
from transformers import CLIPTextModel

Batch = dict[str, Any]  # tensors; batches of the training loop also have a StepNoise


class FrozenEncoders:
    """A pipeline's VAE and, unless it is also trained, its text encoder, in the precision of a run."""

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel | None):
        self.vae, self.text_encoder = vae, text_encoder

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype, with_text: bool = True) -> Self:
        """The encoders of `pipeline`. A module of another dtype is copied, and the pipeline's module is unchanged."""

        def frozen(module: Any) -> Any:
            module = module if module.dtype == dtype else copy.deepcopy(module).to(dtype=dtype)
            return module.to(device).requires_grad_(False).eval()

        return cls(frozen(pipeline.vae), frozen(pipeline.text_encoder) if with_text else None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """Return `batch` with its images encoded as latents and its token ids as embeddings, all float32.

        `image` and `target` [B, 3, H, W], 8 bits, become `image_latents` (the mode of the input's posterior),
        `target_mean` and `target_std` (the target's posterior), each [B, C, h, w], not scaled. `input_ids` [B, 77]
        become `prompt_embeds` [B, 77, d], unless the text encoder is trained. Entries that are already encoded are
        kept.
        """
        batch = dict(batch)
        if "target" in batch:
            # Two calls, because one call for both needs twice the memory and, on a CPU, a third more time.
            image, target = (
                self.vae.encode(batch.pop(side).to(self.vae.dtype) / 127.5 - 1).latent_dist
                for side in ("image", "target")
            )
            batch["image_latents"] = image.mode().float()
            batch |= {"target_mean": target.mean.float(), "target_std": target.std.float()}
        if "input_ids" in batch and self.text_encoder is not None:
            batch["prompt_embeds"] = self.embed(batch.pop("input_ids"))
        return batch

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, 77, d], float32, of token ids [B, 77]."""
        assert self.text_encoder is not None
        return self.text_encoder(input_ids).last_hidden_state.float()


class StepNoise(NamedTuple):
    """The random numbers of B samples in a training step.

    Attributes:
        posterior_noise: [B, C, h, w], for sampling the target's posterior.
        random_p: [B], uniform in [0, 1), for conditioning dropout.
        timesteps: [B], integers.
        noise: [B, C, h, w], added to the target latents.
    """

    posterior_noise: torch.Tensor
    random_p: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor


def draw_step_noise(
    seed: int, positions: Iterable[int], shape: torch.Size, num_train_timesteps: int, timestep_bias: float = 1.0
) -> StepNoise:
    """Draw the noise of the samples at `positions` in the original code's order, for latents of `shape` [C, h, w].

    The noise of a sample depends only on `seed` and its position, not on the batch size, processes or workers. With a
    `timestep_bias` other than 1, half of the timesteps are uniform and the other half have the density
    t^(`timestep_bias` - 1).
    """
    columns = []
    for position in positions:
        (state,) = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state) >> 1)
        posterior_noise = torch.randn(shape, generator=generator)
        random_p = torch.rand((), generator=generator)
        timestep = torch.randint(0, num_train_timesteps, (), generator=generator)
        noise = torch.randn(shape, generator=generator)
        if timestep_bias != 1 and torch.rand((), generator=generator) < 0.5:
            late = torch.rand((), generator=generator) ** (1 / timestep_bias)
            timestep = (num_train_timesteps * late).long().clamp(max=num_train_timesteps - 1)
        columns.append((posterior_noise, random_p, timestep, noise))
    return StepNoise(*map(torch.stack, zip(*columns, strict=True)))


@dataclass(frozen=True)
class NoiseCollator:
    """A `collate_fn` that adds the samples' `StepNoise` as "step_noise"; it runs in the data loader workers."""

    seed: int
    latent_channels: int
    vae_scale_factor: int
    num_train_timesteps: int
    timestep_bias: float = 1.0

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> Batch:
        positions = [int(item["position"]) for item in items]
        shape = self.latent_shape(items[0])
        noise = draw_step_noise(self.seed, positions, shape, self.num_train_timesteps, self.timestep_bias)
        return default_collate(list(items)) | {"step_noise": noise}

    def latent_shape(self, item: Batch) -> torch.Size:
        """The shape [C, h, w] of the latents of a sample, encoded or not."""
        if "target_mean" in item:
            return item["target_mean"].shape
        height, width = item["target"].shape[1:]
        return torch.Size([self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor])


def diffusion_latents(
    batch: Batch, noise: StepNoise, scaling_factor: float, text_to_image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the target and of the input, each [B, C, h, w], of an encoded `batch`.

    The target latents are a scaled sample of the posterior. The input latents are the mode of the posterior, not
    scaled, or zero with `text_to_image`.
    """
    latents = scaling_factor * (batch["target_mean"] + batch["target_std"] * noise.posterior_noise)
    return latents, torch.zeros_like(latents) if text_to_image else batch["image_latents"].float()


def drop_conditioning(
    text: torch.Tensor,
    image_latents: torch.Tensor,
    empty_text: torch.Tensor,
    random_p: torch.Tensor,
    probability: float = 0.075,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditioning dropout for classifier-free guidance: for some samples, empty the text or zero the image latents.

    Args:
        text: token ids [B, 77] or embeddings [B, 77, d].
        image_latents: [B, C, h, w].
        empty_text: token ids [77] or embeddings [77, d] of the empty text.
        random_p: [B], uniform in [0, 1). Below `probability` the text is emptied, from there to twice as much the
            image is zeroed; never both, as in the original code.
        probability: from 0 to 0.5; the default is that of the original code.
    """
    empties_text = random_p < probability
    zeroes_image = (random_p >= probability) & (random_p < 2 * probability)
    text = torch.where(empties_text.view(-1, *[1] * empty_text.dim()), empty_text, text)
    image_latents = torch.where(zeroes_image[:, None, None, None], 0.0, image_latents)
    return text, image_latents
