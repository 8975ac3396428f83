import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as coco
from scenes import PHOTOGRAPHS, blob, iou, jpeg, photograph, through_vae
from scipy.ndimage import binary_fill_holes
from skimage.segmentation import find_boundaries

from instructdiffusion_pipeline import working_size
from instructdiffusion_pipeline.tasks import EmptyAnnotation
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS
from instructdiffusion_pipeline.tasks.restoration import add_noise
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation, outline

SEEDS = st.integers(0, 2**32).map(random.Random)


def far_from(image, color):
    """Pixels that differ from a color by at least 32 levels in a channel, on which its paint must be detected."""
    return np.abs(np.asarray(image).astype(int) - MASK_COLORS[color]).max(-1) >= 32


def iou_where_it_shows(image, task, found, masks):
    """The lowest IoU of a task's masks, over the pixels on which their colors are visible."""
    shows = {name: far_from(image, color) for name, color in task.colors.items()}
    return min(iou(found[name].pixels & shows[name], masks[name] & shows[name]) for name in masks)


def question(rng, size=256, count=1, narrowest=8):
    """A photograph, `count` masks that do not overlap, and a task whose colors are visible on them."""
    while True:
        image = photograph(rng, size, size)
        masks, colors = {}, {}
        for name in ["cat", "two dogs", "ball"][:count]:
            mask = blob(rng, size, size, narrowest) & ~np.logical_or.reduce(
                [*masks.values(), np.zeros((size, size), bool)]
            )
            color = Segmentation.from_annotation(image, {name: mask}, rng).colors[name] if mask.any() else "red"
            masks[name], colors[name] = mask, color
        if len(set(colors.values())) == count and all(mask.sum() >= 64 for mask in masks.values()):
            return image, masks, Segmentation(colors)


def test_painted_pixels_are_half_color_and_half_image_inside_the_mask():
    image = Image.new("RGB", (8, 6), (100, 50, 201))
    mask = np.zeros((6, 8), bool)
    mask[2:4, 1:5] = True
    painted = np.asarray(Segmentation({"ball": "green"}).draw(image, {"ball": mask}))
    assert (painted[mask] == (50, 89, 100)).all()
    assert (painted[~mask] == (100, 50, 201)).all()


@settings(max_examples=40)
@given(rng=SEEDS, color=st.sampled_from(sorted(MASK_COLORS)))
def test_decoding_returns_the_drawn_mask_in_each_color(rng, color):
    image = photograph(rng, 256, 256)
    masks = {"cat": blob(rng, 256, 256)}
    assume((masks["cat"] & far_from(image, color)).sum() >= 64)
    task = Segmentation({"cat": color})
    assert iou_where_it_shows(image, task, task.read(image, task.draw(image, masks)), masks) >= 0.99


@settings(max_examples=30)
@given(rng=SEEDS)
def test_decoding_distinguishes_several_colors(rng):
    image, masks, task = question(rng, count=3)
    found = task.read(image, task.draw(image, masks))
    assert iou_where_it_shows(image, task, found, masks) >= 0.99


# JPEG halves the resolution of color, so some pixels at the rim of a blob of 8 pixels are lost.
@pytest.mark.parametrize("narrowest, bar", [(16, 0.95), (8, 0.9)])
@settings(max_examples=20)
@given(rng=SEEDS)
def test_decoding_works_after_jpeg_compression(narrowest, bar, rng):
    image, masks, task = question(rng, narrowest=narrowest)
    found = task.read(image, jpeg(task.draw(image, masks)))
    assert iou_where_it_shows(image, task, found, masks) >= bar


def test_nearly_all_of_the_smallest_blobs_are_decoded_after_jpeg():
    # Measured on the seeds 0 to 399: 396 reach 0.95, the worst has 0.927, the median 0.995.
    scores = []
    for seed in range(100):
        image, masks, task = question(random.Random(seed), narrowest=8)
        found = task.read(image, jpeg(task.draw(image, masks)))
        scores.append(iou_where_it_shows(image, task, found, masks))
    print("IoU of blobs of 8 pixels and more after JPEG", np.quantile(scores, [0, 0.05, 0.5]).round(3))
    assert np.mean(np.array(scores) >= 0.95) >= 0.95


