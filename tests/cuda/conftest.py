import os
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

from instructdiffusion_pipeline import InstructDiffusionPipeline

SHIPPED = tiny.ROOT / "examples" / "instructdiffusion-tiny"


@pytest.fixture(autouse=True)
def _any_precision():
    """Allows each test to set a precision, which accelerate otherwise sets once in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def exact():
    """Float32 without TF32, so that a GPU has the results of a CPU."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU; without one, in the rehearsal, the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def data() -> Path:
    """The dataset of the bundle."""
    if "CUDA_BUNDLE_DATA" not in os.environ:
        pytest.skip("needs the bundle, whose run.sh starts these tests")
    return Path(os.environ["CUDA_BUNDLE_DATA"])


@pytest.fixture
def load():
    """Loads `instructdiffusion-tiny` in a given precision on the CPU."""

    def load(dtype: torch.dtype = torch.float32) -> InstructDiffusionPipeline:
        pipe = InstructDiffusionPipeline.from_pretrained(SHIPPED, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load
