"""The page, served on this machine and asked through its own API as a browser would."""

import app
import edit
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from instructdiffusion_pipeline import LearnedReading, Segmentation, ask, load_presets

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 1.0, "image_guidance_scale": 0.5}


@pytest.fixture(scope="module")
def model():
    pipeline = edit.load(str(edit.TINY_MODEL))
    return pipeline, load_presets(edit.TINY_MODEL), LearnedReading.beside(edit.TINY_MODEL)


@pytest.fixture(scope="module")
def client(model):
    page = app.build(*model)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False)
    page.close()


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photograph.png"
    app.overlaid(app.data.coffee(), "sunflower", (10, 10)).save(path)
    return path


def put(client, family, photograph, asked):
    return client.predict(
        handle_file(photograph) if photograph else None, asked, 1, *SETTINGS.values(), api_name=f"/{family}"
    )


def test_a_mask_is_the_one_that_ask_gives(client, model, photograph):
    words, answer, overlay, found = put(client, "segmentation", photograph, "sunflower")
    task = Segmentation({"sunflower": next(iter(app.MASK_COLORS))})
    pipeline, _, reading = model
    generator = torch.Generator().manual_seed(1)
    expected = ask(pipeline, Image.open(photograph), task, reading=reading, generator=generator, **SETTINGS)
    assert words == task.instruction()
    np.testing.assert_array_equal(Image.open(answer), expected.picture)
    np.testing.assert_array_equal(Image.open(overlay), expected.overlay)
    mask = expected.data["sunflower"]
    assert found == {
        "sunflower": {
            "box": list(mask.box),
            "area": mask.pixels.sum(),
            "confidence": pytest.approx(mask.confidence),
        }
    }


def test_joints_are_places_or_nothing(client, photograph):
    *_, found = put(client, "keypoints", photograph, ["nose", "left wrist"])
    assert found.keys() == {"nose", "left wrist"}
    for joint in found.values():
        assert joint is None or (-20 < joint["x"] < 276 and -20 < joint["y"] < 276)


@pytest.mark.parametrize(("family", "asked"), [("restoration", "blur"), ("editing", "make it night")])
def test_a_picture_comes_back_in_its_own_size(client, photograph, family, asked):
    _, answer, _, found = put(client, family, photograph, asked)
    assert Image.open(answer).size == Image.open(photograph).size and found is None


@pytest.mark.parametrize(
    ("family", "asked", "told"),
    [
        ("keypoints", [], "`colors` must map at least one name"),
        ("segmentation", "cat, ", "`colors` must map at least one name"),
        ("segmentation", ", ".join(map(str, range(20))), "got 20"),
        ("editing", " ", "must say what to edit"),
    ],
)
def test_a_bad_question_is_told(client, photograph, family, asked, told):
    with pytest.raises(AppError, match=told):
        put(client, family, photograph, asked)


def test_a_missing_picture_is_told(client):
    with pytest.raises(AppError, match="There is no picture"):
        put(client, "restoration", None, "noise")


def test_a_model_s_own_settings_are_where_the_sliders_start(model):
    sliders = [part.value for part in app.build(*model).blocks.values() if isinstance(part, app.gr.Slider)]
    families = [model[1][family] for family in ("segmentation", "keypoints", "restoration", "editing")]
    assert sliders == [value for family in families for value in family.values()]
