"""Samples as the tensors that the loop trains on."""

import hashlib
import logging
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from instructdiffusion_pipeline.datasets.mixture import Mixture
from instructdiffusion_pipeline.training.encoding import Batch

logger = logging.getLogger(__name__)
PROBES = 16  # samples, about, that stand for all


class TrainingSamples(Protocol):
    """What `train` takes: `ImageDataset`, or `CachedDataset` of them. Positions do not end; `len` is an epoch."""

    sources: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Batch: ...


class ImageDataset(Dataset):
    """A mixture's samples as pictures [3, H, W], 8 bits, and token ids [77].

    An item also has its `position`, the number of its `source` in `sources`, and how many samples were `skipped` to
    find it. Raises a ValueError if pictures differ in size.
    """

    def __init__(self, mixture: Mixture, tokenizer: CLIPTokenizer):
        self.mixture, self.tokenizer = mixture, tokenizer
        self.sources = [source.name for source in mixture.sources]
        self.size = mixture[0].image.size

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, position: int) -> Batch:
        skipped = self.mixture.skipped.total()
        sample, source = self.mixture[position], self.mixture.source_of(position).name
        if sample.image.size != self.size:
            raise ValueError(
                f"`mixture` must have pictures of one size; its first is of {self.size} pixels, one of {source} of"
                f" {sample.image.size}. Give each source a `geometry` of one size."
            )
        return {
            "image": pixels(sample.image),
            "target": pixels(sample.target),
            "input_ids": tokenize(self.tokenizer, sample.instruction),
            "position": torch.tensor(position),
            "source": torch.tensor(self.sources.index(source)),
            "skipped": torch.tensor(self.mixture.skipped.total() - skipped),
        }


def content(samples: TrainingSamples, count: int) -> str:
    """A hash of a few of the first `count` samples, so that what changed is not taken for what was there before."""
    digest = hashlib.sha256()
    for position in range(0, count, max(1, count // PROBES)):
        for name, tensor in sorted(samples[position].items()):
            if name != "skipped":
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB picture as 8-bit levels [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def tokenize(tokenizer: CLIPTokenizer, text: str) -> torch.Tensor:
    """Token ids [77], cut or padded to the length the text encoder was built for; a warning shows what was cut."""
    longest = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=longest, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) > longest:
        logger.warning(
            "cut from an instruction of more than %d tokens: %r", longest, tokenizer.decode(ids[longest - 1 : -1])
        )
        ids = torch.cat([ids[: longest - 1], ids[-1:]])
    return ids
