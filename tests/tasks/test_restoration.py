import numpy as np
import pytest
from PIL import Image

from instructdiffusion_pipeline.tasks import restoration


@pytest.mark.parametrize("sigma", [5.0, 25.0])
def test_noise_has_the_deviation_asked_for(sigma):
    gray = Image.new("RGB", (200, 200), (128, 128, 128))
    residue = np.asarray(restoration.add_noise(gray, sigma, np.random.default_rng(0))).astype(float) - 128
    assert abs(residue.mean()) < 0.2
    # rounding to whole levels adds a variance of 1/12
    assert residue.std() == pytest.approx((sigma**2 + 1 / 12) ** 0.5, rel=0.01)


def test_noise_is_clipped_and_not_wrapped():
    white = Image.new("RGB", (50, 50), (255, 255, 255))
    assert np.asarray(restoration.add_noise(white, 40.0, np.random.default_rng(0))).min() > 60
