"""The frozen encoders: pictures to posteriors, words to embeddings."""

import copy
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextModel

Batch = dict[str, torch.Tensor]


class FrozenEncoders:
    """A pipeline's VAE and, unless that is trained too, its text encoder, in the precision of a run."""

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel | None):
        self.vae, self.text_encoder = vae, text_encoder

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype, with_text: bool = True) -> Self:
        """Encoders for `pipeline`: copies where the precision is another, so that its own weights keep theirs."""

        def frozen(module: Any) -> Any:
            module = module if module.dtype == dtype else copy.deepcopy(module).to(dtype=dtype)
            return module.to(device).requires_grad_(False).eval()

        return cls(frozen(pipeline.vae), frozen(pipeline.text_encoder) if with_text else None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """`batch` with pictures turned into latents and token ids into embeddings, as far as it still has such.

        `image` and `target` [B, 3, H, W], 8 bits, become `image_latents` (the mode of the input's posterior) and
        `target_mean` and `target_std` (all of the target's), [B, 4, h, w], none scaled; `input_ids` [B, 77] become
        `prompt_embeds` [B, 77, d]. All are float32.
        """
        batch = dict(batch)
        if "target" in batch:
            # Both sides in one call: the encoder treats each picture by itself.
            pictures = torch.cat([batch.pop("target"), batch.pop("image")])
            posterior = self.vae.encode(pictures.to(self.vae.dtype) / 127.5 - 1).latent_dist
            mean, target_std = posterior.mean.float(), posterior.std[: len(pictures) // 2].float()
            target_mean, image_latents = mean.chunk(2)
            batch |= {"image_latents": image_latents, "target_mean": target_mean, "target_std": target_std}
        if "input_ids" in batch and self.text_encoder is not None:
            batch["prompt_embeds"] = self.embed(batch.pop("input_ids"))
        return batch

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, 77, d] of token ids [B, 77], float32."""
        assert self.text_encoder is not None
        return self.text_encoder(input_ids).last_hidden_state.float()
