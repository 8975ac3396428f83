"""Every random choice of a training step, fixed by the seed and a sample's position alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate


class StepNoise(NamedTuple):
    """For B samples: `posterior_noise` and `noise` [B, C, h, w], `dropout` [B] in [0, 1), `timesteps` [B]."""

    posterior_noise: torch.Tensor
    dropout: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor


def draw(
    seed: int, positions: Iterable[int], shape: torch.Size, num_train_timesteps: int, timestep_bias: float = 1.0
) -> StepNoise:
    """What the samples at `positions` of a run draw, for latents of `shape` [C, h, w], in the original's order.

    Half of the timesteps are uniform, the other half have a density of t^(`timestep_bias` - 1).

    Nothing hangs on how samples are shared out to batches, processes and workers, so none of that changes a run.
    """
    columns = []
    for position in positions:
        (state,) = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state) >> 1)
        posterior_noise = torch.randn(shape, generator=generator)
        dropout = torch.rand((), generator=generator)
        timestep = torch.randint(0, num_train_timesteps, (), generator=generator)
        noise = torch.randn(shape, generator=generator)
        if timestep_bias != 1 and torch.rand((), generator=generator) < 0.5:
            late = torch.rand((), generator=generator) ** (1 / timestep_bias)
            timestep = (num_train_timesteps * late).long().clamp(max=num_train_timesteps - 1)
        columns.append((posterior_noise, dropout, timestep, noise))
    return StepNoise(*map(torch.stack, zip(*columns, strict=True)))


@dataclass(frozen=True)
class NoiseCollator:
    """Makes a batch of training samples, with their `StepNoise` under "draws"; so workers draw too."""

    seed: int
    latent_shape: torch.Size
    num_train_timesteps: int
    timestep_bias: float = 1.0

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        positions = [int(item["position"]) for item in items]
        draws = draw(self.seed, positions, self.latent_shape, self.num_train_timesteps, self.timestep_bias)
        return default_collate(list(items)) | {"draws": draws}
