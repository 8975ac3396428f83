"""Scores of joints, masks and pictures, by the definitions the field uses."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import CLIPImageProcessor, CLIPModel

from instructdiffusion_pipeline.tasks.keypoints import coco_keypoints
from instructdiffusion_pipeline.types import Joint, Joints, Pose

NOWHERE = Joint(-1e4, -1e4, 0.0)  # COCO writes (0, 0) for a joint not found; in a small picture that may be close
IDENTICAL = 100.0  # dB of two equal pictures, whose PSNR is infinite, so that means stay finite

STRAY = 0.001  # of a picture's pixels: what a VAE alone makes of a picture reads as a few painted ones


def keypoint_ap(poses: Sequence[Pose], found: Sequence[Joints]) -> dict[str, float] | None:
    """COCO's keypoint AP, AP50 and AP75 (0 to 1), each person being a picture of its own, as with ground-truth boxes.

    All `poses` need an area and share their sigmas; `found` holds one reading for each. People without a labelled
    joint do not count; None if there are no others.
    """
    pairs = [(pose, joints) for pose, joints in zip(poses, found, strict=True) if any(pose.values())]
    if not pairs:
        return None
    sigmas = pairs[0][0].sigmas or {}
    names = tuple(sigmas)
    if not sigmas or any(pose.area is None or pose.sigmas != sigmas for pose, _ in pairs):
        raise ValueError("`poses` must all have an area, and the sigmas of one set of joints.")
    truths, results = [], []
    for number, (pose, joints) in enumerate(pairs, start=1):  # pycocotools takes the id 0 for "no match"
        labelled = [pose.get(name) for name in names]
        truths.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "area": pose.area,
                "bbox": [0, 0, 0, 0],  # read for people without a labelled joint only
                "num_keypoints": sum(map(bool, labelled)),
                "keypoints": [value for joint in labelled for value in ((*joint[:2], 2) if joint else (0, 0, 0))],
            }
        )
        results.append(coco_keypoints({name: joints.get(name) or NOWHERE for name in names}, number, names))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": truth["id"]} for truth in truths],
            "annotations": truths,
            "categories": [{"id": 1, "name": "person"}],
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), "keypoints")
        run.params.kpt_oks_sigmas = np.array(list(sigmas.values()))
        run.evaluate()
        run.accumulate()
        run.summarize()
    return dict(zip(("AP", "AP50", "AP75"), map(float, run.stats[:3]), strict=True))


HEAD = ("upper neck", "head top")  # PCKh: MPII's head segment
TORSO = ("left shoulder", "right hip")  # PCK of FLIC


def length(pose: Joints, ends: tuple[str, str]) -> float | None:
    """From one joint to another in pixels, as `HEAD` or `TORSO`; None if one of them is not labelled."""
    first, second = (pose.get(name) for name in ends)
    return float(np.hypot(first.x - second.x, first.y - second.y)) if first and second else None


def distances(pose: Joints, found: Joints, reference: float) -> list[float]:
    """From each labelled joint of `pose` to where it was found, in shares of `reference`; infinite if it was not.

    The `reference` of PCK, in pixels, is the picture's side, or the `length` of the head or the torso.
    """
    steps = []
    for name, joint in pose.items():
        if joint is not None:
            other = found.get(name)
            steps.append(float(np.hypot(joint.x - other.x, joint.y - other.y)) / reference if other else float("inf"))
    return steps


def pck(steps: Sequence[float], share: float) -> float | None:
    """Percentage of correct keypoints (0 to 1): the part of `distances` up to `share`; None if there are none."""
    return sum(step <= share for step in steps) / len(steps) if steps else None


class Overlap(NamedTuple):
    """How a mask meets the true one of the object `name`, in pixels."""

    name: str
    intersection: int
    union: int
    truth: int

    @classmethod
    def of(cls, name: str, truth: np.ndarray, found: np.ndarray) -> "Overlap":
        """From two bool arrays [height, width]. Where nothing is true, up to `STRAY` of the pixels count as none."""
        if truth.shape != found.shape:
            raise ValueError(f"the true mask of {name!r} must be {found.shape} like its picture; it is {truth.shape}.")
        if not truth.any() and found.mean() <= STRAY:
            return cls(name, 0, 0, 0)
        return cls(name, int((truth & found).sum()), int((truth | found).sum()), int(truth.sum()))

    @property
    def iou(self) -> float:
        """Intersection over union; 1 if there is nothing and nothing was painted."""
        return self.intersection / self.union if self.union else 1.0


def mean_iou(overlaps: Sequence[Overlap]) -> float | None:
    """mIoU: the mean over samples. An empty truth counts 1 if nothing is painted, else 0, as in gRefCOCO's gIoU."""
    return sum(overlap.iou for overlap in overlaps) / len(overlaps) if overlaps else None


def cumulated_iou(overlaps: Sequence[Overlap]) -> float | None:
    """cIoU of referring segmentation: all intersections over all unions; None if all unions are empty."""
    union = sum(overlap.union for overlap in overlaps)
    return sum(overlap.intersection for overlap in overlaps) / union if union else None


def mean_class_iou(overlaps: Iterable[Overlap]) -> float | None:
    """mcIoU of COCO-Stuff: the mean over names of the cumulated IoU; names with empty unions do not count."""
    classes = defaultdict(list)
    for overlap in overlaps:
        classes[overlap.name].append(overlap)
    scores = [score for group in classes.values() if (score := cumulated_iou(group)) is not None]
    return sum(scores) / len(scores) if scores else None


def no_target_accuracy(overlaps: Iterable[Overlap]) -> float | None:
    """N-acc of gRefCOCO: the share of the empty truths where nothing is painted; None if no truth is empty."""
    unions = [overlap.union for overlap in overlaps if overlap.truth == 0]
    return unions.count(0) / len(unions) if unions else None


def psnr(truth: Image.Image, picture: Image.Image) -> float:
    """Peak signal to noise ratio in dB of two RGB pictures of one size, at most `IDENTICAL`."""
    with np.errstate(divide="ignore"):
        return min(IDENTICAL, float(peak_signal_noise_ratio(np.asarray(truth), np.asarray(picture))))


def ssim(truth: Image.Image, picture: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004, Gaussian window), mean over channels; sides from 11 pixels."""
    return float(
        structural_similarity(
            np.asarray(truth),
            np.asarray(picture),
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


class ClipSimilarity:
    """Cosine of the CLIP embeddings of two pictures, -1 to 1 (CLIP-I of MagicBrush and others).

    `model` is a CLIP model's folder, or its Hub id, which is fetched if it is not there yet.
    """

    def __init__(self, model: str | Path):
        self.name = Path(model).name
        self.processor = CLIPImageProcessor.from_pretrained(model)
        self.model = CLIPModel.from_pretrained(model).eval()

    @torch.no_grad()
    def __call__(self, truth: Image.Image, picture: Image.Image) -> float:
        pixels = self.processor([truth, picture], return_tensors="pt").pixel_values  # [2, 3, side, side]
        first, second = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return float(torch.cosine_similarity(first, second, dim=0))
