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
SEGMENTATION_SCALES = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
DENOISING_SCALES = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="the folder the recipe fetched its pictures to")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "instructdiffusion-tiny")
    parser.add_argument("--samples", type=int, default=200, help="samples a row")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    pipeline = InstructDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen = World(args.world, unseen_photographs=True)
    unseen = World(args.world, unseen_photographs=True, unseen_objects=True)
    scores = {
        "segmentation, seen names": score_segmentation(pipeline, seen, args.samples, args.steps),
        "segmentation, unseen names": score_segmentation(pipeline, unseen, args.samples, args.steps),
        "denoising": score_denoising(pipeline, seen, args.samples, args.steps),
    }
    print(json.dumps(scores, indent=2))


def score_segmentation(pipeline, world: World, count: int, steps: int) -> dict[str, float]:
    """Mean IoU of the painted area where the object is there; share of pictures painted (over 1 %) where it is not."""
    rng = random.Random(2)
    cases = []
    while len(cases) < count:
        scene = world.scene(rng)
        sample, name, color = world.segmentation(rng, scene)
        cases.append((sample, scene.masks.get(name), color))
    images = answers(pipeline, [sample for sample, _, _ in cases], steps, SEGMENTATION_SCALES)
    ious, ceilings, painted = [], [], []
    for (sample, mask, color), answer in zip(cases, images, strict=True):
        found = segmentation.read(sample.image, answer, color)
        if mask is None:
            painted.append(found.mean() > 0.01)
        else:
            ious.append(iou(found, mask))
            ceilings.append(iou(segmentation.read(sample.image, round_trip(pipeline, sample.target), color), mask))
    return {
        "mean IoU": float(np.mean(ious)),
        "mean IoU, autoencoder alone": float(np.mean(ceilings)),
        "painted though absent": float(np.mean(painted)) if painted else float("nan"),
        "samples": count,
    }


def score_denoising(pipeline, world: World, count: int, steps: int) -> dict[str, float]:
    """Mean PSNR in dB before and after, and of the clean picture through the autoencoder."""
    rng = random.Random(3)
    samples = [world.denoising(rng, world.scene(rng), SIGMA) for _ in range(count)]
    images = answers(pipeline, samples, steps, DENOISING_SCALES)
    before, after, ceiling = [], [], []
    for sample, answer in zip(samples, images, strict=True):
        before.append(psnr(sample.target, sample.image))
        after.append(psnr(sample.target, answer))
        ceiling.append(psnr(sample.target, round_trip(pipeline, sample.target)))
    return {
        "PSNR in": float(np.mean(before)),
        "PSNR out": float(np.mean(after)),
        "PSNR, autoencoder alone": float(np.mean(ceiling)),
        "samples": count,
    }


def answers(pipeline, samples: list, steps: int, scales: dict[str, float]) -> list[Image.Image]:
    """The pipeline's pictures, each from a seed of its own."""
    images = []
    for start in tqdm(range(0, len(samples), BATCH)):
        batch = samples[start : start + BATCH]
        images += pipeline(
            [sample.instruction for sample in batch],
            [sample.image for sample in batch],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            **scales,
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
