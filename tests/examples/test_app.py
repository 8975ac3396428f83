"""The web page on a local server, called through its API and used in a browser.

The tests in a browser need Chromium or Chrome, and are skipped without one.
"""

import json
import shutil

import demo
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="`make test-app` runs these where gradio is installed")

import app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import expect, sync_playwright
from skimage import data

from instructdiffusion_pipeline import (
    Editing,
    InstructDiffusionPipeline,
    Keypoints,
    Restoration,
    Segmentation,
    ask,
)
from instructdiffusion_pipeline.cli import load_pipeline

SETTINGS = {"num_inference_steps": 6, "guidance_scale": 1.0, "image_guidance_scale": 0.5}


@pytest.fixture(scope="module")
def model():
    return load_pipeline(app.TINY_MODEL)


@pytest.fixture(scope="module")
def url(model):
    page = app.build(model)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not found:
        pytest.skip("needs Chromium or Chrome")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox


@pytest.fixture
def visit(browser, url):
    """Opens the page as another user, on the tab of a family."""
    contexts = []

    def open_tab(family):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.goto(url)
        page.get_by_role("tab", name=family).click()
        return page

    yield open_tab
    for context in contexts:
        context.close()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def set_steps(page, steps):
    field = page.get_by_label("number input for steps").filter(visible=True)
    if not field.is_visible():
        press(page, "settings ▼")
    page.wait_for_timeout(1000)  # the page resets the first value after it opens the settings
    field.fill(str(steps))
    field.blur()
    expect(page.get_by_label("range slider for steps").filter(visible=True)).to_have_value(str(steps))


