"""Training samples as tensors."""

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from instructdiffusion_pipeline.datasets.mixture import Mixture, check_source_names
from instructdiffusion_pipeline.training.encoding import Batch

logger = logging.getLogger(__name__)
FINGERPRINT_SAMPLES = 256  # number of samples that represent a dataset
SHOWN = 3  # maximum number of instructions with a warning
MOST_WORKERS = 8  # of a process, unless more are requested


class TrainingSamples(Protocol):
    """The type of training data of `train`: an `ImageDataset`, a `CachedDataset` or a `MultiSizeDataset`.

    `len` is the length of an epoch. Larger indices continue with the next epoch.
    """

    sources: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Batch: ...


class EpochDataset(Dataset):
    """A dataset whose indices continue with the next epoch. Iterating over it gives one epoch."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return (self[position] for position in range(len(self)))


class ImageDataset(EpochDataset):
    """The samples of a mixture as images [3, H, W], 8 bits, and token ids [77].

    An item also has its `position`, the index of its `source` in `sources`, and the number of unreadable samples that
    were `skipped` before it.

    Attributes:
        cut: how often each instruction of more than 77 tokens was truncated in this process.

    Raises:
        ValueError: if two sources have the same name, or images differ in size.
    """

    def __init__(self, mixture: Mixture, tokenizer: CLIPTokenizer):
        self.mixture, self.tokenizer = mixture, tokenizer
        self.cut: Counter[str] = Counter()
        self.sources = [source.name for source in mixture.sources]
        check_source_names(self.sources)
        self.size = mixture[0].image.size

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, position: int) -> Batch:
        skipped = self.mixture.skipped.total()
        sample, source = self.mixture[position], self.mixture.source_of(position).name
        if sample.image.size != self.size:
            raise ValueError(
                f"`mixture` must have images of one size; its first has {self.size} pixels, an image of {source} has"
                f" {sample.image.size}. Give all sources a `transform` of the same size."
            )
        return {
            "image": pixels(sample.image),
            "target": pixels(sample.target),
            "input_ids": self._tokenize(sample.instruction),
            "position": torch.tensor(position),
            "source": torch.tensor(self.sources.index(source)),
            "skipped": torch.tensor(self.mixture.skipped.total() - skipped),
        }

    def _tokenize(self, instruction: str) -> torch.Tensor:
        ids, lost = split_tokens(self.tokenizer, instruction)
        if lost:
            if instruction not in self.cut and len(self.cut) < SHOWN:
                logger.warning(
                    "An instruction of more than %d tokens is truncated; removed: %r.%s",
                    self.tokenizer.model_max_length,
                    lost,
                    " Others are truncated without a warning." * (len(self.cut) == SHOWN - 1),
                )
            self.cut[instruction] += 1
        return ids


class MultiSizeDataset(EpochDataset):
    """The samples of several datasets whose images differ in size. All samples of a batch are from one dataset.

    In an epoch, each dataset has a number of batches in proportion to its length. Their order is random.

    Args:
        datasets: an `ImageDataset` or a `CachedDataset` for each size.
        batch_size: that of the run.
        seed: of the order.

    Raises:
        ValueError: if there are no datasets, or two sources have the same name.
    """

    def __init__(self, datasets: Sequence[TrainingSamples], batch_size: int, seed: int = 0):
        if not datasets:
            raise ValueError("`datasets` must have at least one dataset; got none.")
        self.datasets, self.batch_size, self.seed = datasets, batch_size, seed
        self.sources = [name for dataset in datasets for name in dataset.sources]
        check_source_names(self.sources)
        self._batches = [math.ceil(len(dataset) / batch_size) for dataset in datasets]
        self._plan: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(self._batches) * self.batch_size

    def __getitem__(self, position: int) -> Batch:
        epoch, offset = divmod(position, len(self))
        batch, place = divmod(offset, self.batch_size)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._order(epoch)
        order = self._plan[1]
        chosen = int(order[batch])
        number = int(np.count_nonzero(order[:batch] == chosen))  # batches of the same dataset before it
        sample = self.datasets[chosen][(epoch * self._batches[chosen] + number) * self.batch_size + place]
        first_source = sum(len(dataset.sources) for dataset in self.datasets[:chosen])
        return sample | {"position": torch.tensor(position), "source": sample["source"] + first_source}

    def _order(self, epoch: int) -> np.ndarray:
        """The dataset of each batch of an epoch, as an index into `datasets`."""
        order = np.repeat(np.arange(len(self.datasets)), self._batches)
        return np.random.default_rng((self.seed, epoch)).permutation(order)


def count_workers(given: int | None, device: torch.device, cached: bool = False) -> int:
    """The number of processes that load samples for training on `device`: `given`, or a default.

    The default is 0 without CUDA and for `cached` samples. Otherwise each training process of a machine uses an equal
    part of its cores, except one.
    """
    if given is not None:
        return given
    if device.type != "cuda" or cached:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(MOST_WORKERS, cores // processes - 1))


def dataset_fingerprint(samples: TrainingSamples, count: int) -> str:
    """A hash of `FINGERPRINT_SAMPLES` of the first `count` samples, or of all if there are fewer."""
    digest = hashlib.sha256()
    for position in np.linspace(0, count - 1, min(count, FINGERPRINT_SAMPLES)).round().astype(int).tolist():
        for name, tensor in sorted(samples[position].items()):
            if name != "skipped":
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB image as a uint8 tensor [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def tokenize(tokenizer: CLIPTokenizer, text: str) -> torch.Tensor:
    """Token ids [77], padded or truncated to the text encoder's length."""
    return split_tokens(tokenizer, text)[0]


def split_tokens(tokenizer: CLIPTokenizer, text: str) -> tuple[torch.Tensor, str]:
    """Token ids [77], padded or truncated to the text encoder's length, and the removed part of `text`."""
    longest = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", max_length=longest, return_tensors="pt", verbose=False).input_ids[0]
    return torch.cat([ids[: longest - 1], ids[-1:]]), str(tokenizer.decode(ids[longest - 1 : -1]))
