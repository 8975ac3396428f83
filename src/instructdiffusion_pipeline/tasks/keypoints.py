"""Keypoints: each named joint gets an opaque disc of its color (Geng et al., CVPR 2024, section 3.1)."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box, upright_rgb
from instructdiffusion_pipeline.tasks import EmptyAnnotation
from instructdiffusion_pipeline.tasks.colors import (
    KEYPOINT_COLORS,
    RGB,
    NamedColors,
    assign_colors,
    check_colors,
    coverage,
    paint,
    visible_colors,
)
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.tasks.wording import join_words, with_a, with_the
from instructdiffusion_pipeline.types import Joint, Joints

RADIUS = 10 / 256  # of a disc, as a fraction of the image's short side
MAX_JOINTS = 5  # in one instruction
BOX_PADDING = 1.25  # of the crop around a person, as a multiple of the longer side of the box (MPII, HRNet)
READING_SIDE = 256  # pixels along the short side, at which a disc has the size of training
MIN_SCORE = 0.4
MIN_EVIDENCE = 16  # levels; pixels closer than this to the requested color are ignored
RIM = 2  # pixels; up to this distance, JPEG mixes the hue of a disc with that of its surroundings
FULL = 0.75  # minimum coverage of a pixel that is surely inside a disc

COCO_JOINTS = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip

# {discs}: "a red disc on the left wrist and a blue one on the nose"
LIST_TEMPLATES = [
    "draw {discs}",
    "put {discs}",
    "place {discs}",
    "paint {discs}",
    "set {discs}",
    "please add {discs}",
    "show me the joints: {discs}",
    "mark this body with {discs}",
    "I need {discs}",
    "leave the picture as it is, but draw {discs}",
]
# {marks}: "the left wrist in red and the nose in blue"
MARK_TEMPLATES = [
    "mark {marks}",
    "point out {marks}",
    "show {marks}",
    "where is this body's skeleton? show {marks}",
    "find the joints and mark {marks}",
    "label {marks}",
    "dot {marks}",
    "locate {marks}",
]


@dataclass(frozen=True)
class Keypoints:
    """Asks for a disc on each joint: `{"left wrist": "red"}`, one to five names to keys of `KEYPOINT_COLORS`.

    Raises a ValueError if a color is unknown or used twice, or if there is no joint or more than five.
    """

    colors: Mapping[str, str]

    family: ClassVar[str] = "keypoints"
    settings: ClassVar[dict[str, float]] = {
        "num_inference_steps": 100,
        "guidance_scale": 6.0,
        "image_guidance_scale": 0.5,
    }

    def __post_init__(self) -> None:
        check_colors(self.colors, KEYPOINT_COLORS)
        object.__setattr__(self, "colors", NamedColors(self.colors))
        if len(self.colors) > MAX_JOINTS:
            raise ValueError(
                f"`colors` must have at most {MAX_JOINTS} joints per task; got {len(self.colors)}. Use several tasks."
            )

    @classmethod
    def from_annotation(cls, image: Image.Image, joints: Joints, rng: random.Random) -> "Keypoints":
        """Choose one to five random joints and visible colors.

        Joints that are None may be chosen; joints whose disc is outside the image are not. Raises `EmptyAnnotation` if
        no joint is left.
        """
        image = upright_rgb(image)
        radius = disc_radius(image.size)
        inside = [
            name
            for name, joint in joints.items()
            if joint is None
            or (-radius <= joint.x < image.width + radius and -radius <= joint.y < image.height + radius)
        ]
        if not inside:
            raise EmptyAnnotation(f"`joints` has no joint inside the {image.width} x {image.height} image.")
        names = rng.sample(inside, min(len(inside), rng.randint(1, MAX_JOINTS)))
        colors: dict[str, str] = {}
        for name in names:
            joint = joints[name]
            spot = disc(image.size, joint) if joint else np.zeros((image.height, image.width), bool)
            free = {color: rgb for color, rgb in KEYPOINT_COLORS.items() if color not in colors.values()}
            colors[name] = rng.choice(visible_colors(image, spot, free))
        return cls(colors)

    def instruction(self, rng: random.Random | None = None) -> str:
        """The instruction: a random wording with `rng`, otherwise always the same."""
        discs = join_words(
            [
                f"{with_a(color)} {'disc' if index == 0 else 'one'} on {with_the(name)}"
                for index, (name, color) in enumerate(self.colors.items())
            ]
        )
        marks = join_words([f"{with_the(name)} in {color}" for name, color in self.colors.items()])
        template = rng.choice(LIST_TEMPLATES + MARK_TEMPLATES) if rng else LIST_TEMPLATES[0]
        return template.format(discs=discs, marks=marks)

    def draw(self, image: Image.Image, joints: Joints) -> Image.Image:
        """Draw a disc on each joint of `image`; joints that are None or not named are not drawn."""
        image = upright_rgb(image)
        pixels = np.array(image)
        for name, color in self.colors.items():
            joint = joints.get(name)
            if joint is not None:
                paint(pixels, disc(image.size, joint), KEYPOINT_COLORS[color], opacity=1.0)
        return Image.fromarray(pixels)

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> dict[str, Joint | None]:
        """The position of each joint in pixels of `image`, or None if no disc was found.

        `answer` may have another size. It shows the `box` of `image` (see `working_size`), or all of it if `box` is
        None. The score of a joint is the mean coverage inside the disc minus the mean coverage in a ring around it (1
        for a perfect disc). Discs that are visible to less than 10 % are not detected.
        """
        frame = Frame.of(image, answer, box, shortest=READING_SIDE)
        colors = [KEYPOINT_COLORS[color] for color in self.colors.values()]
        shares, evidence = coverage(frame.source, frame.answer, colors, 1.0)
        radius = disc_radius((frame.source.shape[1], frame.source.shape[0]))
        joints: dict[str, Joint | None] = {}
        for index, name in enumerate(self.colors):
            # Discs are opaque, so painted pixels have the requested color. Pixels that changed to a different color
            # belong to another disc.
            gap = np.linalg.norm(frame.answer - np.array(colors[index], np.float32), axis=-1)
            share = np.minimum(shares[index], 1 - gap / evidence[index].clip(min=1))
            others = np.delete(shares, index, 0).max(0, initial=0)
            # JPEG halves the resolution of hues, so the rim of another disc has a mixed color, which may be similar to
            # the requested one. Only full coverage counts there.
            rim = beside(others, RIM) & (share < FULL)
            known = (evidence[index] >= MIN_EVIDENCE) & (others <= 0.25) & ~rim
            x, y, score = find_disc(share, known, radius)
            joints[name] = Joint(*frame.point(x, y), score) if score >= MIN_SCORE else None
        return joints

    def marks(self, joints: Joints) -> list["Mark"]:
        """The joints that were found, with their names and colors."""
        return [
            Mark(name, KEYPOINT_COLORS[color], joint)
            for name, color in self.colors.items()
            if (joint := joints.get(name)) is not None
        ]

    def overlay(self, image: Image.Image, joints: Joints) -> Image.Image:
        """`image` with a cross, a name and a score at each joint that was found."""
        return draw_marks(image, self.marks(joints))


class Mark(NamedTuple):
    """A joint to draw on an image."""

    name: str
    color: RGB
    joint: Joint


def draw_marks(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """`image` with a cross, a name and a score at each joint.

    A label is placed above or below its cross if an earlier label is beside it, and connected by a line. Labels
    overlap only if there is no free row.
    """
    sheet = upright_rgb(image)
    pen, arm = ImageDraw.Draw(sheet), max(3, min(sheet.size) // 30)

    def draw_lines(color: RGB, *lines: list[tuple[float, float]]) -> None:
        for width, ink in ((max(3, arm // 3), "black"), (max(1, arm // 6), color)):
            for line in lines:
                pen.line(line, ink, width)

    for _, color, joint in marks:
        horizontal = [(joint.x - arm, joint.y), (joint.x + arm, joint.y)]
        draw_lines(color, horizontal, [(joint.x, joint.y - arm), (joint.x, joint.y + arm)])
    font_size = max(10, min(sheet.size) // 20)
    labels: list[Box] = []
    texts = []
    for name, color, joint in marks:
        text = f"{name} {joint.score:.2f}"
        # next to the cross, on the side with more space; if an earlier label is there, above or below it
        side, anchor = (1, "lm") if joint.x < sheet.width / 2 else (-1, "rm")
        x = joint.x + side * 1.5 * arm
        left, top, right, bottom = pen.textbbox((x, 0), text, anchor=anchor, font_size=font_size, stroke_width=1)
        count = math.ceil(sheet.height / (bottom - top))
        rows = [joint.y + row * (bottom - top) for row in sorted(range(-count, count + 1), key=abs)]
        boxes = {y: (left, y + top, right, y + bottom) for y in rows}
        free = (y for y, box in boxes.items() if not any(overlap(box, label) for label in labels))
        y = next((y for y in free if y + top >= 0 and y + bottom <= sheet.height), joint.y)
        labels.append(boxes[y])
        texts.append(((x, y), text, anchor))
        if y != joint.y:
            draw_lines(color, [(joint.x, joint.y), (x, y)])
    for place, text, anchor in texts:
        pen.text(place, text, "white", anchor=anchor, font_size=font_size, stroke_width=1, stroke_fill="black")
    return sheet


def joint_tasks(image: Image.Image, names: Sequence[str]) -> list[Keypoints]:
    """Tasks for all of `names`, with at most `MAX_JOINTS` each, in colors that are visible on `image` if possible.

    With more than `MAX_JOINTS` names, those that follow each other are in different tasks. In lists such as
    `COCO_JOINTS` these are neighbors in the body, and their discs would cover each other in one output image.

    Raises a ValueError if there are no names, or two are equal.
    """
    if isinstance(names, str) or not 0 < len(set(names)) == len(names):
        raise ValueError(f"`names` must be a list of different names, at least one; got {names!r}.")
    names, count = list(names), math.ceil(len(names) / MAX_JOINTS)
    return [Keypoints(assign_colors(image, names[group::count], KEYPOINT_COLORS)) for group in range(count)]


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have pixels in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def disc_radius(size: tuple[int, int]) -> float:
    """Radius in pixels of the discs in an image of (width, height)."""
    return RADIUS * min(size)


def disc(size: tuple[int, int], joint: Joint) -> np.ndarray:
    """The pixels (bool, height x width) within dx^2 + dy^2 <= r^2 + 1 of the joint.

    The position is rounded half up; negative coordinates are truncated toward zero, as in the original code.
    """
    width, height = size
    dx = np.arange(width) - int(joint.x + 0.5)
    dy = np.arange(height) - int(joint.y + 0.5)
    return dx[None, :] ** 2 + dy[:, None] ** 2 <= disc_radius(size) ** 2 + 1


def beside(share: np.ndarray, reach: int) -> np.ndarray:
    """The pixels (bool, height x width) that are at most about `reach` pixels from an area of full coverage.

    Areas narrower than about `reach` pixels do not count.
    """
    window = 2 * reach + 1
    plane = torch.from_numpy(share.clip(0, 1))[None, None]
    mean = F.avg_pool2d(plane, window, 1, reach, count_include_pad=False)
    return F.max_pool2d((mean > FULL).float(), 2 * window - 1, 1, window - 1)[0, 0].numpy() > 0


def find_disc(share: np.ndarray, known: np.ndarray, radius: float) -> tuple[float, float, float]:
    """The position at which a disc of `radius` pixels fits the coverage [height, width] best: x, y and score.

    The fit is the mean coverage inside the disc minus the mean in a ring around it, over `known` pixels only, so
    partly covered or cut-off discs are detected by their visible part. Positions up to one radius outside the image
    are tried.
    """
    reach = math.ceil(1.6 * radius) + 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device="cpu")
    distance = (offsets[:, None] ** 2 + offsets[None, :] ** 2).sqrt()
    inside, ring = distance**2 <= radius**2 + 1, (distance > math.sqrt(radius**2 + 1) + 1) & (distance <= reach)
    kernels = torch.stack([inside, ring]).float()
    weight = torch.from_numpy(known).float()
    planes = torch.stack([weight, weight * torch.from_numpy(share).clamp(0, 1)])[:, None]
    # Correlation with kernels this large is faster in the frequency domain.
    full = [side + 2 * reach for side in share.shape]
    sums = torch.fft.irfft2(torch.fft.rfft2(planes, s=full) * torch.fft.rfft2(kernels, s=full), s=full)
    margin = math.ceil(radius)
    tried = slice(reach - margin, margin - reach)
    sums = sums[..., tried, tried]  # [weight or fraction, disc or ring, H + 2 margins, W + 2 margins]
    means = sums[1] / sums[0].clamp(min=1e-3)
    enough = sums[0, 0] >= 0.1 * inside.sum()
    fit = (means[0] - means[1]).where(enough, -1.0)
    y, x = divmod(int(fit.argmax()), fit.shape[1])
    return _peak(fit[y], x) - margin, _peak(fit[:, x], y) - margin, float(fit[y, x].clamp(0, 1))


def _peak(line: torch.Tensor, index: int) -> float:
    """The position of the maximum of the parabola through the highest value of a line and its two neighbors."""
    if not 0 < index < len(line) - 1:
        return float(index)
    before, top, after = line[index - 1 : index + 2].tolist()
    bend = before - 2 * top + after
    return index if bend == 0 else index + 0.5 * (before - after) / bend


def coco_keypoints(joints: Joints, image_id: int, names: tuple[str, ...] = COCO_JOINTS) -> dict[str, Any]:
    """A keypoint result for COCO's evaluation; joints that were not found are (0, 0, 0), the score is the mean."""
    found = [joints.get(name) for name in names]
    return {
        "image_id": image_id,
        "category_id": 1,
        "keypoints": [value for joint in found for value in (joint or (0.0, 0.0, 0.0))],
        "score": sum(joint.score for joint in found if joint) / len(names),
    }
