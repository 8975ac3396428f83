"""Joint transforms of image and annotation: crop, rotation, flip. They run before the target is drawn.

Each is a callable `(image, annotation, rng) -> (image, annotation)` without state.
"""

import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.keypoints import UNIT, Person
from instructdiffusion_pipeline.types import Edit, Joint, Joints, LabeledMasks, Pose

OTHER_SIDE = {"left": "right", "right": "left"}
LOWER_BODY = {"pelvis", "hip", "knee", "ankle"}


@dataclass(frozen=True)
class PersonCrop:
    """Crops one person to `size` x `size` pixels, and converts a `Person` to its `Joints` in the crop.

    With `jitter`, as in the original code: the region is scaled by 0.65 to 1.35 (Gaussian, sigma 0.35), rotated with
    probability 0.6 (Gaussian, sigma 45 degrees, at most 90), and flipped with probability 0.5. With probability
    `half_body`, people with more than eight labeled joints are cropped to the upper or lower body; only used for COCO,
    as in the original code. Raises an `UnreadableSample` if all joints are labeled and none is in the crop.
    """

    size: int = 256
    half_body: float = 0.0
    jitter: bool = True

    def __call__(self, image: Image.Image, person: Person, rng: random.Random) -> tuple[Image.Image, Joints]:
        joints, center, side, angle = person.joints, person.center, person.scale[0] * UNIT, 0.0
        if self.jitter:
            if sum(joint is not None for joint in joints.values()) > 8 and rng.random() < self.half_body:
                center, side = half_body(joints, rng) or (center, side)
            side *= min(max(1 + 0.35 * rng.gauss(0, 1), 0.65), 1.35)
            if rng.random() <= 0.6:
                angle = min(max(45 * rng.gauss(0, 1), -90), 90)
            if rng.random() <= 0.5:
                joints, center = flip_joints(joints, image.width), (image.width - 1 - center[0], center[1])
                image = ImageOps.mirror(image)
        turn = crop_matrix(center, side, angle, self.size)
        placed = {name: joint and Joint(*(turn @ (joint.x, joint.y, 1)).tolist()) for name, joint in joints.items()}
        if not any(joint is None or min(joint[:2]) >= 0 and max(joint[:2]) < self.size for joint in placed.values()):
            raise UnreadableSample(f"annotation {person.id}", "no joint is left in the crop")
        return warp(image, turn, self.size), placed


@dataclass(frozen=True)
class EvaluationPersonCrop:
    """Crops one person to `size` x `size` pixels for evaluation, and converts a `Person` to a `Pose`.

    `sigmas` are the OKS sigmas of the dataset's joints. Joints without a sigma are left out.
    """

    size: int = 256
    sigmas: Mapping[str, float] | None = None

    def __call__(self, image: Image.Image, person: Person, rng: random.Random) -> tuple[Image.Image, Pose]:
        crop, joints = PersonCrop(self.size, jitter=False)(image, person, rng)
        if self.sigmas:
            joints = {name: joint for name, joint in joints.items() if name in self.sigmas}
        zoom = self.size / (UNIT * person.scale[0])
        return crop, Pose(joints, person.area and person.area * zoom**2, self.sigmas)


def half_body(joints: Joints, rng: random.Random) -> tuple[tuple[float, float], float] | None:
    """Center and side, in pixels, of a square around the labeled joints of the upper or the lower body.

    None if the chosen half has fewer than two distinct joints. If both halves have at least three joints, the upper
    half is chosen with probability 0.69.
    """
    halves: tuple[list[Joint], list[Joint]] = [], []
    for name, joint in joints.items():
        if joint is not None:
            halves[name.split()[-1] in LOWER_BODY].append(joint)
    upper, lower = halves
    want_upper = rng.gauss(0, 1) < 0.5
    chosen = upper if want_upper and len(upper) > 2 or len(lower) <= 2 else lower
    places = np.array([joint[:2] for joint in chosen]).reshape(-1, 2)
    if len(np.unique(places, axis=0)) < 2:
        return None
    x, y = places.mean(0).tolist()
    return (x, y), 1.5 * float(np.ptp(places, 0).max())


def crop_matrix(center: tuple[float, float], side: float, angle: float, size: int) -> np.ndarray:
    """The matrix [2, 3] from image pixels to pixels of a crop.

    The crop is a square of `side` pixels around `center`, rotated by `angle` degrees and resized to `size` pixels.
    """
    zoom, radians = size / side, math.radians(angle)
    linear = zoom * np.array([[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]])
    return np.column_stack([linear, size / 2 - linear @ center])


