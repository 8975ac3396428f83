import math

import numpy as np
import tiny
import torch
from accelerate.tracking import GeneralTracker

from instructdiffusion_pipeline.training.metrics import TrainingMetrics, log_images, peak_memory


def test_a_summary_has_the_means_since_the_previous_one():
    metrics = TrainingMetrics(["a", "b"], torch.device("cpu"))
    metrics.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 1]), 2)
    first = metrics.summarize()
    assert (first["loss"], first["loss/a"], first["loss/b"], first["samples skipped"]) == (3, 1.5, 6, 2)
    metrics.add(torch.tensor([5.0]), torch.tensor([0]), 1)
    second = metrics.summarize()
    assert (second["loss"], second["samples skipped"]) == (5, 3) and "loss/b" not in second
    assert math.isfinite(second["samples per second"])


def test_memory_is_counted_in_bytes():
    before = peak_memory(torch.device("cpu"))
    block = np.ones(int(1.5 * before), np.uint8)
    assert peak_memory(torch.device("cpu")) >= len(block)


class WithPictures(GeneralTracker):
    name, requires_logging_directory, main_process_only = "pictures", False, False

    def __init__(self):
        self.seen = []

    @property
    def tracker(self):
        return self.seen

    def log_images(self, values, step=None):
        self.seen.append((step, values["validation"].shape))


def test_trackers_without_image_support_get_no_images():
    tracker = WithPictures()
    log_images([GeneralTracker(_blank=True), tracker], tiny.picture(20, 10), step=7)
    assert tracker.seen == [(7, (1, 10, 20, 3))]
    assert not hasattr(GeneralTracker, "log_images"), "accelerate's base class"
