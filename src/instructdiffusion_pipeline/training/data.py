"""Samples as the tensors the loop trains on, encoded once."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch.utils.data import Dataset, Sampler
from transformers import CLIPTokenizer

from instructdiffusion_pipeline.sample import Sample

T = TypeVar("T")


class EncodedSamples(Dataset):
    """Latents and tokens of N samples, held in memory.

    `image_latents` [N, 4, h, w] is the mode of the input's posterior; `target_mean` and `target_std` [N, 4, h, w] are
    the target's posterior, kept whole so that each epoch draws from it afresh; none is scaled. `input_ids` [N, 77].
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


@torch.no_grad()
def encode_samples(
    samples: Iterable[Sample], vae: AutoencoderKL, tokenizer: CLIPTokenizer, batch_size: int = 64
) -> EncodedSamples:
    """Run `samples`, whose pictures must share one size, through the frozen VAE and the tokenizer.

    Raises a ValueError that names the first sample with a picture of another size, or says that there are none.
    """
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
    parts: list[dict[str, torch.Tensor]] = []
    size = None
    for batch in batched(samples, batch_size):
        for index, sample in enumerate(batch, start=batch_size * len(parts)):
            size = size or sample.image.size
            if not sample.image.size == sample.target.size == size:
                raise ValueError(
                    f"samples: number {index} has an image of {sample.image.size} and a target of"
                    f" {sample.target.size} pixels; all pictures must be of {size}, the size of the first"
                )
        images, targets = (
            processor.preprocess([getattr(sample, side) for sample in batch]).to(vae.device, vae.dtype)
            for side in ("image", "target")
        )
        target = vae.encode(targets).latent_dist
        parts.append(
            {
                "image_latents": vae.encode(images).latent_dist.mode().half(),
                "target_mean": target.mean.half(),
                "target_std": target.std.half(),
                "input_ids": tokenize(tokenizer, [sample.instruction for sample in batch]),
            }
        )
    if not parts:
        raise ValueError("samples: got none, at least one is needed to train on")
    return EncodedSamples({name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]})


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [len(texts), 77], cut or padded to the length the text encoder was built for."""
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class EndlessShuffle(Sampler[int]):
    """Indices below `length` without end, each epoch in a new order that `seed` fixes, from position `start` on."""

    def __init__(self, length: int, seed: int, start: int = 0):
        self.length, self.seed, self.start = length, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.start, self.length)
        while True:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch))
            yield from order[offset:].tolist()
            epoch, offset = epoch + 1, 0
