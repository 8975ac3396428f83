"""Measurements of samples, and aggregated scores.

Scores are in pixels of the input. Masks and joints are scored on the whole input: objects outside the box that the
output shows count as missed, also for the ceiling. Images are scored inside the box only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.calibration import expected_calibration_error
from instructdiffusion_pipeline.evaluation import metrics
from instructdiffusion_pipeline.evaluation.examples import Example
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity, Overlap
from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.frames import inner_box
from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint, Joints, LabeledMasks, Pose

Scores = dict[str, float | None]

RIGHT_IOU = 0.5  # of a mask, as in COCO's AP50
RIGHT_DISTANCE = 0.05  # of a joint, relative to the image's longer side


def measure(example: Example, reading: Any, box: Box, clip: ClipSimilarity | None = None) -> dict[str, Any]:
    """Compare decoded data with the ground truth. The result can be written as JSON.

    Args:
        example: has the annotation. The ground-truth image is drawn from it by the task's `draw`.
        reading: the decoded data, an image or a dictionary of masks or joints. Its type determines the metrics.
        box: the part of the input that the output shows.
        clip: adds the CLIP similarity of edited images.

    Returns:
        Joints, overlaps of masks, or scores of an image.
    """
    if isinstance(reading, Image.Image):
        inner = inner_box(box)
        truth, shown = draw_truth(example).crop(inner), reading.crop(inner)
        scores = {"PSNR": metrics.psnr(truth, shown), "SSIM": metrics.ssim(truth, shown)}
        if clip and isinstance(example.tasks[0], Editing):
            scores["CLIP similarity"] = clip(truth, shown)
        return {"picture": scores}
    if not all(isinstance(part, Mask) for part in reading.values()):
        pose = example.truth if isinstance(example.truth, Pose) else Pose(example.truth)
        return {
            "joints": {name: joint and list(map(float, joint)) for name, joint in reading.items()},
            "truth": {name: joint and list(map(float, joint)) for name in reading for joint in [pose.get(name)]},
            "side": max(example.image.size),
            "area": pose.area,
            "sigmas": pose.sigmas and dict(pose.sigmas),
        }
    empty = np.zeros((example.image.height, example.image.width), bool)
    labeled = example.truth.labeled if isinstance(example.truth, LabeledMasks) else ~empty
    found = {name: mask.pixels & labeled for name, mask in reading.items()}
    return {
        "masks": [Overlap.of(name, example.truth.get(name, empty), pixels) for name, pixels in found.items()],
        "scores": [mask.score if found[name].any() else None for name, mask in reading.items()],
    }


def summarize(measures: Sequence[Mapping[str, Any]]) -> Scores:
    """The scores of one row of the table, from `measures` of one kind. A score that cannot be computed is None."""
    if "joints" in measures[0]:
        return _joint_scores(measures)
    if "masks" in measures[0]:
        overlaps = [Overlap(*overlap) for measure in measures for overlap in measure["masks"]]
        return {
            "mIoU": metrics.mean_iou(overlaps),
            "cIoU": metrics.cumulated_iou(overlaps),
            "mcIoU": metrics.mean_class_iou(overlaps),
            "N-acc": metrics.no_target_accuracy(overlaps),
            "ECE": _calibration_error(measures),
        }
    names = measures[0]["picture"]
    return {name: sum(measure["picture"][name] for measure in measures) / len(measures) for name in names}


def score_key(measure: Mapping[str, Any]) -> float:
    """A number by which the samples of one row are ranked; higher is better."""
    if "joints" in measure:
        found, truth = _joints(measure["joints"]), _joints(measure["truth"])
        steps = metrics.distances(truth, found, measure["side"])
        return -sum(min(step, 1.0) for step in steps) / max(1, len(steps))
    if "masks" in measure:
        return summarize([measure])["mIoU"] or 0.0
    return measure["picture"]["PSNR"]


def _joint_scores(measures: Sequence[Mapping[str, Any]]) -> Scores:
    poses = [Pose(_joints(measure["truth"]), measure["area"], measure["sigmas"]) for measure in measures]
    found = [_joints(measure["joints"]) for measure in measures]
    scores: Scores = {}
    if all(pose.area and pose.sigmas and pose.sigmas.keys() == pose.keys() for pose in poses):
        scores.update(metrics.keypoint_ap(poses, found) or {})
    inner = [{name: joint for name, joint in pose.items() if name not in metrics.NOT_IN_PCKH} for pose in poses]
    references: dict[tuple[str, float], tuple[Sequence[Joints], list[float | None]]] = {
        ("PCK@0.05 of the side", 0.05): (poses, [measure["side"] for measure in measures]),
        ("PCK@0.2 of the torso", 0.2): (poses, [metrics.length(pose, metrics.TORSO) for pose in poses]),
        ("PCKh@0.5", 0.5): (inner, [metrics.length(pose, metrics.HEAD) for pose in poses]),
    }
    for (name, fraction), (counted, lengths) in references.items():
        steps = [
            metrics.distances(truth, joints, length)
            for truth, joints, length in zip(counted, found, lengths, strict=True)
            if length
        ]
        if steps:
            scores[name] = metrics.pck([step for person in steps for step in person], fraction)
    scores["ECE"] = _calibration_error(measures)
    return scores


def _calibration_error(measures: Sequence[Mapping[str, Any]]) -> float | None:
    answers = [answer for measure in measures for answer in judged(measure)]
    return expected_calibration_error([score for score, _ in answers], [right for _, right in answers])


def judged(measure: Mapping[str, Any]) -> list[tuple[float, bool]]:
    """The score of each mask and joint that was found, and whether it is right.

    A mask is right if its IoU with the object is at least `RIGHT_IOU`, a joint if its distance from the true one is at
    most `RIGHT_DISTANCE` of the image's longer side. If the object or joint is absent, both are wrong.
    """
    if "joints" in measure:
        found, truth = _joints(measure["joints"]), _joints(measure["truth"])
        near = {
            name: metrics.distances({name: joint}, found, measure["side"])[0] <= RIGHT_DISTANCE
            for name, joint in truth.items()
            if joint
        }
        return [(joint.score, near.get(name, False)) for name, joint in found.items() if joint]
    pairs = zip(measure["masks"], measure["scores"], strict=True)
    overlaps = [(Overlap(*overlap), score) for overlap, score in pairs]
    return [(score, one.truth > 0 and one.iou >= RIGHT_IOU) for one, score in overlaps if score is not None]


def _joints(values: Mapping[str, list[float] | None]) -> dict[str, Joint | None]:
    return {name: Joint(*value) if value else None for name, value in values.items()}


def draw_truth(example: Example) -> Image.Image:
    """The targets of all tasks drawn on one image, as for training."""
    picture = example.image
    for task in example.tasks:
        picture = task.draw(picture, example.truth)
    return picture
