"""Draw human figures in random poses, with exact positions of COCO's joints.

Left and right are those of the figure, so they are mirrored in the image if it faces the viewer. Figures seen from
behind have hair instead of a face.
"""

import colorsys
import math
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS
from instructdiffusion_pipeline.types import Joint

HEIGHTS = (0.72, 0.97)  # of a figure, relative to the frame
CLOSE_UP_SHARE = 0.12  # fraction of figures that are larger than the frame
CLOSE_UP_HEIGHTS = (1.15, 1.7)
OVERSAMPLING = 4  # figures are drawn at this scale and reduced, for smooth edges

SKINS = [(255, 219, 186), (241, 194, 150), (224, 172, 120), (190, 130, 85), (141, 90, 55), (95, 58, 38)]
HAIRS = [(25, 20, 18), (60, 38, 25), (105, 65, 35), (170, 115, 60), (225, 190, 110), (150, 60, 30), (150, 150, 155)]
MIN_CONTRAST = 70  # distance of hair and skin in RGB
RGB = tuple[int, int, int]
Point = tuple[float, float]


class Body(NamedTuple):
    """Proportions of a figure, relative to about its height."""

    head: float  # radius
    shoulder: float  # half of the distance of the shoulders
    hip: float
    torso: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    thickness: float  # of a limb

    @classmethod
    def random(cls, rng: random.Random) -> "Body":
        """Random proportions: tall or small, slender or stout."""
        leg, arm = rng.uniform(0.19, 0.24), rng.uniform(0.145, 0.18)
        return cls(
            head=rng.uniform(0.085, 0.115),
            shoulder=rng.uniform(0.105, 0.145),
            hip=rng.uniform(0.055, 0.085),
            torso=rng.uniform(0.25, 0.3),
            upper_arm=arm,
            forearm=arm * rng.uniform(0.9, 1.05),
            thigh=leg,
            shin=leg * rng.uniform(0.9, 1.05),
            thickness=rng.uniform(0.05, 0.085),
        )


def draw_figure(rng: random.Random, faces_viewer: bool, side: int) -> tuple[Image.Image, dict[str, Joint | None]]:
    """Draw a figure on a transparent canvas of `side` x `side` pixels. Returns it, and its joints by COCO's names.

    A joint outside the frame is None. Joints that are hidden by the figure itself, such as a nose seen from behind,
    have a position."""
    body = Body.random(rng)
    skeleton = pose(body, faces_viewer, rng)
    points, scale = fit(skeleton, body, side, rng)
    layer = paint_figure(points, body, scale, faces_viewer, side, rng)
    joints: dict[str, Joint | None] = {}
    for name in COCO_JOINTS:
        x, y = points[name]
        inside = 0 <= x < side and 0 <= y < side
        joints[name] = Joint(x - 0.5, y - 0.5) if inside else None  # (0, 0) is the center of the first pixel
    return layer, joints


def pose(body: Body, faces_viewer: bool, rng: random.Random) -> dict[str, Point]:
    """Return the positions of the joints and of "head", its center. The origin is between the hips, y points down."""
    neck = -body.torso - 0.035
    head = (rng.uniform(-0.02, 0.02), neck - body.head)
    turn = rng.uniform(-0.25, 0.25) * body.head  # the face is turned a little to the side
    points = {"head": head, "nose": (head[0] + turn, head[1] + 0.12 * body.head)}
    for side in ("left", "right"):
        outward = 1 if (side == "left") == faces_viewer else -1  # direction along the x axis
        points[f"{side} eye"] = (head[0] + turn + outward * 0.42 * body.head, head[1] - 0.22 * body.head)
        points[f"{side} ear"] = (head[0] + outward * 0.98 * body.head, head[1])
        shoulder, hip = (outward * body.shoulder, -body.torso), (outward * body.hip, 0.0)
        arm, leg = rng.uniform(5, 165), rng.triangular(-4, 50, 8)
        points[f"{side} shoulder"], points[f"{side} hip"] = shoulder, hip
        elbow = points[f"{side} elbow"] = bone_end(shoulder, outward, arm, body.upper_arm)
        points[f"{side} wrist"] = bone_end(elbow, outward, arm + rng.triangular(-110, 110, 0), body.forearm)
        knee = points[f"{side} knee"] = bone_end(hip, outward, leg, body.thigh)
        points[f"{side} ankle"] = bone_end(knee, outward, leg + rng.triangular(-60, 15, -5), body.shin)
    lean = math.radians(rng.gauss(0, 9))
    cos, sin = math.cos(lean), math.sin(lean)
    return {name: (cos * x - sin * y, sin * x + cos * y) for name, (x, y) in points.items()}


def bone_end(start: Point, outward: int, degrees: float, length: float) -> Point:
    """Return the end of a bone, which points down at 0 degrees and away from the body at 90."""
    angle = math.radians(degrees)
    return start[0] + outward * length * math.sin(angle), start[1] + length * math.cos(angle)


def fit(points: dict[str, Point], body: Body, side: int, rng: random.Random) -> tuple[dict[str, Point], float]:
    """Scale and move a figure at random. Returns its joints in pixels of the canvas, and the scale."""
    margin = max(body.head, body.thickness)
    (left, right), (top, bottom) = (
        (min(axis) - margin, max(axis) + margin) for axis in zip(*points.values(), strict=True)
    )
    height = rng.uniform(*HEIGHTS)
    scale = height * side / max(bottom - top, 0.9 * (right - left))
    if rng.random() < CLOSE_UP_SHARE:
        scale *= rng.uniform(*CLOSE_UP_HEIGHTS) / height
    room_x, room_y = side - scale * (right - left), side - scale * (bottom - top)
    # If a close-up does not fit, it may be cut off on both sides and at the bottom, but hardly at the head.
    x, y = rng.uniform(0, 1) * room_x - scale * left, rng.uniform(0, 1 if room_y > 0 else 0.1) * room_y - scale * top
    return {name: (scale * px + x, scale * py + y) for name, (px, py) in points.items()}, scale


