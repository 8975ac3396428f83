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
    is_lone,
    new_regions,
    segment_slices,
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


@pytest.mark.parametrize("fraction", [0.1, 0.12, 0.5, 0.56, 0.9])
def test_slices_of_small_images_have_pixels_and_none_is_too_elongated(fraction):
    sizes = [(width, height) for width in range(1, 31) for height in range(1, 31)]
    for size in [size for size in sizes if max(size) <= 4 * min(size)]:
        seen = np.zeros(size[::-1], int)
        for left, top, right, bottom in slice_boxes(size, fraction):
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert max(right - left, bottom - top) <= 4 * min(right - left, bottom - top)
            seen[top:bottom, left:right] += 1
        assert seen.all(), size


@pytest.mark.parametrize("size, fraction", [((1, 1), 0.5), ((3, 2), 0.3), ((19, 5), 0.9), ((5, 19), 0.9)])
def test_small_images_are_segmented_with_slices(pipe, size, fraction):
    """Without a limit, slices of the last two would be of 17 x 4 pixels: more elongated than the pipeline accepts."""
    answer = ask(pipe, tiny.picture(*size), Segmentation({"cat": "red"}), slices=fraction, num_inference_steps=1)
    assert answer.data["cat"].pixels.shape == size[::-1]


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
    beside, wide, tall = regions
    assert beside[10:40, 10:40].sum() == beside.sum() and wide.sum() == 800 and tall.sum() == 450
    assert only[250, 150] and not any(region[250, 150] for region in regions), "too small"
    assert not only[10:40, 30:40].any() and not (only & ~pixels).any() and only[10:40, 10:24].all()
    assert wide[100:120, 100:140].all() and not wide[:100].any()
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


@pytest.mark.parametrize("marks", [3, 2, 1, 0])
def test_the_crops_that_show_an_object_are_counted(marks):
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
    confirmed, margin = confirm_region(region, "ball", crops, None)
    found = Mask.from_margin(margin).pixels
    assert confirmed == marks and (marks < 2 or (found & ball).sum() / (found | ball).sum() > 0.9)
    flagged = [(view, response._replace(flag=True)) for view, response in crops]
    confirmed, margin = confirm_region(region, "ball", flagged, None)
    assert confirmed == 0 and (margin == -0.5).all()


def test_with_slices_the_model_is_also_run_on_slices(pipe):
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
    with pytest.raises(ValueError, match="`resolution` must not be 0 with `slices`"):
        ask(pipe, tiny.picture(), Segmentation({"cat": "red"}), slices=0.56, resolution=0)


def view_of(task, image, offset=(0, 0)):
    return View(0, task, "", image, offset)


def drawn(view, mask):
    """An output that paints `mask`, a mask of the whole image, in a view."""
    return Response(view.task.draw(view.image, {"ball": mask[window_of(view)]}), None, (0, 0, *view.image.size), False)


def disc(x, y, radius=6, side=100):
    rows, columns = np.mgrid[:side, :side]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def test_a_region_that_only_slices_mark_is_kept_if_its_crops_mark_it_too():
    """Outputs are drawn. Slices mark two discs, and crops only the first one."""
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    there, ghost, sizes = disc(25, 30), disc(75, 70), []

    def run(views):
        sizes.extend(view.image.size for view in views)
        return [drawn(view, there | ghost if view.image.size == (56, 56) else there) for view in views]

    nothing = {"ball": np.full((100, 100), -0.5)}
    margins, flag = segment_slices(run, [view_of(task, image)], nothing, 0.56, None)
    found = masks_from_margins(margins)["ball"].pixels
    assert not flag and (found & there).sum() / (found | there).sum() > 0.9
    # Each disc has a width of 13 pixels: nine slices, and three crops around each disc.
    crops = [(round(13 / fraction),) * 2 for fraction in (0.3, 0.45, 0.6)]
    assert sizes == [(56, 56)] * 9 + crops * 2


