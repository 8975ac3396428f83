"""Latents and embeddings computed once, on disk, so that training runs the UNet alone."""

import json
from collections.abc import Collection
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from instructdiffusion_pipeline.fingerprint import check_run_config, fingerprint
from instructdiffusion_pipeline.training.data import ImageDataset, content
from instructdiffusion_pipeline.training.encoding import Batch, FrozenEncoders

SHARD = 1024  # samples in a file


class CachedDataset(Dataset):
    """Encoded samples, shown in a new order each epoch, which `seed` fixes; memory-mapped, read when they are needed.

    With `only`, names out of `sources`, the others are left out; a ValueError says which of these are unknown.

    Each has the mode of the input's posterior, and mean and deviation of the target's, so that every epoch draws from
    it afresh, [C, h, w]; and embeddings [77, d] or token ids [77]. Stored in half precision.
    """

    def __init__(self, folder: str | PathLike[str], seed: int = 0, only: Collection[str] | None = None):
        about = json.loads((Path(folder) / "cache.json").read_text())
        self.sources, self.seed = about["sources"], seed
        self._shards = [load_file(shard_path(Path(folder), start)) for start in range(0, about["samples"], SHARD)]
        self._places = np.arange(about["samples"])
        if only is not None:
            if unknown := sorted(set(only) - set(self.sources)):
                raise ValueError(f"`only` must name some of {', '.join(self.sources)}; got {', '.join(unknown)}.")
            numbers = torch.cat([shard["source"] for shard in self._shards])
            self._places = np.flatnonzero([self.sources[number] in only for number in numbers])
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> Batch:
        epoch, offset = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._places[np.random.default_rng((self.seed, epoch)).permutation(len(self))]
        shard, place = divmod(int(self._order[1][offset]), SHARD)
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
    num_workers: int = 0,
    seed: int = 0,
) -> CachedDataset:
    """Encode the first `count` samples into `folder`, or go on where an earlier call was stopped.

    Their crops and wordings are drawn once, so `count` may be several epochs of `samples`. `embeddings` False stores
    token ids, for a text encoder that is trained; each text's embedding is stored once a file of 1,024 samples.

    Raises:
        ValueError: `count` is not above 0, or `folder` holds a cache of something else.
    """
    if count < 1:
        raise ValueError(f"`count` must be 1 or more; got {count}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoders = FrozenEncoders.of(pipeline, pipeline.device, pipeline.vae.dtype, with_text=embeddings)
    about = {
        "samples": count,
        "sources": samples.sources,
        "seed": samples.mixture.seed,
        "epoch": len(samples),
        "size": list(samples.size),
        "embeddings": embeddings,
        "content": content(samples, count),
        "encoders": fingerprint(pipeline.vae, *([pipeline.text_encoder] if embeddings else [])),
    }
    check_run_config(folder, "cache.json", about, "the same samples")
    with tqdm(total=count, desc="caching") as bar:
        for start in range(0, count, SHARD):
            stop = min(start + SHARD, count)
            path = shard_path(folder, start)
            if not path.exists():
                loader = DataLoader(samples, batch_size, sampler=range(start, stop), num_workers=num_workers)
                encode_shard(loader, encoders, path)
            bar.update(stop - start)
    return CachedDataset(folder, seed)


def encode_shard(loader: DataLoader, encoders: FrozenEncoders, path: Path) -> None:
    """Write one file of encoded samples, aside and renamed."""
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
    save_file(columns, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def shard_path(folder: Path, start: int) -> Path:
    """The file of the samples from `start` on."""
    return folder / f"{start:09d}.safetensors"
