"""From a reading to what is written down of it, and from what is written down to the numbers of the table.

Scores are in pixels of the input. Masks and joints are scored on all of it: what lies outside the part that the answer
shows counts as missed, for the ceiling as well. Pictures are scored on that part alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.evaluation import metrics
from instructdiffusion_pipeline.evaluation.examples import Example
from instructdiffusion_pipeline.evaluation.metrics import ClipSimilarity, Overlap
from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.frames import inner_box
from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint, Pose

Scores = dict[str, float | None]


def measure(example: Example, reading: Any, box: Box, clip: ClipSimilarity | None = None) -> dict[str, Any]:
    """What scores need to know of a `reading`, as JSON holds it: joints, overlaps of masks, or scores of a picture.

    What a reading is tells how to score it, whatever the task: a picture, or a dictionary of masks or of joints. The
    true picture is what `draw` gives. `clip` scores edited pictures only.
    """
    if isinstance(reading, Image.Image):
        whole = inner_box(box)
        right, shown = truth_picture(example).crop(whole), reading.crop(whole)
        scores = {"PSNR": metrics.psnr(right, shown), "SSIM": metrics.ssim(right, shown)}
        if clip and isinstance(example.tasks[0], Editing):
            scores["CLIP similarity"] = clip(right, shown)
        return {"picture": scores}
    if not all(isinstance(part, Mask) for part in reading.values()):
        truth = example.truth if isinstance(example.truth, Pose) else Pose(example.truth)
        return {
            "joints": {name: joint and list(map(float, joint)) for name, joint in reading.items()},
            "truth": {name: joint and list(map(float, joint)) for name in reading for joint in [truth.get(name)]},
            "side": max(example.image.size),
            "area": truth.area,
            "sigmas": truth.sigmas and dict(truth.sigmas),
        }
    nothing = np.zeros((example.image.height, example.image.width), bool)
    return {
        "masks": [Overlap.of(name, example.truth.get(name, nothing), mask.pixels) for name, mask in reading.items()]
    }


def summarize(measures: Sequence[Mapping[str, Any]]) -> Scores:
    """The scores of one row; None where one cannot be computed. All `measures` are of one kind."""
    if "joints" in measures[0]:
        return _joint_scores(measures)
    if "masks" in measures[0]:
        overlaps = [Overlap(*overlap) for measure in measures for overlap in measure["masks"]]
        return {
            "mIoU": metrics.mean_iou(overlaps),
            "cIoU": metrics.cumulated_iou(overlaps),
            "mcIoU": metrics.mean_class_iou(overlaps),
            "N-acc": metrics.no_target_accuracy(overlaps),
        }
    names = measures[0]["picture"]
    return {name: sum(measure["picture"][name] for measure in measures) / len(measures) for name in names}


def score_key(measure: Mapping[str, Any]) -> float:
    """A number to sort answers of one row by, from worst to best."""
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
    references = {
        ("PCK@0.05 of the side", 0.05): [measure["side"] for measure in measures],
        ("PCK@0.2 of the torso", 0.2): [metrics.length(pose, metrics.TORSO) for pose in poses],
        ("PCKh@0.5", 0.5): [metrics.length(pose, metrics.HEAD) for pose in poses],
    }
    for (name, share), lengths in references.items():
        people = [person for person in zip(poses, found, lengths, strict=True) if person[2]]
        if people:
            scores[name] = metrics.pck([step for person in people for step in metrics.distances(*person)], share)
    return scores


def _joints(values: Mapping[str, list[float] | None]) -> dict[str, Joint | None]:
    return {name: Joint(*value) if value else None for name, value in values.items()}


def truth_picture(example: Example) -> Image.Image:
    """The truth as it would be drawn for training, all questions in one picture."""
    picture = example.image
    for task in example.tasks:
        picture = task.draw(picture, example.truth)
    return picture
