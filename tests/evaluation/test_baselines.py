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
    """Half see-through white letters across the image."""
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
def test_restores_a_photograph(defect, spoil, gain):
    gains = []
    for seed in range(4):
        clean = photograph(random.Random(seed), 96, 96)
        spoiled = spoil(clean)
        restored = classical_baseline(Example(spoiled, [Restoration(defect)], clean))
        gains.append(psnr(clean, restored) - psnr(clean, spoiled))
    assert np.mean(gains) > gain


def test_has_nothing_to_say_to_other_questions():
    image = photograph(random.Random(0), 96, 96)
    assert classical_baseline(Example(image, [Segmentation({"cat": "red"})], {})) is None
