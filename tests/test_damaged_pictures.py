"""Images with damaged bytes: each is opened, or raises an error that names the option. Seeds are fixed."""

import io
import random
import warnings
from collections import Counter
from pathlib import Path

import pytest
import tiny
from PIL import Image
from test_conversion_fuzz import damage_bytes

from instructdiffusion_pipeline.cli import UsageError, open_image

FORMATS = ["png", "jpeg", "webp", "tiff", "gif", "bmp", "ppm", "jpeg2000"]


def encoded(kind: str) -> bytes:
    """An image with an EXIF block, if the format has one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    content = io.BytesIO()
    tiny.picture(24, 16).save(content, kind, exif=exif)
    return content.getvalue()


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_opened_or_raises_an_error(kind: str, count: int, tmp_path: Path) -> None:
    original, outcomes = encoded(kind), Counter()
    for seed in range(count):
        path = tmp_path / f"{seed}.{kind}"
        path.write_bytes(damage_bytes(original, random.Random(f"{kind} {seed}")))
        try:
            with warnings.catch_warnings(action="ignore"):  # warnings of Pillow
                assert open_image("--image", path).mode == "RGB"
            outcomes["opened"] += 1
        except UsageError as error:
            assert str(error).startswith(f"--image: {path} cannot be read as an image")
            outcomes["refused"] += 1
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes["opened"] and outcomes["refused"]