def downloads(page):
    """Download the files of an output: name -> path."""
    found = {}
    for link in page.locator("a[download]").filter(visible=True, has_text=".").all():
        with page.expect_download() as download:
            link.click()
        found[download.value.suggested_filename] = download.value.path()
    return found


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A sunflower and a figure over the same photograph."""
    path = tmp_path_factory.mktemp("pictures") / "photograph.png"
    image = demo.with_overlay(demo.square(data.rocket(), 256), "figure", (0, 0))
    demo.with_overlay(image, "sunflower", (0, 120)).save(path)
    return path


def put(client, family, photograph, asked, seed=1):
    picture = handle_file(photograph) if photograph else None
    return client.predict(picture, asked, seed, *SETTINGS.values(), api_name=f"/{family}")


@pytest.mark.parametrize(
    ("asked", "task"),
    [
        ("sunflower, ", Segmentation({"sunflower": "red"})),
        ("sunflower, cat", Segmentation({"sunflower": "red", "cat": "purple"})),
        (["left wrist", "right wrist"], Keypoints({"left wrist": "red", "right wrist": "green"})),
        ("blur", Restoration("blur")),
        ("make it night", Editing("make it night")),
    ],
)
def test_an_output_is_that_of_ask(client, model, photograph, asked, task):
    words, answer, overlay, found, files = put(client, task.family, photograph, asked)
    generator = torch.Generator().manual_seed(1)
    expected = ask(model, Image.open(photograph), task, generator=generator, **SETTINGS)
    assert words == expected.instruction
    np.testing.assert_array_equal(Image.open(answer), expected.picture)
    np.testing.assert_array_equal(Image.open(overlay), expected.overlay)
    if task.family == "segmentation":
        assert expected.data["sunflower"].pixels.any(), "or else this tells little"
        assert found == {
            name: {
                "box": mask.box and list(mask.box),
                "area": mask.pixels.sum(),
                "score": pytest.approx(mask.score),
            }
            for name, mask in expected.data.items()
        }
    elif task.family == "keypoints":
        assert any(expected.data.values()), "or else this tells little"
        assert found == {
            name: joint and pytest.approx({"x": joint.x, "y": joint.y, "score": joint.score})
            for name, joint in expected.data.items()
        }
    else:
        assert found is None
        (file,) = files
        np.testing.assert_array_equal(Image.open(file), expected.data)


def test_visible_colors_are_preferred():
    red = Image.new("RGB", (64, 64), (250, 10, 10))
    first, *_, last = app.assign_colors(
        red, [f"thing {i}" for i in range(len(app.MASK_COLORS))], app.MASK_COLORS
    ).values()
    assert first == "purple" and last == "red"


@pytest.mark.parametrize(
    ("family", "asked", "told"),
    [
        ("keypoints", [], "must be 1 to 9 different names; got none"),
        ("segmentation", ", ", "must be 1 to 8 different names; got none"),
        ("segmentation", "cat, cat", "must be 1 to 8 different names; got cat, cat"),
        ("segmentation", ", ".join(map(str, range(9))), "must be 1 to 8 different names; got 0, 1"),
        ("editing", " ", "must say what to edit"),
    ],
)
def test_an_invalid_request_shows_an_error(client, photograph, family, asked, told):
    with pytest.raises(AppError, match=told):
        put(client, family, photograph, asked)


def test_a_missing_image_or_seed_shows_an_error(client, photograph):
    for picture, seed in ((None, 1), (photograph, None)):
        with pytest.raises(AppError, match="Select an image and enter an integer seed"):
            put(client, "restoration", picture, "noise", seed)


def test_a_16_bit_image_is_not_overexposed(client, tmp_path):
    gray = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    _, answer, *_ = put(client, "restoration", tmp_path / "deep.png", "noise")
    assert 90 < np.asarray(Image.open(answer)).mean() < 165


def slider_values(pipe):
    """The values at which the sliders start, tab by tab."""
    page = app.build(pipe)
    return [part.value for part in page.blocks.values() if isinstance(part, app.gr.Slider)]


def test_the_sliders_start_at_the_model_s_own_settings(model):
    own = model.config.task_settings
    families = [own[family] for family in ("segmentation", "keypoints", "restoration", "editing")]
    names = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
    assert slider_values(model) == [settings[name] for settings in families for name in names]


def test_the_sliders_start_at_the_task_s_settings_if_the_model_has_none(model):
    pipe = InstructDiffusionPipeline(**model.components, task_settings={"keypoints": {"guidance_scale": 2.0}})
    paper = [100, 7.5, 1.5, 100, 2.0, 0.5, 100, 1.0, 1.0, 100, 5.0, 1.25]
    assert slider_values(pipe) == paper


def test_the_examples_are_the_images_of_the_demo():
    pictures = app.example_pictures()
    sunflower = demo.with_overlay(demo.square(data.chelsea(), 256), "sunflower", (10, 10))
    figure = demo.with_overlay(demo.square(data.rocket(), 256), "figure", (0, 0))
    np.testing.assert_array_equal(pictures["sunflower"], sunflower)
    np.testing.assert_array_equal(pictures["figure"], figure)


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "task"),
    [
        ("sunflower", Segmentation({"sunflower": "red"})),
        ("figure", Keypoints({"left wrist": "red", "right wrist": "green", "left knee": "blue"})),
        ("noise", Restoration("noise")),
        ("coffee", Editing("make it night")),
    ],
    ids=lambda value: getattr(value, "family", None),
)
def test_an_example_is_processed_and_its_files_are_downloaded(visit, model, picture, task):
    page = visit(task.family)
    shown = page.locator("img[src*='/file=']").first
    before = shown.get_attribute("src")
    page.locator("table tbody tr").filter(visible=True).first.click()
    if picture != "sunflower":  # the first image of the page
        expect(shown).not_to_have_attribute("src", before)
    press(page, "Run")
    expect(page.get_by_label("instruction").last).to_have_value(task.instruction())
    files = downloads(page)
    expected = ask(model, app.example_pictures()[picture], task, generator=torch.Generator().manual_seed(0))
    if task.family in ("restoration", "editing"):
        np.testing.assert_array_equal(Image.open(files.pop("answer.png")), expected.data)
    else:
        assert json.loads(files.pop("answer.json").read_text()).keys() == expected.data.keys()
    if task.family == "segmentation":
        assert expected.data["sunflower"].pixels.any(), "or else this tells little"
        np.testing.assert_array_equal(Image.open(files.pop("mask-1.png")), expected.data["sunflower"].pixels)
    assert not files


@pytest.mark.parametrize(
    ("name", "told"),
    [("broken.png", "The file is not an image, or is too large."), ("notes.txt", "Invalid file type: notes.txt")],
)
def test_a_file_that_is_not_an_image_shows_an_error(visit, tmp_path, name, told):
    (tmp_path / name).write_bytes(b"no picture")
    page = visit("restoration")
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / name)
    expect(page.get_by_test_id("toast-body")).to_contain_text(told)
    expect(page.get_by_text("Drop Image Here").first).to_be_visible()


def test_two_users_at_once_get_their_own_outputs(visit, model):
    pages = {Restoration("noise"): visit("restoration"), Editing("make it night"): visit("editing")}
    for page in pages.values():
        press(page, "Run")
    for task, page in pages.items():
        expect(page.get_by_label("instruction").last).to_have_value(task.instruction())
    for task, page in pages.items():
        picture = app.example_pictures()["sunflower"]
        expected = ask(model, picture, task, generator=torch.Generator().manual_seed(0))
        np.testing.assert_array_equal(Image.open(downloads(page)["answer.png"]), expected.data)


def test_cancel_stops_the_running_and_the_waiting_request(visit, model):
    calls = []
    hook = model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = visit("segmentation"), visit("editing")
    for page in (first, second):
        set_steps(page, 100)
        press(page, "Run")
        expect(page.get_by_text("/100 steps" if page is first else "queue").first).to_be_visible()
    press(second, "Cancel")
    press(first, "Cancel")
    expect(first.get_by_text("/100 steps")).to_have_count(0)
    first.wait_for_timeout(1000)
    stopped = len(calls)
    first.wait_for_timeout(2000)
    assert stopped == len(calls) < 100
    hook.remove()

    # The output of another tab still arrives after its page cancels a waiting request.
    set_steps(first, 100)
    press(first, "Run")
    expect(first.get_by_text("/100 steps").first).to_be_visible()
    first.get_by_role("tab", name="editing").click()
    # The page shows the progress of the running request, so the queue is used to see that the second one waits.
    with first.expect_response("**/queue/join*") as joined:
        press(first, "Run")
    assert joined.value.ok
    press(first, "Cancel")
    expect(first.get_by_label("instruction").last).to_have_value("mark the sunflower in red")

    set_steps(second, 1)
    press(second, "Run")
    expect(second.get_by_label("instruction").last).to_have_value("make it night")
    expect(first.get_by_label("instruction").last).to_have_value("mark the sunflower in red")