@pytest.mark.parametrize("marking", [0, 1, 2, 3])
def test_a_region_that_only_slices_mark_needs_all_three_crops(marking):
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, nothing = disc(25, 30), np.zeros((100, 100), bool)

    def run(views):
        shown = [len(views) != 3 or number < marking for number in range(len(views))]
        return [drawn(view, ball if show else nothing) for view, show in zip(views, shown, strict=True)]

    margins, _ = segment_slices(run, [view_of(task, image)], {"ball": np.full((100, 100), -0.5)}, 0.56, None)
    assert masks_from_margins(margins)["ball"].pixels.any() == (marking == 3)


def test_all_of_six_objects_that_only_slices_show_are_kept():
    image, task = Image.new("RGB", (200, 200), (90, 90, 90)), Segmentation({"balls": "red"})
    balls = np.logical_or.reduce([disc(x, y, 9, 200) for x in (40, 100, 160) for y in (50, 150)])

    def run(views):
        masks = [{"balls": balls[window_of(view)]} for view in views]
        return [
            Response(task.draw(view.image, mask), None, (0, 0, *view.image.size), False)
            for view, mask in zip(views, masks, strict=True)
        ]

    margins, _ = segment_slices(run, [view_of(task, image)], {"balls": np.full((200, 200), -0.5)}, 0.56, None)
    found = masks_from_margins(margins)["balls"].pixels
    assert all(found[y, x] for x in (40, 100, 160) for y in (50, 150))
    assert (found & balls).sum() / (found | balls).sum() > 0.9


@pytest.mark.parametrize("fraction, kept", [(0.2, False), (0.4, True)])
def test_a_crop_confirms_a_region_if_it_marks_enough_of_it(fraction, kept):
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    region, part = np.zeros((2, 100, 100), bool)
    region[40:60, 40:60] = part[40:60, 40 : 40 + round(20 * fraction)] = True
    views = [crop_view(view_of(task, image), close_up(region, share)) for share in (0.3, 0.45, 0.6)]
    crops = [(view, drawn(view, part)) for view in views]
    assert confirm_region(region, "ball", crops, None)[0] == 3 * kept


def test_a_confirmed_region_has_the_pixels_that_most_crops_mark():
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, beside = disc(50, 50), disc(50, 62, 3)
    views = [crop_view(view_of(task, image), close_up(ball, 0.3))] * 3
    crops = [(view, drawn(view, ball | beside if number == 0 else ball)) for number, view in enumerate(views)]
    confirmed, margin = confirm_region(ball, "ball", crops, None)
    found = margin > 0
    assert confirmed == 3
    assert (found & ball).sum() > 0.95 * ball.sum() and not (found & beside & ~ball).any()


@pytest.mark.parametrize("marking, kept", [(0, False), (1, False), (2, True), (3, True)])
def test_an_object_that_only_the_whole_image_shows_is_kept_if_most_of_its_crops_show_it(marking, kept):
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, calls = disc(50, 50), []

    def run(views):
        calls.append(len(views))
        # The crops are run together, after the slices.
        shown = [len(views) == 3 and number < marking for number in range(len(views))]
        return [drawn(view, ball if show else np.zeros_like(ball)) for view, show in zip(views, shown, strict=True)]

    margins, _ = segment_slices(run, [view_of(task, image)], {"ball": np.where(ball, 0.5, -0.5)}, 0.56, None)
    found = masks_from_margins(margins)["ball"].pixels
    assert calls == [8, 1, 3] and np.array_equal(found, ball & kept)


def test_an_object_that_slices_show_too_needs_no_confirmation():
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, part, calls = disc(50, 50, 12), disc(50, 50, 4), []

    def run(views):
        calls.append(len(views))
        return [drawn(view, part) for view in views]

    margins, _ = segment_slices(run, [view_of(task, image)], {"ball": np.where(ball, 0.5, -0.5)}, 0.56, None)
    assert calls == [8, 1] and np.array_equal(masks_from_margins(margins)["ball"].pixels, ball)


