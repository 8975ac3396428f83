"""The classical baselines improve photographs."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from tasks.scenes import photograph

from instructdiffusion_pipeline.evaluation import Example, classical_baseline
from instructdiffusion_pipeline.evaluation.metrics import psnr
from instructdiffusion_pipeline.tasks.restoration import Restoration, add_noise
from instructdiffusion_pipeline.tasks.segmentation import Segmentation


def lettered(image):
    """Half transparent white letters across the image."""
    sheet = image.copy()
    ImageDraw.Draw(sheet).text((48, 48), "PROOF", "white", anchor="mm", font_size=28)
    return Image.blend(image, sheet, 0.5)


@pytest.mark.parametrize(
    ("defect", "spoil", "gain"),
    [
        ("noise", lambda image: add_noise(image, 25, np.random.default_rng(0)), 4),
        ("blur", lambda image: image.filter(ImageFilter.GaussianBlur(1)), 1),
        ("watermark", lettered, 5),
    ],
)
def test_baselines_improve_a_degraded_photograph(defect, spoil, gain):
    gains = []
    for seed in range(4):
        clean = photograph(random.Random(seed), 96, 96)
        spoiled = spoil(clean)
        restored = classical_baseline(Example(spoiled, [Restoration(defect)], clean))
        gains.append(psnr(clean, restored) - psnr(clean, spoiled))
    assert np.mean(gains) > gain


def test_other_tasks_have_no_baseline():
    image = photograph(random.Random(0), 96, 96)
    assert classical_baseline(Example(image, [Segmentation({"cat": "red"})], {})) is None