def test_decoding_works_after_the_vae_of_instructdiffusion_tiny(shipped):
    scores = []
    for seed in range(24):
        image, masks, task = question(random.Random(seed))
        found = task.read(image, through_vae(shipped, task.draw(image, masks)))
        scores.append(iou_where_it_shows(image, task, found, masks))
    print("IoU after the VAE", np.quantile(scores, [0, 0.1, 0.25, 0.5]).round(3))
    assert min(scores) >= 0.95


def test_changes_by_the_vae_are_not_decoded_as_masks(shipped):
    for seed in range(16):
        image = photograph(random.Random(seed), 64, 64)
        answer = through_vae(shipped, image)
        found = {color: Segmentation({"cat": color}).read(image, answer)["cat"] for color in MASK_COLORS}
        assert not [color for color, mask in found.items() if mask.pixels.any()], f"photograph {seed}"


@pytest.mark.parametrize("color", MASK_COLORS)
def test_an_output_equal_to_the_input_has_no_masks(color):
    found = Segmentation({"cat": color}).read(PHOTOGRAPHS[0], PHOTOGRAPHS[0])["cat"]
    assert not found.pixels.any() and found.box is None and found.polygons == [] and found.score == 0


def test_an_object_of_the_requested_color_is_filled_from_its_surroundings():
    image = photograph(random.Random(0), 128, 128)
    pixels = np.array(image)
    pixels[40:60, 40:60] = (2, 3, 250)  # already blue, so half transparent blue changes it by two levels
    image = Image.fromarray(pixels)
    mask = np.zeros((128, 128), bool)
    mask[30:70, 30:70] = True
    task = Segmentation({"ball": "blue"})
    noisy = add_noise(task.draw(image, {"ball": mask}), 6, np.random.default_rng(0))
    assert iou(task.read(image, noisy)["ball"].pixels, mask) >= 0.97


@pytest.mark.parametrize("answer_size", [(512, 256), (128, 64), (400, 300), (96, 128)])
def test_outputs_of_other_sizes_are_decoded_in_pixels_of_the_input(answer_size):
    image = PHOTOGRAPHS[1].resize((512, 256))
    mask = np.zeros((256, 512), bool)
    mask[60:180, 100:300] = True
    task = Segmentation({"cup": "purple"})
    answer = task.draw(image, {"cup": mask}).resize(answer_size, Image.Resampling.LANCZOS)
    found = task.read(image, answer)["cup"].pixels
    assert found.shape == mask.shape and iou(found, mask) >= 0.97


def test_outputs_for_a_large_image_are_decoded_at_the_right_pixels():
    image = PHOTOGRAPHS[0].resize((1920, 1080), Image.Resampling.LANCZOS)
    mask = np.zeros((1080, 1920), bool)
    mask[200:700, 500:1300] = True
    task = Segmentation({"suit": "yellow"})
    size, box = working_size(*image.size, 512)
    target = task.draw(image, {"suit": mask})
    # fitted to the working size and fitted back, as the pipeline does; both crop to the center
    answer = ImageOps.fit(ImageOps.fit(target, size, Image.Resampling.LANCZOS), image.size, Image.Resampling.LANCZOS)
    assert box == (96, 54, 1824, 1026)
    found = task.read(image, answer, box)["suit"]
    assert iou(found.pixels, mask) >= 0.99
    assert np.allclose(found.box, (500, 200, 1300, 700), atol=2)
    assert iou(task.read(image, answer)["suit"].pixels, mask) < 0.9  # without the box it is at another position


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_images_of_all_modes_can_be_decoded(mode):
    image = photograph(random.Random(1), 64, 64).convert("L")
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    mask = np.zeros((64, 64), bool)
    mask[10:40, 20:50] = True
    task = Segmentation({"ball": "red"})
    answer = task.draw(image, {"ball": mask})
    assert iou(task.read(image, answer)["ball"].pixels, mask) >= 0.99


def test_the_score_decreases_with_the_opacity():
    image = photograph(random.Random(2), 96, 96)
    mask = blob(random.Random(3), 96, 96)
    task = Segmentation({"ball": Segmentation.from_annotation(image, {"ball": mask}, random.Random(0)).colors["ball"]})
    full = task.draw(image, {"ball": mask})
    scores = [task.read(image, Image.blend(image, full, share))["ball"].score for share in (1.0, 0.9, 0.8, 0.7)]
    assert scores[0] >= 0.95 and scores == sorted(scores, reverse=True) and scores[-1] <= 0.5


