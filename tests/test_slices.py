"""Segmentation on slices of an image: where they are, and how their masks are combined."""

import numpy as np
import pytest
import tiny
from PIL import Image

from instructdiffusion_pipeline import Keypoints, Mask, Segmentation, ask
from instructdiffusion_pipeline.slices import (
    centrality,
    close_up,
    combine_slices,
    confirm_region,
    crop_view,
    new_regions,
    slice_boxes,
    window_of,
)
from instructdiffusion_pipeline.tasks.segmentation import masks_from_margins
from instructdiffusion_pipeline.views import Response, View, view_margins

FAST = {"num_inference_steps": 2}


@pytest.mark.parametrize("size", [(100, 60), (33, 47)])
def test_slices_cover_the_image(size):
    boxes = slice_boxes(size, 0.56)
    seen = np.zeros(size[::-1], int)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == tuple(round(0.56 * side) for side in size)
        seen[top:bottom, left:right] += 1
    assert len(boxes) == 9 and seen.min() == 1 and seen.max() == 9


@pytest.mark.parametrize("size, center", [((100, 100), (30, 30)), ((160, 100), (122, 74)), ((100, 160), (26, 122))])
def test_an_object_in_half_of_the_slices_is_found(size, center):
    """The answers are drawn: each view paints the disc where it sees all of it; the whole image paints nothing."""
    image, task = Image.new("RGB", size, (90, 90, 90)), Segmentation({"ball": "red"})
    y, x = np.mgrid[: size[1], : size[0]]
    ball = (x - center[0]) ** 2 + (y - center[1]) ** 2 <= 8**2
    whole = View(0, task, "", image, (0, 0)), Response(image, None, (0, 0, *size), False)
    sliced = []
    for left, top, right, bottom in slice_boxes(image.size, 0.56):
        crop, part = image.crop((left, top, right, bottom)), ball[top:bottom, left:right]
        answer = task.draw(crop, {"ball": part}) if part.sum() == ball.sum() else crop
        sliced.append((View(0, task, "", crop, (left, top)), Response(answer, None, (0, 0, *crop.size), False)))
    found = masks_from_margins(combine_slices(view_margins(*whole, None), sliced, None))["ball"]
    assert (found.pixels & ball).sum() / (found.pixels | ball).sum() > 0.9
    assert not masks_from_margins(combine_slices(view_margins(*whole, None), [], None))["ball"].pixels.any()


def test_a_slice_has_a_lower_weight_at_edges_inside_the_image():
    image, task = Image.new("RGB", (100, 80)), Segmentation({"ball": "red"})
    corner = centrality(View(0, task, "", image.crop((0, 0, 56, 44)), (0, 0)), image.size)
    assert corner.shape == (44, 56) and corner[0, 0] == corner[10, 10] == 1 and corner.min() == np.float32(0.1)
    assert corner[-1, 0] == corner[0, -1] == np.float32(0.1) and corner[43 - 10, 0] == pytest.approx(0.5)
    middle = centrality(View(0, task, "", image.crop((20, 20, 64, 64)), (20, 20)), image.size)
    assert np.array_equal(middle, middle.T) and np.array_equal(middle, middle[::-1, ::-1]) and middle[22, 22] == 1


def test_new_regions_are_connected_parts_not_next_to_the_known_mask():
    pixels, known = np.zeros((2, 300, 200), bool)
    pixels[10:40, 10:40] = pixels[100:120, 100:140] = pixels[200:290, 20:25] = pixels[250, 150] = True
    known[10:40, 30:60] = True
    only, regions = new_regions(pixels, known)
    assert regions[0].sum() == 800 and regions[1][10:40, 10:40].sum() == regions[1].sum() and regions[2].sum() == 450
    assert only[250, 150] and not any(region[250, 150] for region in regions), "too small"
    assert not only[10:40, 30:40].any() and not (only & ~pixels).any() and only[10:40, 10:24].all()
    assert regions[0][100:120, 100:140].all() and not regions[0][:100].any()
    nothing, none = new_regions(np.zeros((5, 5), bool), np.zeros((5, 5), bool))
    assert not nothing.any() and none == []


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("rows, columns", [((0, 10), (0, 20)), ((90, 100), (60, 80)), ((50, 60), (70, 90))])
def test_close_ups_are_squares_inside_the_image_around_the_region(rows, columns, share):
    region = np.zeros((100, 200), bool)
    region[slice(*rows), slice(*columns)] = True
    left, top, right, bottom = close_up(region, share)
    assert right - left == bottom - top == round(20 / share)
    assert left >= 0 and right <= 200 and top >= 0 and bottom <= 100
    assert top <= rows[0] and bottom >= rows[1] and left <= columns[0] and right >= columns[1]


def test_close_ups_have_a_minimum_size_and_fit_into_the_image():
    region = np.zeros((100, 200), bool)
    region[50, 100] = True
    left, top, right, bottom = close_up(region, 0.5)
    assert right - left == bottom - top == 15 and region[top:bottom, left:right].any()
    assert close_up(np.ones((100, 200), bool), 0.5) == (50, 0, 150, 100)


@pytest.mark.parametrize("marks, kept", [(3, True), (2, True), (1, False), (0, False)])
def test_crops_confirm_a_region_by_majority(marks, kept):
    """The outputs are drawn: `marks` of the three crops show the ball."""
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    y, x = np.mgrid[:100, :100]
    ball = (x - 30) ** 2 + (y - 40) ** 2 <= 8**2
    region = (x > 24) & (x < 38) & (y > 34) & (y < 46)
    crops = []
    for number, share in enumerate((0.3, 0.45, 0.6)):
        view = crop_view(View(0, task, "", image, (0, 0)), close_up(region, share))
        shown = task.draw(view.image, {"ball": ball[window_of(view)]}) if number < marks else view.image
        crops.append((view, Response(shown, None, (0, 0, *view.image.size), False)))
    assert [view.image.size for view, _ in crops] == [(43, 43), (29, 29), (22, 22)]
    margin = np.full((100, 100), -0.5)
    found = Mask.from_margin(confirm_region(margin, "ball", region, crops, None)).pixels
    assert found.any() == kept and (not kept or (found & ball).sum() / (found | ball).sum() > 0.9)
    flagged = [(view, response._replace(flag=True)) for view, response in crops]
    assert np.array_equal(confirm_region(margin, "ball", region, flagged, None), margin)


def test_with_slices_the_model_is_also_run_on_slices_and_crops(pipe):
    calls = []
    answer = ask(
        pipe, tiny.picture(), Segmentation({"cat": "red"}), slices=0.56, generator=tiny.generator(),
        callback_on_step_end=lambda pipe, step, t, tensors: calls.append(len(tensors["latents"])) or {}, **FAST
    )  # fmt: skip
    assert calls == [1, 1, 8, 8, 1, 1] and answer.data["cat"].pixels.shape == (32, 32)
    for slices, task, message in (
        (1.0, Segmentation({"cat": "red"}), "0.1 to below 1; got 1.0"),
        (0.5, Keypoints({"nose": "blue"}), "must be None for tasks other than segmentation; got keypoints"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(pipe, tiny.picture(), task, slices=slices)
