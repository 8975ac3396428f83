"""Logged values of training: losses by source, throughput, memory and validation images."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image


class TrainingMetrics:
    """Collects the losses of training samples between two log entries."""

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources, self.device = sources, device
        self.skipped = 0
        self._reset()

    def _reset(self) -> None:
        self._updates: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._start = time.perf_counter()

    def add(self, losses: torch.Tensor, sources: torch.Tensor, skipped: int) -> None:
        """Add the N samples of one update, gathered from all processes.

        Args:
            losses: [N]; stay on their device until `summarize`.
            sources: [N], numbers of the samples' sources.
            skipped: number of unreadable samples that were replaced.
        """
        self.skipped += skipped
        self._updates.append((losses, sources))

    def summarize(self) -> dict[str, float]:
        """Return the metrics since the last call, and reset them.

        They are the mean loss, of all samples and by source, and the samples per second. The number of skipped samples
        and the peak memory (GB) are those since the start of the run.
        """
        every, numbers = (torch.cat(column).tolist() for column in zip(*self._updates, strict=True))
        by_source: dict[str, list[float]] = defaultdict(list)
        for loss, number in zip(every, numbers, strict=True):
            by_source[self.sources[number]].append(loss)
        values = {
            "loss": math.fsum(every) / len(every),
            "samples per second": len(every) / (time.perf_counter() - self._start),
            "samples skipped": self.skipped,
            "peak memory, GB": peak_memory(self.device) / 1e9,
        }
        values |= {f"loss/{name}": math.fsum(losses) / len(losses) for name, losses in by_source.items()}
        self._reset()
        return values


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on the GPU if `device` is one, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes on Linux


def log_images(trackers: Iterable[GeneralTracker], image: Image.Image, step: int) -> None:
    """Send the grid of validation images to all trackers that support images (trackio does not)."""
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(image)[None]}, step=step, **layout)
