"""Shared fixtures of the tests: no network, the golden model, and small components that run in milliseconds."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from instructdiffusion_pipeline import InstructDiffusionPipeline

sys.path.insert(0, str(tiny.ROOT / "conversion"))

# On a busy machine, an example may need more than hypothesis' default of 200 ms.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
GOLDEN_MODEL = GOLDEN / "model"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Data recorded from the original code on a CPU in float32, with a tiny model."""
    return GOLDEN


def convert_golden(ema_state: Path | None = None) -> InstructDiffusionPipeline:
    from convert_original_checkpoint import convert

    # Stored in half precision, which represents all of its weights exactly; the original code ran in float32.
    pipe = convert(
        GOLDEN_MODEL / "tiny-original.safetensors",
        ema_state=ema_state,
        original_config_file=GOLDEN_MODEL / "tiny_instruct_diffusion.yaml",
        text_encoder=str(GOLDEN_MODEL / "text_encoder"),
        tokenizer=str(GOLDEN_MODEL / "tokenizer"),
    )
    return quiet(pipe.to(torch.float32))


@pytest.fixture(scope="session")
def golden_pipe() -> InstructDiffusionPipeline:
    """The converted golden model. It is shared, so a test that changes it must use `copy_of(golden_pipe)`."""
    return convert_golden()


@pytest.fixture(scope="session")
def golden_ema_pipe() -> InstructDiffusionPipeline:
    """The golden model with the averaged weights of a training state."""
    return convert_golden(GOLDEN_MODEL / "tiny-ema-state-fp16.pth")


@pytest.fixture
def pipe() -> InstructDiffusionPipeline:
    """A new pipeline with random weights, which processes a 32 x 32 image in milliseconds."""
    return quiet(InstructDiffusionPipeline(**tiny.components()))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
