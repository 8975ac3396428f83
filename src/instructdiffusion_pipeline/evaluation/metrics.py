"""Standard metrics of keypoints, masks and images."""

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

# Stands for a joint that was not found. COCO uses (0, 0), which may be near the true joint in a small image.
NOT_FOUND = Joint(-1e4, -1e4, 0.0)
MAX_PSNR = 100.0  # dB; the PSNR of two equal images is infinite, and means must be finite
# Maximum fraction of false-positive pixels that is ignored if the object is absent; VAE artifacts cause a few.
MAX_STRAY = 0.001


def keypoint_ap(poses: Sequence[Pose], found: Sequence[Joints]) -> dict[str, float] | None:
    """COCO's keypoint AP, AP50 and AP75 (0 to 1), with each person in a separate image (ground-truth boxes).

    Args:
        poses: the true joints. All must have an area and the same sigmas. Poses without joints are left out.
        found: the predicted joints, one mapping for each pose.

    Returns:
        The scores by name, or None if no pose has joints.
    """
    pairs = [(pose, joints) for pose, joints in zip(poses, found, strict=True) if any(pose.values())]
    if not pairs:
        return None
    sigmas = pairs[0][0].sigmas or {}
    names = tuple(sigmas)
    if not sigmas or any(pose.area is None or pose.sigmas != sigmas for pose, _ in pairs):
        raise ValueError("`poses` must all have an area and the same sigmas.")
    truths, results = [], []
    for number, (pose, joints) in enumerate(pairs, start=1):  # for pycocotools the id 0 means "no match"
        labeled = [pose.get(name) for name in names]
        truths.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "area": pose.area,
                "bbox": [0, 0, 0, 0],  # used only for people without joints
                "num_keypoints": sum(map(bool, labeled)),
                "keypoints": [value for joint in labeled for value in ((*joint[:2], 2) if joint else (0, 0, 0))],
            }
        )
        results.append(coco_keypoints({name: joints.get(name) or NOT_FOUND for name in names}, number, names))
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


# PCKh: MPII's head segment. The official PCKh uses 0.6 of the diagonal of a head box, which is in a Matlab file.
HEAD = ("upper neck", "head top")
NOT_IN_PCKH = ("pelvis", "thorax")  # as in MPII's evaluation
TORSO = ("left shoulder", "right hip")  # PCK of FLIC


def length(pose: Joints, ends: tuple[str, str]) -> float | None:
    """The distance in pixels of two joints, such as `HEAD` or `TORSO`; None if one of them is not labeled."""
    first, second = (pose.get(name) for name in ends)
    return float(np.hypot(first.x - second.x, first.y - second.y)) if first and second else None


def distances(pose: Joints, found: Joints, reference: float) -> list[float]:
    """Distances of the found joints from the labeled joints of `pose`, divided by `reference`; infinite if not found.

    The `reference` of PCK, in pixels, is the image's side, or the `length` of the head or the torso.
    """
    steps = []
    for name, joint in pose.items():
        if joint is not None:
            other = found.get(name)
            steps.append(float(np.hypot(joint.x - other.x, joint.y - other.y)) / reference if other else float("inf"))
    return steps


def pck(steps: Sequence[float], threshold: float) -> float | None:
    """PCK (0 to 1): the fraction of `distances` that are at most `threshold`; None if there are no distances."""
    return sum(step <= threshold for step in steps) / len(steps) if steps else None


class Overlap(NamedTuple):
    """Intersection and union of a mask and the true mask of the object `name`, and area of the latter, in pixels."""

    name: str
    intersection: int
    union: int
    truth: int

    @classmethod
    def of(cls, name: str, truth: np.ndarray, found: np.ndarray) -> "Overlap":
        """Compare bool arrays [height, width]. If `truth` is empty, up to `MAX_STRAY` of the pixels are ignored."""
        if truth.shape != found.shape:
            raise ValueError(f"the true mask of {name!r} must be {found.shape} like its image; it is {truth.shape}.")
        if not truth.any() and found.mean() <= MAX_STRAY:
            return cls(name, 0, 0, 0)
        return cls(name, int((truth & found).sum()), int((truth | found).sum()), int(truth.sum()))

    @property
    def iou(self) -> float:
        """Intersection over union; 1 if both masks are empty."""
        return self.intersection / self.union if self.union else 1.0


def mean_iou(overlaps: Sequence[Overlap]) -> float | None:
    """mIoU: the mean over samples (gIoU of gRefCOCO). An empty true mask gives 1 if nothing was found, otherwise 0."""
    return sum(overlap.iou for overlap in overlaps) / len(overlaps) if overlaps else None


def cumulated_iou(overlaps: Sequence[Overlap]) -> float | None:
    """cIoU of referring segmentation: sum of intersections divided by sum of unions; None if all unions are empty."""
    union = sum(overlap.union for overlap in overlaps)
    return sum(overlap.intersection for overlap in overlaps) / union if union else None


def mean_class_iou(overlaps: Iterable[Overlap]) -> float | None:
    """mcIoU of COCO-Stuff: the mean of the cIoU over classes, without classes whose unions are empty."""
    classes = defaultdict(list)
    for overlap in overlaps:
        classes[overlap.name].append(overlap)
    scores = [score for group in classes.values() if (score := cumulated_iou(group)) is not None]
    return sum(scores) / len(scores) if scores else None


def no_target_accuracy(overlaps: Iterable[Overlap]) -> float | None:
    """N-acc of gRefCOCO: the fraction of empty true masks where nothing was found; None if no true mask is empty."""
    unions = [overlap.union for overlap in overlaps if overlap.truth == 0]
    return unions.count(0) / len(unions) if unions else None


def psnr(truth: Image.Image, picture: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB images of one size, at most `MAX_PSNR`."""
    with np.errstate(divide="ignore"):
        return min(MAX_PSNR, float(peak_signal_noise_ratio(np.asarray(truth), np.asarray(picture))))


def ssim(truth: Image.Image, picture: Image.Image) -> float:
    """Structural similarity (Wang et al., 2004, Gaussian window), mean over channels. Sides: at least 11 pixels."""
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
    """Cosine similarity of the CLIP embeddings of two images, -1 to 1 (CLIP-I, as in MagicBrush).

    Args:
        model: folder or Hub id of a CLIP model.
        device: where the model runs, for example `pipeline.device`.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        self.name = Path(model).name
        self.processor = CLIPImageProcessor.from_pretrained(model)
        self.model = CLIPModel.from_pretrained(model).eval()
        self.model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's method

    @torch.no_grad()
    def __call__(self, truth: Image.Image, picture: Image.Image) -> float:
        pixels = self.processor([truth, picture], return_tensors="pt").pixel_values  # [2, 3, side, side]
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        first, second = self.model.visual_projection(pooled)
        return float(torch.cosine_similarity(first, second, dim=0))
