"""Candidates for the alignment stage: many outputs for each instruction, from which people select the best.

Geng et al., CVPR 2024, section 3.4: twenty guidance settings per sample, of which people select at most two; the paper
uses about 1,000 selected images. `datasets.preferences` reads the selected images for fine-tuning.
"""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from instructdiffusion_pipeline.files import save_image, write_text
from instructdiffusion_pipeline.fingerprint import check_run_config, content_hash, pipeline_fingerprint
from instructdiffusion_pipeline.image_grid import labeled_grid
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.types import Sample

# (guidance_scale, image_guidance_scale): twenty pairs around the original code's settings for editing and segmentation
GUIDANCE_GRID = tuple((text, image) for text in (3.0, 4.0, 5.0, 6.5, 8.0) for image in (1.0, 1.25, 1.5, 1.75))
CANDIDATES_PER_ROW = 5  # of the contact sheet


def make_candidates(
    pipeline: InstructDiffusionPipeline,
    samples: Sequence[Sample],
    folder: str | PathLike[str],
    grid: Sequence[tuple[float, float]] = GUIDANCE_GRID,
    num_inference_steps: int = 100,
    batch_size: int = 4,
    seed: int = 0,
) -> None:
    """Run the pipeline on each sample, at its own size, with all guidance settings in `grid` and different noise.

    An interrupted call is resumed by calling it again.

    Args:
        pipeline: the pipeline to run.
        samples: inputs and instructions; the targets are shown on the contact sheets.
        folder: gets samples.jsonl, inputs/{sample}.png, candidates/{sample}_{number}_{scales}.png, a contact sheet for
            each sample in sheets/, and an empty folder picks/, into which people move the best candidates.
        grid: pairs of `guidance_scale` and `image_guidance_scale`.
        batch_size: samples per call of the pipeline.
        seed: seed of the noise.

    Raises:
        ValueError: if there are no samples, or `folder` has candidates of another run.
    """
    if not samples:
        raise ValueError("`samples` must have at least one sample; got none.")
    folder = Path(folder)
    for part in ("inputs", "candidates", "sheets", "picks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    run = {
        "model": pipeline_fingerprint(pipeline),
        "grid": [list(scales) for scales in grid],
        "num_inference_steps": num_inference_steps,
        "batch_size": batch_size,
        "seed": seed,
        "samples": len(samples),
        "content": content_hash(
            [picture for sample in samples for picture in (sample.image, sample.target)],
            [sample.instruction for sample in samples],
        ),
    }
    check_run_config(folder, "run.json", run, "candidates of the same run")
    lines = [
        json.dumps({"id": f"{index:06d}", "instruction": sample.instruction}) for index, sample in enumerate(samples)
    ]
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")

    with tqdm(total=len(samples), desc="candidates") as bar:
        for start in range(0, len(samples), batch_size):
            numbers = range(start, min(start + batch_size, len(samples)))
            # The sheet of a sample is written last.
            if not all((folder / "sheets" / f"{number:06d}.png").exists() for number in numbers):
                batch = {number: samples[number] for number in numbers}
                generate_candidates(pipeline, batch, folder, grid, num_inference_steps, seed)
            bar.update(len(numbers))


def generate_candidates(
    pipeline: InstructDiffusionPipeline,
    samples: dict[int, Sample],
    folder: Path,
    grid: Sequence[tuple[float, float]],
    num_inference_steps: int,
    seed: int,
) -> None:
    """Write the candidates, inputs and contact sheets of a batch of samples, given by their numbers."""
    panels: dict[int, list[tuple[str, Image.Image]]] = {number: [] for number in samples}
    for place, (text, image) in enumerate(grid):
        generators = [
            torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number, place)).generate_state(1)[0]))
            for number in samples
        ]
        pictures, _ = pipeline(
            [sample.instruction for sample in samples.values()],
            [sample.image for sample in samples.values()],
            num_inference_steps=num_inference_steps,
            guidance_scale=text,
            image_guidance_scale=image,
            ensemble_size=1,
            resolution=0,  # that of the samples
            generator=generators,
            return_dict=False,
        )
        for number, picture in zip(samples, pictures, strict=True):
            name = f"{number:06d}_{place:02d}_s{text:g}_i{image:g}.png"
            save_image(folder / "candidates" / name, picture)
            panels[number].append((name.removesuffix(".png"), picture))
    for number, sample in samples.items():
        save_image(folder / "inputs" / f"{number:06d}.png", sample.image)
        first = (f'{number:06d}: "{sample.instruction}"', [("input", sample.image), ("target", sample.target)])
        rows = [
            ("", panels[number][start : start + CANDIDATES_PER_ROW])
            for start in range(0, len(grid), CANDIDATES_PER_ROW)
        ]
        save_image(folder / "sheets" / f"{number:06d}.png", labeled_grid([first, *rows]))