def paint_figure(
    points: dict[str, Point], body: Body, scale: float, faces_viewer: bool, side: int, rng: random.Random
) -> Image.Image:
    """Draw a figure with these joints, in pixels of the canvas, as an RGBA image."""
    canvas = Image.new("RGBA", (OVERSAMPLING * side,) * 2)
    at = {name: (OVERSAMPLING * x, OVERSAMPLING * y) for name, (x, y) in points.items()}
    unit = OVERSAMPLING * scale
    pen = ImageDraw.Draw(canvas)
    skin = rng.choice(SKINS)
    # Hair and skin must differ, so that front and back can be distinguished.
    hair = rng.choice([color for color in HAIRS if math.dist(color, skin) > MIN_CONTRAST])
    skin, hair = vary(skin, rng), vary(hair, rng)
    shirt, trousers, shoes = clothing(rng), clothing(rng), clothing(rng)
    short_sleeves, short_trousers = rng.random() < 0.6, rng.random() < 0.3
    limb, head = body.thickness * unit, body.head * unit

    for side in ("left", "right"):
        hip, knee, ankle = (at[f"{side} {joint}"] for joint in ("hip", "knee", "ankle"))
        bone(pen, knee, ankle, 0.9 * limb, skin if short_trousers else trousers)
        bone(pen, hip, knee, 1.15 * limb, trousers)
        ball(pen, ankle, 0.62 * limb, shoes)
    shoulders, hips = ([at[f"{side} {joint}"] for side in ("left", "right")] for joint in ("shoulder", "hip"))
    bone(pen, middle(*shoulders), at["head"], 0.9 * limb, skin)
    pen.polygon([*shoulders, hips[1], hips[0]], fill=shirt)
    for start, end in ((shoulders[0], shoulders[1]), (hips[0], hips[1]), *zip(shoulders, hips, strict=True)):
        bone(pen, start, end, limb, shirt)
    for side in ("left", "right"):
        shoulder, elbow, wrist = (at[f"{side} {joint}"] for joint in ("shoulder", "elbow", "wrist"))
        bone(pen, elbow, wrist, 0.8 * limb, skin if short_sleeves else darker(shirt))
        bone(pen, shoulder, elbow, limb, darker(shirt))
        ball(pen, wrist, 0.5 * limb, skin)
    paint_head(pen, at, head, skin, hair, faces_viewer, long_hair=rng.random() < 0.4)
    return canvas.reduce(OVERSAMPLING)


def paint_head(
    pen: ImageDraw.ImageDraw,
    at: dict[str, Point],
    radius: float,
    skin: RGB,
    hair: RGB,
    faces_viewer: bool,
    long_hair: bool,
) -> None:
    """Draw a head with face and hair, or from behind with hair only."""
    x, y = at["head"]
    if long_hair:
        box = (x - 1.12 * radius, y - 1.1 * radius, x + 1.12 * radius, y + 1.5 * radius)
        pen.rounded_rectangle(box, radius, hair)
    for side in ("left", "right"):
        ball(pen, at[f"{side} ear"], 0.24 * radius, skin)
    ball(pen, (x, y), radius, hair)
    if not faces_viewer:
        return
    pen.ellipse((x - 0.86 * radius, y - 0.6 * radius, x + 0.86 * radius, y + 0.98 * radius), skin)
    for side in ("left", "right"):
        ball(pen, at[f"{side} eye"], 0.17 * radius, (20, 20, 30))
    ball(pen, at["nose"], 0.12 * radius, darker(skin))
    nose_x, nose_y = at["nose"]
    mouth = (nose_x - 0.35 * radius, nose_y + 0.15 * radius, nose_x + 0.35 * radius, nose_y + 0.6 * radius)
    pen.arc(mouth, 20, 160, (150, 40, 40), max(1, round(0.15 * radius)))


def bone(pen: ImageDraw.ImageDraw, start: Point, end: Point, width: float, color: RGB) -> None:
    """Draw a thick line with round ends."""
    pen.line([start, end], color, round(width))
    for point in (start, end):
        ball(pen, point, width / 2, color)


def ball(pen: ImageDraw.ImageDraw, center: Point, radius: float, color: RGB) -> None:
    """Draw a filled circle."""
    x, y = center
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def middle(a: Point, b: Point) -> Point:
    """Return the point halfway between two points."""
    return (a[0] + b[0]) / 2, (a[1] + b[1]) / 2


def vary(color: RGB, rng: random.Random) -> RGB:
    """Change the brightness of a color a little at random."""
    light = rng.uniform(0.9, 1.05)
    return tuple(min(255, round(light * value)) for value in color)


def darker(color: RGB) -> RGB:
    """Darken a color, so that an arm is visible in front of the body."""
    return tuple(round(0.8 * value) for value in color)


def clothing(rng: random.Random) -> RGB:
    """Return a random color, from gray to saturated."""
    channels = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.95), rng.uniform(0.2, 1))
    return tuple(round(255 * channel) for channel in channels)
