import pytest
import torch
from scenes import SHIPPED

from instructdiffusion_pipeline import InstructDiffusionPipeline


@pytest.fixture(scope="session")
def shipped() -> InstructDiffusionPipeline:
    pipeline = InstructDiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