def test_a_trace_of_color_is_not_a_mask():
    image = photograph(random.Random(2), 96, 96)
    mask = blob(random.Random(3), 96, 96)
    task = Segmentation({"ball": Segmentation.from_annotation(image, {"ball": mask}, random.Random(0)).colors["ball"]})
    full = task.draw(image, {"ball": mask})
    faint, clear = (task.read(image, Image.blend(image, full, share))["ball"] for share in (0.6, 0.75))
    assert not faint.pixels.any() and faint.box is None
    assert iou(clear.pixels, mask) >= 0.95


def test_a_clear_object_next_to_a_trace_of_color_is_kept():
    image, task = Image.new("RGB", (96, 96), "white"), Segmentation({"ball": "blue"})
    clear, faint = np.zeros((2, 96, 96), bool)
    clear[10:40, 10:40] = faint[60:80, 60:80] = True
    answer = Image.blend(image, task.draw(image, {"ball": faint}), 0.6)
    answer.paste(task.draw(image, {"ball": clear}).crop((0, 0, 50, 50)), (0, 0))
    assert iou(task.read(image, answer)["ball"].pixels[:50, :50], clear[:50, :50]) >= 0.95


@settings(max_examples=30)
@given(rng=SEEDS)
def test_box_and_run_lengths_agree_with_coco(rng):
    mask = Mask(blob(rng, 80, 60), 1.0)
    assert (coco.decode(mask.rle).astype(bool) == mask.pixels).all()
    left, top, width, height = coco.toBbox(mask.rle)
    assert mask.box == (left, top, left + width, top + height)
    assert np.asarray(Image.fromarray(mask.pixels).crop(mask.box)).sum() == mask.pixels.sum()


def drawn_by_coco(polygons, shape):
    if not polygons:
        return np.zeros(shape, bool)
    return coco.decode(coco.merge(coco.frPyObjects(polygons, *shape))).astype(bool)


@settings(max_examples=300)
@given(rng=st.integers(0, 2**32).map(np.random.default_rng), share=st.floats(0, 1), framed=st.booleans())
def test_polygons_give_the_mask_with_filled_holes_in_pycocotools(rng, share, framed):
    pixels = rng.random(rng.integers(1, 24, 2)) < share
    if framed:
        pixels[[0, -1]] = pixels[:, [0, -1]] = True
    # A hole that touches the outside at a corner is not filled, because mask pixels that touch there are not
    # connected.
    filled = binary_fill_holes(pixels, np.ones((3, 3)))
    assert (drawn_by_coco(Mask(pixels, 1.0).polygons, pixels.shape) == filled).all()


def test_a_hole_with_a_longer_outline_than_the_object_is_filled():
    pixels = np.ones((40, 50), bool)
    pixels[2:-2:2, 2:-2] = False
    pixels[2:-2, 4] = False
    (polygon,) = Mask(pixels, 1.0).polygons
    assert drawn_by_coco([polygon], pixels.shape).all()


def test_each_part_has_a_polygon():
    pixels = np.zeros((20, 30), bool)
    pixels[4, 7] = pixels[10:12, 3:6] = True
    assert len(Mask(pixels, 1.0).polygons) == 2


def test_the_polygon_of_a_pixel_is_an_octagon_around_it():
    pixels = np.zeros((5, 6), bool)
    pixels[2, 3] = True
    (polygon,) = Mask(pixels, 1.0).polygons
    points = np.reshape(polygon, (-1, 2))
    assert len(points) == 8 and len({tuple(point) for point in points}) == 8
    assert (points.min(0), points.max(0)) == (pytest.approx([3, 2]), pytest.approx([4, 3]))


def test_a_pixel_that_is_half_covered_is_not_in_the_mask():
    assert Mask.from_margin(np.array([[0.0, 0.5]])).pixels.tolist() == [[False, True]]


def test_a_mask_of_another_type_or_size_raises_an_error():
    image, task = Image.new("RGB", (30, 20)), Segmentation({"cat": "red"})
    with pytest.raises(ValueError, match="`mask` must be of type bool and shape .20, 30.; it is of uint8"):
        task.draw(image, {"cat": np.ones((20, 30), np.uint8)})
    with pytest.raises(ValueError, match="it is of bool and .30, 20."):
        task.draw(image, {"cat": np.ones((30, 20), bool)})


