import random

import degradations
import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize("kind", [degradations.gaussian, degradations.defocus, degradations.motion])
@pytest.mark.parametrize("reach", [0.7, 1.5, 2.5])
def test_kernels_have_sum_one_and_grow_with_their_size(kind, reach):
    kernel = kind(reach, random.Random(0))
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0
    rows, columns = np.indices(kernel.shape) - len(kernel) // 2
    assert (kernel * rows).sum() == pytest.approx(0, abs=0.1), "the kernel is centered"
    spread = (kernel * (rows**2 + columns**2)).sum() ** 0.5
    assert 0.3 * reach < spread < 1.6 * reach + 0.3


def test_blur_keeps_a_uniform_image_and_smooths_an_edge():
    even = Image.new("RGB", (64, 64), (10, 120, 240))
    edge = Image.fromarray(np.repeat(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8), 64 * 3).reshape(64, 64, 3))
    for seed in range(10):
        assert degradations.add_blur(even, random.Random(seed)) == even
        soft = np.asarray(degradations.add_blur(edge, random.Random(seed))).astype(int)
        assert soft.shape == (64, 64, 3)
        assert (soft[:20] == 0).all() and (soft[-20:] == 255).all()


def test_a_watermark_is_translucent_and_covers_a_part_of_the_image():
    gray = Image.new("RGB", (64, 64), (90, 90, 90))
    covered = []
    for seed in range(40):
        marked = np.asarray(degradations.add_watermark(gray, random.Random(seed))).astype(int)
        change = np.abs(marked - 90).max(-1)
        assert change.max() < 165, "translucent"
        covered.append((change > 8).mean())
    assert np.mean(np.array(covered) > 0.01) > 0.9
    assert 0.02 < np.mean(covered) < 0.4
