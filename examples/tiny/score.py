"""Score a small model on scenes it never saw, beside what its autoencoder alone would allow.

python examples/tiny/score.py --world out/tiny/world
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm
from world import World

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.tasks import segmentation

SIGMA = 25.0  # grey levels
BATCH = 20
# Chosen among six settings on new scenes of the training world; the demo and the model card use them, too.
SEGMENTATION = {"num_inference_steps": 20, "guidance_scale": 1.5, "image_guidance_scale": 1.0}
DENOISING = {"num_inference_steps": 20, "guidance_scale": 0.75, "image_guidance_scale": 0.75}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="the folder the recipe fetched its pictures to")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "instructdiffusion-tiny")
    parser.add_argument("--samples", type=int, default=200, help="samples a row")
    args = parser.parse_args()

    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen = World(args.world, unseen_photographs=True)
    unseen = World(args.world, unseen_photographs=True, unseen_objects=True)
    scores = {
        "segmentation, seen names": score_segmentation(pipeline, seen, args.samples),
        "segmentation, unseen names": score_segmentation(pipeline, unseen, args.samples),
        "denoising": score_denoising(pipeline, seen, args.samples),
    }
    print(json.dumps(scores, indent=2))


def score_segmentation(pipeline, world: World, count: int) -> dict[str, float]:
    """Mean IoU of the painted area where the object is there, and how often something is painted where it is not.

    Beside it: what the autoencoder alone would allow, and the IoU of painting all objects, whatever the name.
    """
    rng = random.Random(2)
    scenes = [world.scene(rng) for _ in range(count)]
    cases = [world.segmentation(rng, scene) for scene in scenes]
    images = answers(pipeline, [sample for sample, _, _ in cases], SEGMENTATION)
    rows: dict[str, list[float]] = {"model": [], "several": [], "ceiling": [], "blind": [], "absent": []}
    for scene, (sample, name, color), answer in zip(scenes, cases, images, strict=True):
        found = segmentation.read(sample.image, answer, color)
        if name not in scene.masks:
            rows["absent"].append(found.mean() > 0.01)
            continue
        mask = scene.masks[name]
        rows["model"].append(iou(found, mask))
        rows["ceiling"].append(iou(segmentation.read(sample.image, round_trip(pipeline, sample.target), color), mask))
        rows["blind"].append(iou(np.logical_or.reduce(list(scene.masks.values())), mask))
        if len(scene.masks) > 1:
            rows["several"].append(iou(found, mask))
    return {
        "mean IoU": np.mean(rows["model"]),
        "mean IoU, autoencoder alone": np.mean(rows["ceiling"]),
        "mean IoU, all objects painted": np.mean(rows["blind"]),
        "pictures": len(rows["model"]),
        "mean IoU, several objects in the picture": np.mean(rows["several"]),
        "pictures with several objects": len(rows["several"]),
        "painted (over 1 %) though absent": np.mean(rows["absent"]) if rows["absent"] else None,
        "pictures without the object": len(rows["absent"]),
    }


def score_denoising(pipeline, world: World, count: int) -> dict[str, float]:
    """Mean PSNR in dB before and after, and of the clean and of the noisy picture through the autoencoder alone."""
    rng = random.Random(3)
    samples = [world.denoising(rng, world.scene(rng), SIGMA) for _ in range(count)]
    images = answers(pipeline, samples, DENOISING)
    before, after, ceiling, blurred = [], [], [], []
    for sample, answer in zip(samples, images, strict=True):
        before.append(psnr(sample.target, sample.image))
        after.append(psnr(sample.target, answer))
        ceiling.append(psnr(sample.target, round_trip(pipeline, sample.target)))
        blurred.append(psnr(sample.target, round_trip(pipeline, sample.image)))
    return {
        "PSNR in": np.mean(before),
        "PSNR out": np.mean(after),
        "PSNR, autoencoder alone": np.mean(ceiling),
        "PSNR, noisy picture through the autoencoder": np.mean(blurred),
        "pictures": count,
    }


def answers(pipeline, samples: list, settings: dict[str, float]) -> list[Image.Image]:
    """The pipeline's pictures, each from a seed of its own."""
    images = []
    for start in tqdm(range(0, len(samples), BATCH)):
        batch = samples[start : start + BATCH]
        images += pipeline(
            [sample.instruction for sample in batch],
            [sample.image for sample in batch],
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            **settings,
        ).images
    return images


@torch.no_grad()
def round_trip(pipeline, image: Image.Image) -> Image.Image:
    """`image` through the autoencoder and back."""
    pixels = pipeline.image_processor.preprocess(image)
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded)[0]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boolean masks."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def psnr(truth: Image.Image, image: Image.Image) -> float:
    """Peak signal to noise ratio in dB of 8-bit pictures."""
    return peak_signal_noise_ratio(np.asarray(truth), np.asarray(image))


if __name__ == "__main__":
    main()
