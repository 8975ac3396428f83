"""An evaluation of a model with random weights on 17 examples; as a script, so that tests can kill it."""

import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tiny
import torch
from diffusers import AutoencoderKL

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.datasets.keypoints import COCO_SIGMAS
from instructdiffusion_pipeline.evaluation import Example, LazyExample, evaluate, whole_person
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation
from instructdiffusion_pipeline.types import Edit, Joint, Pose

BATCH = 4
QUICK = {"num_inference_steps": 2, "guidance_scale": 0.5, "image_guidance_scale": 0.5}
SETTINGS = {family: QUICK for family in ("segmentation", "keypoints", "restoration", "editing")}


def blob(seed: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[8 + seed : 40 + seed, 10:50] = True
    return mask


def person(image, seed: int) -> Example:
    rng = random.Random(seed)
    joints = {name: Joint(rng.uniform(8, 56), rng.uniform(8, 56)) for name in COCO_SIGMAS}
    return Example(image, whole_person(image, joints, rng), Pose(joints, 1500.0, COCO_SIGMAS))


def unreadable() -> Example:
    raise OSError("the file is cut off")


def examples() -> list[LazyExample]:
    """Examples of all families and several sizes; one is unreadable, one too elongated, one has a wrong truth size."""
    restore, edit = Restoration("noise"), Editing("make it winter")
    found = []
    for seed in range(5):
        image, other = tiny.picture(64, 64, seed), tiny.picture(64, 64, seed + 100)
        wide = tiny.picture(96, 64, seed)
        masks = {"cat": blob(seed) if seed % 3 else np.zeros((64, 64), bool)}
        found += [
            LazyExample(
                f"cat {seed}", "segmentation, blobs", partial(Example, image, [Segmentation({"cat": "blue"})], masks)
            ),
            LazyExample(f"noise {seed}", "noise", partial(Example, wide, [restore], wide.transpose(0))),
        ]
        if seed < 3:
            found.append(
                LazyExample(f"edit {seed}", "editing", partial(Example, image, [edit], Edit(edit.text, other)))
            )
        if seed < 1:
            found.append(LazyExample(f"person {seed}", "keypoints", partial(person, image, seed)))
    found[5:5] = [
        LazyExample("broken file", "noise", unreadable),
        LazyExample("long strip", "noise", partial(Example, tiny.picture(640, 8), [restore], tiny.picture(640, 8))),
        LazyExample("other size", "noise", partial(Example, tiny.picture(64, 64), [restore], tiny.picture(32, 64))),
    ]
    return found


def model() -> InstructDiffusionPipeline:
    """A model of random weights with a VAE of factor 8: 64 x 64 pixels, the smallest size, are 8 x 8 latents."""
    parts = tiny.components()
    parts["vae"] = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    pipeline = InstructDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(folder: Path, **changes):
    torch.set_num_threads(1)  # sums in another order have other rounding errors
    pipeline = changes.pop("pipeline", None) or model()
    call = {"examples": examples(), "settings_by_family": SETTINGS, "batch_size": BATCH, "seed": 5, "resolution": 64}
    return evaluate(pipeline, folder=folder, **(call | changes))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