@pytest.mark.parametrize("extent, kept", [(26, True), (24, False)])
def test_a_large_object_that_only_the_whole_image_shows_needs_no_confirmation(extent, kept):
    image, task = Image.new("RGB", (200, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    found = np.zeros((100, 200), bool)
    found[40:50, 20 : 20 + extent] = True
    margins, _ = segment_slices(
        lambda views: [drawn(view, np.zeros_like(found)) for view in views],
        [view_of(task, image)],
        {"ball": np.where(found, 0.5, -0.5)},
        0.56,
        None,
    )
    assert np.array_equal(masks_from_margins(margins)["ball"].pixels, found & kept)


def test_the_safety_checker_is_reported_for_crops():
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball = disc(50, 50)

    def run(views):
        return [drawn(view, ball)._replace(flag=len(views) == 3) for view in views]

    for margin, flag in ((np.where(ball, 0.5, -0.5), False), (np.full((100, 100), -0.5), True)):
        assert segment_slices(run, [view_of(task, image)], {"ball": margin}, 0.56, None)[1] == flag


def test_a_mask_is_lone_if_it_is_small_and_the_others_confirm_no_part_of_it():
    pixels, others = np.zeros((2, 300, 200), bool)
    assert not is_lone(pixels, others)
    pixels[100:120, 100:110] = pixels[100:120, 140:150] = True
    others[30:80, 39:60] = True
    assert is_lone(pixels, others), "its two parts take up 50 of 200 pixels"
    others[119:130, 149:160] = True
    assert not is_lone(pixels, others)
    others[:], pixels[110, 150] = False, True
    assert not is_lone(pixels, others)


@pytest.mark.parametrize("marking, views, kept", [(1, 2, True), (1, 3, False), (2, 3, True)])
def test_half_of_the_slices_decide(marking, views, kept):
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, view = disc(50, 50), view_of(task, image)
    sliced = [(view, drawn(view, ball if number < marking else np.zeros_like(ball))) for number in range(views)]
    margins = combine_slices({"ball": np.full((100, 100), -0.5)}, sliced, None)
    assert masks_from_margins(margins)["ball"].pixels.any() == kept


def test_a_slice_that_cuts_the_image_near_a_pixel_is_outvoted_by_one_that_does_not():
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, whole = disc(50, 50, radius=4), view_of(task, image)
    cut = view_of(task, image.crop((0, 0, 56, 100)))  # ends two pixels beside the disc
    for marking, kept in ((whole, True), (cut, False)):
        sliced = [(view, drawn(view, ball if view is marking else np.zeros_like(ball))) for view in (whole, cut)]
        margins = combine_slices({"ball": np.full((100, 100), -0.5)}, sliced, None)
        assert masks_from_margins(margins)["ball"].pixels.any() == kept


def test_a_faint_output_for_the_whole_image_does_not_become_a_mask_with_slices():
    image, task = Image.new("RGB", (100, 100), (90, 90, 90)), Segmentation({"ball": "red"})
    ball, view = disc(30, 30), view_of(task, image)
    faint = {"ball": np.where(disc(70, 70), 0.05, -0.5)}
    assert not masks_from_margins(faint)["ball"].pixels.any()
    margins, _ = segment_slices(lambda views: [drawn(view, ball) for view in views], [view], faint, 0.56, None)
    found = masks_from_margins(margins)["ball"].pixels
    assert found.any() and not (found & disc(70, 70)).any()


def test_small_regions_are_dropped():
    pixels = np.zeros((200, 200), bool)
    for number, side in enumerate((3, 20, 14, 26, 10)):
        pixels[10 : 10 + side, 40 * number : 40 * number + side] = True
    _, regions = new_regions(pixels, np.zeros_like(pixels))
    assert [region.sum() for region in regions] == [20**2, 14**2, 26**2, 10**2]
    small = np.zeros((200, 200), bool)
    small[10:13, 10:13] = True
    assert new_regions(small, np.zeros_like(small))[1] == []