def test_the_last_of_overlapping_masks_is_painted():
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    masks = {"person": np.ones((4, 4), bool), "shirt": np.eye(4, dtype=bool)}
    task = Segmentation({"person": "red", "shirt": "blue"})
    drawn = task.draw(image, masks)
    assert {drawn.getpixel((x, x)) for x in range(4)} == {(50, 50, 177)}
    assert (task.read(image, drawn)["person"].pixels == ~np.eye(4, dtype=bool)).all()


def test_an_empty_annotation_raises_an_error():
    with pytest.raises(EmptyAnnotation, match="`masks`"):
        Segmentation.from_annotation(Image.new("RGB", (8, 8)), {}, random.Random(0))


def test_from_annotation_selects_a_fifth_of_absent_objects_and_visible_colors():
    image = Image.new("RGB", (32, 32), (250, 5, 5))
    masks = {"cat": np.ones((32, 32), bool), "dog": np.zeros((32, 32), bool), "cow": np.zeros((32, 32), bool)}
    picks = [Segmentation.from_annotation(image, masks, random.Random(seed)) for seed in range(2000)]
    absent = sum("cat" not in pick.colors for pick in picks) / len(picks)
    assert absent == pytest.approx(0.2, abs=0.03)
    colors = {pick.colors["cat"] for pick in picks if "cat" in pick.colors}
    assert colors == set(MASK_COLORS) - {"red"}


@pytest.mark.parametrize(
    "colors",
    [
        {}, {"cat": "pink"}, {"cat": "red", "dog": "red"}, {"": "red"}, "cat", None,
        {" ": "red"}, {3: "red"}, {"cat": ["red"]}, {"cat": None}, {"cat": "red", " ": "blue"},
    ],
)  # fmt: skip
def test_invalid_colors_raise_errors(colors):
    with pytest.raises(ValueError, match="`colors` must map .* got"):
        Segmentation(colors)


def test_a_box_outside_the_image_raises_an_error():
    with pytest.raises(ValueError, match="`box` must lie inside the 32 x 32"):
        Segmentation({"cat": "red"}).read(Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32)), (0, 0, 33, 32))


def test_all_wordings_contain_object_and_color():
    task = Segmentation({"two dogs on the left": "purple"})
    wordings = {task.instruction(random.Random(seed)) for seed in range(500)}
    assert len(wordings) == 22
    assert all("two dogs on the left" in wording and "purple" in wording for wording in wordings)
    assert "show me two dogs on the left in purple" in wordings
    several = {Segmentation({"cat": "red", "dogs": "blue"}).instruction(random.Random(seed)) for seed in range(200)}
    assert "mark the cat in red and the dogs in blue" in several and len(several) == 10


def test_overlay_shows_the_mask_on_the_input():
    image = Image.new("RGB", (40, 40), (10, 200, 10))
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    shown = np.asarray(Segmentation({"ball": "red"}).overlay(image, {"ball": Mask(mask, 1.0)}))
    assert (shown[~mask] == (10, 200, 10)).all() and (shown[15:25, 15:25] == (157, 80, 4)).all()
    assert (shown[10, 10:30] == (0, 255, 255)).all()  # the outline


@pytest.mark.parametrize("color", MASK_COLORS)
def test_the_outline_has_the_complementary_color_without_corner_pixels(color):
    pixels = np.zeros((9, 9), bool)
    pixels[2:7, 2:7] = True
    pixels[2, 2] = False
    gray = Image.new("RGB", (9, 9), (128, 128, 128))
    shown = np.asarray(Segmentation({"cat": color}).overlay(gray, {"cat": Mask(pixels, 1.0)}))
    outline = (shown == 255 - np.array(MASK_COLORS[color])).all(2)
    assert outline[2, 3] and outline[3, 2] and outline[6, 6]
    assert not outline[3, 3] and outline.sum() == 15


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (20, 31)])
def test_the_outline_is_the_inner_boundary_of_scikit_image(size):
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        mask = rng.random(size) < share
        assert np.array_equal(outline(mask), find_boundaries(mask, connectivity=1, mode="inner"))


def test_without_a_random_generator_the_first_wording_is_used():
    assert Segmentation({"cat": "blue"}).instruction() == "mark the cat in blue"
