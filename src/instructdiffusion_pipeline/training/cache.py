"""A cache of latents and text embeddings on disk, so that a training step runs the UNet only."""

import json
import logging
from collections.abc import Collection
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from instructdiffusion_pipeline.files import atomic_write
from instructdiffusion_pipeline.fingerprint import check_run_config, fingerprint
from instructdiffusion_pipeline.training.data import (
    FINGERPRINT_SAMPLES,
    EpochDataset,
    ImageDataset,
    count_workers,
    dataset_fingerprint,
)
from instructdiffusion_pipeline.training.encoding import Batch, FrozenEncoders

logger = logging.getLogger(__name__)
SHARD_SIZE = 1024  # samples per file


class CachedDataset(EpochDataset):
    """The encoded samples in a folder, memory-mapped, in a different order in each epoch.

    A sample contains the posterior mode of the input latents, the posterior mean and standard deviation of the target
    latents (sampled again in each epoch), and text embeddings or token ids. They are stored in half precision.

    Args:
        folder: written by `cache_samples`.
        seed: determines the order.
        only: names of the sources to use; the samples of others are ignored.

    Raises:
        ValueError: if `only` has an unknown name.
    """

    def __init__(self, folder: str | PathLike[str], seed: int = 0, only: Collection[str] | None = None):
        description = json.loads((Path(folder) / "cache.json").read_text())
        self.sources, self.seed = description["sources"], seed
        count = description["samples"]
        self._shards = [load_file(shard_path(Path(folder), start)) for start in range(0, count, SHARD_SIZE)]
        self._places = np.arange(count)
        if only is not None:
            if unknown := sorted(set(only) - set(self.sources)):
                raise ValueError(f"`only` must be names of {', '.join(self.sources)}; got {', '.join(unknown)}.")
            numbers = torch.cat([shard["source"] for shard in self._shards])
            self._places = np.flatnonzero([self.sources[number] in only for number in numbers])
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> Batch:
        epoch, offset = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._places[np.random.default_rng((self.seed, epoch)).permutation(len(self))]
        shard, place = divmod(int(self._order[1][offset]), SHARD_SIZE)
        item = {name: tensor[place] for name, tensor in self._shards[shard].items() if name != "prompt_embeds"}
        if "text" in item:
            item["prompt_embeds"] = self._shards[shard]["prompt_embeds"][item.pop("text")]
        return item | {"position": torch.tensor(position), "skipped": torch.tensor(0)}


def cache_samples(
    samples: ImageDataset,
    count: int,
    pipeline: DiffusionPipeline,
    folder: str | PathLike[str],
    embeddings: bool = True,
    batch_size: int = 32,
    num_workers: int | None = None,
    seed: int = 0,
) -> CachedDataset:
    """Encode samples into a folder. An interrupted call is resumed by calling it again.

    If several processes were launched, each encodes a part of the files, and all wait until the last one has finished.

    Args:
        samples: the data. The crop and the prompt of a sample are chosen when it is cached.
        count: number of samples to encode, from index 0; can be more than an epoch.
        pipeline: its VAE and text encoder are used.
        folder: a new folder, or one with a cache of the same samples. At most 256 samples are compared.
        num_workers: processes that load samples; None as in `TrainingConfig`.
        embeddings: whether to store text embeddings, or otherwise token ids, for training the text encoder.
        seed: determines the order of the cached samples in training.

    Raises:
        ValueError: if `count` is not above 0, or `folder` has a cache of other samples.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1; got {count}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoders = FrozenEncoders.of(pipeline, pipeline.device, pipeline.vae.dtype, with_text=embeddings)
    description = {
        "samples": count,
        "sources": samples.sources,
        "seed": samples.mixture.seed,
        "epoch": len(samples),
        "size": list(samples.size),
        "embeddings": embeddings,
        "content": dataset_fingerprint(samples, count),
        "encoders": fingerprint(pipeline.vae, *([pipeline.text_encoder] if embeddings else [])),
    }
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        is_new = not (folder / "cache.json").exists()
        check_run_config(folder, "cache.json", description, "a cache of the same samples")
        if not is_new and count > FINGERPRINT_SAMPLES and state.is_main_process:
            logger.warning(
                "The cache in %s is used again. %d of its %d samples were compared with the data. Delete the cache if"
                " other samples have changed.",
                folder,
                FINGERPRINT_SAMPLES,
                count,
            )
    workers = count_workers(num_workers, pipeline.device)
    starts = range(0, count, SHARD_SIZE)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc="caching", unit="file", disable=not state.is_main_process):
        path = shard_path(folder, start)
        if not path.exists():
            positions = range(start, min(start + SHARD_SIZE, count))
            loader = DataLoader(samples, batch_size, sampler=positions, num_workers=workers)
            encode_shard(loader, encoders, path)
    state.wait_for_everyone()
    return CachedDataset(folder, seed)


def encode_shard(loader: DataLoader, encoders: FrozenEncoders, path: Path) -> None:
    """Write one file of encoded samples. The embedding of a text is stored once per file."""
    device, parts, texts = encoders.vae.device, [], []
    for batch in loader:
        ids = batch.pop("input_ids")
        encoded = encoders.encode({name: batch[name].to(device) for name in ("image", "target")})
        parts.append({name: tensor.half().cpu() for name, tensor in encoded.items()} | {"source": batch["source"]})
        texts.append(ids)
    columns = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    ids = torch.cat(texts)
    if encoders.text_encoder is None:
        columns["input_ids"] = ids
    else:
        distinct, columns["text"] = ids.unique(dim=0, return_inverse=True)
        embeds = [encoders.embed(part.to(device)).half().cpu() for part in distinct.split(32)]
        columns["prompt_embeds"] = torch.cat(embeds)
    with atomic_write(path) as partial:
        save_file(columns, partial)


def shard_path(folder: Path, start: int) -> Path:
    """The file of the samples that begin with number `start`."""
    return folder / f"{start:09d}.safetensors"