def warp(image: Image.Image, matrix: np.ndarray, size: int) -> Image.Image:
    """Transform `image` by a matrix [2, 3] to `size` x `size` pixels: bilinear, black outside the image."""
    back = np.linalg.inv(np.vstack([matrix, (0, 0, 1)]))[:2]
    back[:, 2] += 0.5 - back[:, :2].sum(1) / 2  # Pillow counts from the corner of the first pixel, not from its center
    return image.transform(
        (size, size), Image.Transform.AFFINE, tuple(back.ravel().tolist()), Image.Resampling.BILINEAR
    )


def flip_joints(joints: Joints, width: int) -> dict[str, Joint | None]:
    """Joints in the mirrored image: the left wrist becomes the right one."""
    return {swap_sides(name): joint and joint._replace(x=width - 1 - joint.x) for name, joint in joints.items()}


def swap_sides(name: str) -> str:
    """ "left wrist" for "right wrist", and so on."""
    return " ".join(OTHER_SIDE.get(word, word) for word in name.split())


@dataclass(frozen=True)
class SquareCrop:
    """Random square crop of image and annotation, `size` x `size` pixels, or smaller with `enlarge=False`.

    The side of the square is the image's short side, and the crop is resized (Lanczos; masks: nearest pixel). With
    `reduce=False` a square of at most `size` pixels is cropped, so that nothing is reduced. With `enlarge=False` a
    crop that is smaller than `size` is not enlarged. `flip` is the probability of a horizontal flip; nothing is
    flipped if a mask's name or an instruction contains left or right.
    """

    size: int = 256
    flip: float = 0.0
    reduce: bool = True
    enlarge: bool = True

    def __call__(self, image: Image.Image, annotation: Any, rng: random.Random) -> tuple[Image.Image, Any]:
        width, height = image.size
        side = min(width, height) if self.reduce else min(width, height, self.size)
        size = self.size if self.enlarge else min(side, self.size)
        left = rng.randint(0, width - side) if width > side else 0
        top = rng.randint(0, height - side) if height > side else 0
        # The pixel among `side` that is nearest to the center of each of `size` pixels, as Pillow computes it.
        nearest = (np.arange(size) * 2 + 1) * side // (2 * size)

        def picture(original: Image.Image) -> Image.Image:
            return resized(original.crop((left, top, left + side, top + side)), (size, size))

        def mask(original: np.ndarray) -> np.ndarray:
            return original[np.ix_(top + nearest, left + nearest)]

        image, annotation = picture(image), transform_annotation(annotation, image.size, picture, mask)
        return random_flip(image, annotation, self.flip, rng)


@dataclass(frozen=True)
class Resize:
    """Resizes image and edited image to `size` x `size` pixels regardless of aspect ratio, as in the original code.

    Nothing is cropped, so everything that the instruction refers to stays in the image. `flip` as in `SquareCrop`.
    """

    size: int = 256
    flip: float = 0.0

    def __call__(self, image: Image.Image, edit: Edit, rng: random.Random) -> tuple[Image.Image, Edit]:
        square = (self.size, self.size)
        return random_flip(resized(image, square), edit._replace(edited=resized(edit.edited, square)), self.flip, rng)


def random_flip(image: Image.Image, annotation: Any, chance: float, rng: random.Random) -> tuple[Image.Image, Any]:
    """Flip image and annotation with probability `chance`, unless a text of the annotation contains left or right."""
    if rng.random() >= chance or names_a_side(annotation):
        return image, annotation
    return ImageOps.mirror(image), transform_annotation(
        annotation, image.size, ImageOps.mirror, lambda mask: mask[:, ::-1]
    )


def names_a_side(annotation: Any) -> bool:
    """Whether an instruction, a caption or the name of a mask contains left or right."""
    if isinstance(annotation, Image.Image):
        return False
    texts = [annotation.instruction] if isinstance(annotation, Edit) else annotation
    texts = [texts] if isinstance(texts, str) else texts
    return any(re.search(r"\b(left|right)", text.lower()) for text in texts)


def transform_annotation(
    annotation: Any,
    size: tuple[int, int],
    picture: Callable[[Image.Image], Image.Image],
    mask: Callable[[np.ndarray], np.ndarray],
) -> Any:
    """The annotation of an image of `size` with its image or masks transformed; shared masks remain shared."""
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, Edit):
        return annotation._replace(edited=picture(resized(annotation.edited, size)))
    if isinstance(annotation, Image.Image):
        return picture(annotation)
    changed: dict[int, np.ndarray] = {}
    for original in annotation.values():
        if id(original) not in changed:
            changed[id(original)] = mask(original)
    masks = {name: changed[id(original)] for name, original in annotation.items()}
    return LabeledMasks(masks, mask(annotation.labeled)) if isinstance(annotation, LabeledMasks) else masks


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` stretched to `size`, by Lanczos."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
