"""The alignment stage with `instructdiffusion-tiny`: candidates, selection by score, fine-tuning, a better score."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageFilter

from instructdiffusion_pipeline import InstructDiffusionPipeline, Segmentation
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.preferences import load_preferences
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import RECIPES, ImageDataset, TrainingConfig, train
from instructdiffusion_pipeline.training.candidates import make_candidates
from instructdiffusion_pipeline.types import Sample

TASK = Segmentation({"sunflower": "blue"})
SPRITE = Image.open(tiny.ROOT / "examples" / "demo" / "sunflower.png").convert("RGBA")
SHIPPED = tiny.ROOT / "examples" / "instructdiffusion-tiny"
GRID = [(text, image) for text in (0.5, 1.0, 2.0) for image in (0.5, 1.0)]  # around the model's own settings
STEPS, GOOD = 12, 0.6  # denoising steps; minimum IoU of a selected candidate


def scene(seed: int) -> tuple[Image.Image, np.ndarray]:
    """A sunflower over colored clouds, and its mask."""
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    image, side = clouds.filter(ImageFilter.GaussianBlur(3)), int(rng.integers(24, 40))
    left, top = rng.integers(0, 64 - side, 2).tolist()
    flower = SPRITE.resize((side, side), Image.Resampling.LANCZOS)
    image.paste(flower, (left, top), flower)
    mask = np.zeros((64, 64), bool)
    mask[top : top + side, left : left + side] = np.asarray(flower.getchannel("A")) > 127
    return image, mask


def iou(answer: Image.Image, seed: int) -> float:
    image, mask = scene(seed)
    found = TASK.read(image, answer)["sunflower"].pixels
    return float((found & mask).sum() / (found | mask).sum())


def mean_iou(pipe: InstructDiffusionPipeline, seeds: range) -> float:
    answers = pipe(
        [TASK.instruction()] * len(seeds),
        [scene(seed)[0] for seed in seeds],
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        image_guidance_scale=0.5,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    return float(np.mean([iou(answer, seed) for answer, seed in zip(answers, seeds, strict=True)]))


@pytest.mark.slow
def test_fine_tuning_on_the_best_candidates_raises_the_score_on_new_scenes(tmp_path):
    pipe = InstructDiffusionPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    new_scenes = range(1000, 1032)
    before = mean_iou(pipe, new_scenes)

    scenes = [scene(seed) for seed in range(32)]
    samples = [Sample(image, TASK.draw(image, {"sunflower": mask}), TASK.instruction()) for image, mask in scenes]
    make_candidates(pipe, samples, tmp_path, GRID, STEPS, batch_size=16)
    for number in range(len(samples)):
        paths = sorted((tmp_path / "candidates").glob(f"{number:06d}_*"))
        best = max(paths, key=lambda path: iou(Image.open(path), number))
        if iou(Image.open(best), number) >= GOOD:
            best.rename(tmp_path / "picks" / best.name)

    chosen = load_preferences(tmp_path)
    mixture = Mixture([(Source("picks", chosen, Editing.from_annotation), 1)])
    settings = {"max_train_steps": 60, "batch_size": 16, "learning_rate": 3e-4} | RECIPES["alignment"]
    pipe = train(pipe, ImageDataset(mixture, pipe.tokenizer), TrainingConfig(**settings), tmp_path / "run")
    after = mean_iou(pipe, new_scenes)
    print(f"{len(chosen)} picks of {len(GRID) * len(samples)} candidates: mean IoU {before:.3f} to {after:.3f}")
    assert after >= before + 0.01
