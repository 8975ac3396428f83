"""The web page, served on this machine and called through its API as a browser would."""

import demo
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="`make test-app` runs these where gradio is installed")

import app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
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
def client(model):
    page = app.build(model)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


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
        (["left wrist", "right wrist"], Keypoints({"left wrist": "red", "right wrist": "green"})),
        ("blur", Restoration("blur")),
        ("make it night", Editing("make it night")),
    ],
)
def test_an_answer_is_the_one_that_ask_gives(client, model, photograph, asked, task):
    words, answer, overlay, found = put(client, task.family, photograph, asked)
    generator = torch.Generator().manual_seed(1)
    expected = ask(model, Image.open(photograph), task, generator=generator, **SETTINGS)
    assert words == task.instruction()
    np.testing.assert_array_equal(Image.open(answer), expected.picture)
    np.testing.assert_array_equal(Image.open(overlay), expected.overlay)
    if task.family == "segmentation":
        mask = expected.data["sunflower"]
        assert mask.pixels.any(), "or else this tells little"
        read = {"box": list(mask.box), "area": mask.pixels.sum(), "score": pytest.approx(mask.score)}
        assert found == {"sunflower": read}
    elif task.family == "keypoints":
        assert any(expected.data.values()), "or else this tells little"
        assert found == {
            name: joint and pytest.approx({"x": joint.x, "y": joint.y, "score": joint.score})
            for name, joint in expected.data.items()
        }
    else:
        assert found is None


def test_colours_that_show_on_the_picture_come_first():
    red = Image.new("RGB", (64, 64), (250, 10, 10))
    first, *_, last = app.assign_colors(
        red, [f"thing {i}" for i in range(len(app.MASK_COLORS))], app.MASK_COLORS
    ).values()
    assert first == "purple" and last == "red"


@pytest.mark.parametrize(
    ("family", "asked", "told"),
    [
        ("keypoints", [], "Enter 1 to 9 different names; got none"),
        ("segmentation", ", ", "Enter 1 to 8 different names; got none"),
        ("segmentation", "cat, cat", "Enter 1 to 8 different names; got cat, cat"),
        ("segmentation", ", ".join(map(str, range(9))), "Enter 1 to 8 different names; got 0, 1"),
        ("editing", " ", "must say what to edit"),
    ],
)
def test_a_bad_question_is_told(client, photograph, family, asked, told):
    with pytest.raises(AppError, match=told):
        put(client, family, photograph, asked)


def test_a_missing_picture_or_seed_is_told(client, photograph):
    for picture, seed in ((None, 1), (photograph, None)):
        with pytest.raises(AppError, match="Select an image and enter an integer seed"):
            put(client, "restoration", picture, "noise", seed)


def test_a_picture_of_sixteen_bits_is_not_blown_out(client, tmp_path):
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
    assert slider_values(model) == [value for settings in families for value in settings.values()]


def test_the_sliders_start_at_the_task_s_settings_where_the_model_has_none(model):
    pipe = InstructDiffusionPipeline(**model.components, task_settings={"keypoints": {"guidance_scale": 2.0}})
    paper = [100, 7.5, 1.5, 100, 2.0, 0.5, 100, 1.0, 1.0, 100, 5.0, 1.25]
    assert slider_values(pipe) == paper


def test_the_first_picture_is_the_demo_s():
    expected = demo.with_overlay(demo.square(data.chelsea(), 256), "sunflower", (10, 10))
    assert np.abs(np.asarray(app.example_picture(), int) - np.asarray(expected, int)).mean() < 2
