"""What people watch while a model trains: loss of each source, rate, and memory."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image


class TrainingMetrics:
    """Sums up updates from one line in the trackers to the next."""

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources, self.device = sources, device
        self.skipped = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._since = time.perf_counter()

    def add(self, losses: torch.Tensor, sources: torch.Tensor, skipped: torch.Tensor) -> None:
        """The samples of one update, from all processes; each argument [N]."""
        self.skipped += int(skipped.sum())
        for loss, source in zip(losses.tolist(), sources.tolist(), strict=True):
            self._losses[self.sources[source]].append(loss)

    def line(self) -> dict[str, float]:
        """Mean loss, of each source too; samples a second; samples skipped and peak memory (GB) of the whole run."""
        every = [loss for losses in self._losses.values() for loss in losses]
        values = {
            "loss": math.fsum(every) / len(every),
            "samples per second": len(every) / (time.perf_counter() - self._since),
            "samples skipped": self.skipped,
            "peak memory, GB": peak_memory(self.device) / 1e9,
        }
        values |= {f"loss/{name}": math.fsum(losses) / len(losses) for name, losses in self._losses.items()}
        self._start_anew()
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on the GPU if it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def show(trackers: Iterable[GeneralTracker], sheet: Image.Image, step: int) -> None:
    """Send the validation pictures to those trackers that accelerate gives pictures (trackio is none of them)."""
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **layout)
