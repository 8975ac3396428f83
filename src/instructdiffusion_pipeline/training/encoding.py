"""The frozen encoders: pictures to posteriors, words to embeddings."""

import copy
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextModel

Batch = dict[str, Any]  # tensors, and in a batch of the loop its StepNoise


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
        `target_mean` and `target_std` (all of the target's), [B, C, h, w], none scaled; `input_ids` [B, 77] become
        `prompt_embeds` [B, 77, d]. All are float32.
        """
        batch = dict(batch)
        if "target" in batch:
            # One call a side: together they would need twice the memory, and on a CPU a third more time.
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
        """Embeddings [B, 77, d] of token ids [B, 77], float32."""
        assert self.text_encoder is not None
        return self.text_encoder(input_ids).last_hidden_state.float()
