"""The alignment stage's first half: many answers to each question, for people to pick the best from.

Geng et al., CVPR 2024, section 3.4: twenty guidance settings a sample, of which people keep none, one or two; about a
thousand pictures. Fine-tuning on `datasets.picks.picks` of the folder is the second half.
"""

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from instructdiffusion_pipeline.fingerprint import check_run_config, pipeline_fingerprint
from instructdiffusion_pipeline.files import save_image, write_text
from instructdiffusion_pipeline.image_grid import stack, strip
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.types import Sample

# (guidance_scale, image_guidance_scale): twenty, around those that the original edits and segments with
GRID = tuple((text, image) for text in (3.0, 4.0, 5.0, 6.5, 8.0) for image in (1.0, 1.25, 1.5, 1.75))
ROW = 5  # candidates in a row of the contact sheet


def make_candidates(
    pipeline: InstructDiffusionPipeline,
    samples: Sequence[Sample],
    folder: str | PathLike[str],
    grid: Sequence[tuple[float, float]] = GRID,
    num_inference_steps: int = 100,
    batch_size: int = 4,
    seed: int = 0,
) -> None:
    """Answer each sample once with every guidance setting of `grid`, each time from other noise.

    `folder` gets samples.jsonl, inputs/{sample}.png, candidates/{sample}_{number}_{scales}.png, a contact sheet of
    each sample in sheets/, and picks/, empty: whoever looks at the sheets moves the best candidates there. Targets
    of `samples` are shown on the sheets. A run that was killed goes on where it was when it is called again.

    Raises a ValueError if there are no samples, or `folder` holds candidates of another run.
    """
    if not samples:
        raise ValueError("`samples` must hold at least one sample; got none.")
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
        "instructions": hashlib.sha256("\n".join(sample.instruction for sample in samples).encode()).hexdigest()[:16],
    }
    check_run_config(folder, "run.json", run, "candidates of the same run")
    lines = [
        json.dumps({"id": f"{index:06d}", "instruction": sample.instruction}) for index, sample in enumerate(samples)
    ]
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")

    with tqdm(total=len(samples), desc="candidates") as bar:
        for start in range(0, len(samples), batch_size):
            numbers = range(start, min(start + batch_size, len(samples)))
            # A sheet is the last file of its sample.
            if not all((folder / "sheets" / f"{number:06d}.png").exists() for number in numbers):
                answer(
                    pipeline, {number: samples[number] for number in numbers}, folder, grid, num_inference_steps, seed
                )
            bar.update(len(numbers))


def answer(
    pipeline: InstructDiffusionPipeline,
    samples: dict[int, Sample],
    folder: Path,
    grid: Sequence[tuple[float, float]],
    num_inference_steps: int,
    seed: int,
) -> None:
    """All candidates of a few samples, by their numbers, with inputs and sheets."""
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
            generator=generators,
            return_dict=False,
        )
        for number, picture in zip(samples, pictures, strict=True):
            name = f"{number:06d}_{place:02d}_s{text:g}_i{image:g}.png"
            save_image(folder / "candidates" / name, picture)
            panels[number].append((name.removesuffix(".png"), picture))
    for number, sample in samples.items():
        save_image(folder / "inputs" / f"{number:06d}.png", sample.image)
        first = strip(f'{number:06d}: "{sample.instruction}"', [("input", sample.image), ("target", sample.target)])
        rows = [strip("", panels[number][start : start + ROW]) for start in range(0, len(grid), ROW)]
        save_image(folder / "sheets" / f"{number:06d}.png", stack([first, *rows]))
