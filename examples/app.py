"""Gradio demo with one tab for each task family.

    pip install ".[app]"
    python examples/app.py --model path/to/model

It shows the output image, the masks or joints, and an overlay. The server listens on localhost only.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image, ImageOps

from instructdiffusion_pipeline import (
    COCO_JOINTS,
    KEYPOINT_COLORS,
    MASK_COLORS,
    Editing,
    InstructDiffusionPipeline,
    Joint,
    Keypoints,
    Mask,
    Restoration,
    Segmentation,
    ask,
    upright_rgb,
)
from instructdiffusion_pipeline.cli import load_pipeline, run_script, split_names
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import assign_colors
from instructdiffusion_pipeline.tasks.keypoints import MAX_JOINTS
from instructdiffusion_pipeline.tasks.restoration import Degradation

try:
    import gradio as gr
except ModuleNotFoundError:
    gr = None  # --help works without it

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
SUNFLOWER = Path(__file__).parent / "demo" / "sunflower.png"

MakeTask = Callable[[Image.Image, Any], Task]
Outputs = tuple[str, Image.Image, Image.Image, dict[str, Any] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    args = parser.parse_args()
    if gr is None:
        sys.exit('error: gradio is not installed; `pip install ".[app]"` installs it.')
    build(load_pipeline(args.model)).launch(prevent_thread_lock=True)
    threading.Event().wait()  # until Ctrl-C


def build(pipe: InstructDiffusionPipeline) -> gr.Blocks:
    """The page. Each tab is an endpoint of the page's API, named after its task family."""
    with gr.Blocks(title="InstructDiffusion", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column():
                picture = gr.Image(example_picture(), type="pil", image_mode=None, format="png", label="picture")
                seed = gr.Number(0, label="seed", precision=0)
                tabs = gr.Tabs()
            with gr.Column():
                instruction = gr.Textbox(label="instruction")
                answer = gr.Image(label="output image", format="png")
                overlay = gr.Image(label="overlay", format="png")
                data = gr.JSON(label="data")
        with tabs:
            for task_class, make_task, component in questions():
                family = task_class.family
                with gr.Tab(family):
                    asked = component()
                    settings = {**task_class.settings, **pipe.config.task_settings.get(family, {})}
                    sliders = [
                        gr.Slider(1, 100, settings["num_inference_steps"], step=1, label="steps"),
                        gr.Slider(0, 15, settings["guidance_scale"], step=0.1, label="guidance scale"),
                        gr.Slider(0, 5, settings["image_guidance_scale"], step=0.05, label="image guidance scale"),
                    ]
                    gr.Button("Run", variant="primary").click(
                        answer_with(pipe, make_task),
                        [picture, asked, seed, *sliders],
                        [instruction, answer, overlay, data],
                        api_name=family,
                        concurrency_id="model",  # a pipeline's scheduler serves one call at a time
                    )
    return page


def example_picture() -> Image.Image:
    """A photograph with a sunflower emoji on it, one of the objects that `instructdiffusion-tiny` was trained on."""
    from skimage import data

    image, sunflower = ImageOps.fit(Image.fromarray(data.chelsea()), (256, 256)), Image.open(SUNFLOWER).convert("RGBA")
    image.paste(sunflower, (10, 10), sunflower)
    return image


def questions() -> list[tuple[type[Task], MakeTask, Callable[[], gr.components.Component]]]:
    """For each family: the task, how to make one from the picture and the user's input, and the input component."""
    return [
        (
            Segmentation,
            lambda picture, names: Segmentation(assign_colors(picture, split_names(names), MASK_COLORS)),
            lambda: gr.Textbox("sunflower", label="objects, separated by commas"),
        ),
        (
            Keypoints,
            lambda picture, names: Keypoints(assign_colors(picture, names, KEYPOINT_COLORS)),
            lambda: gr.Dropdown(
                list(COCO_JOINTS), value=["nose"], multiselect=True, max_choices=MAX_JOINTS, label="joints"
            ),
        ),
        (
            Restoration,
            lambda _, degradation: Restoration(degradation),
            lambda: gr.Radio(list(get_args(Degradation)), value="noise", label="remove"),
        ),
        (Editing, lambda _, text: Editing(text), lambda: gr.Textbox("make it night", label="instruction")),
    ]


def answer_with(pipe: InstructDiffusionPipeline, make_task: MakeTask) -> Callable[..., Outputs]:
    """The function behind the button of a tab."""

    def answer(
        picture: Image.Image | None,
        asked: Any,
        seed: int | None,
        steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - gradio looks for it here
    ) -> Outputs:
        if picture is None or seed is None:
            raise gr.Error("Select an image and enter an integer seed.")
        try:
            picture = upright_rgb(picture)
            task = make_task(picture, asked)
            result = ask(
                pipe,
                picture,
                task,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            )
        except ValueError as error:
            raise gr.Error(str(error)) from error
        if result.nsfw_content_detected:
            raise gr.Error("The safety checker flagged the output image and replaced it by a black image.")
        return task.instruction(), result.picture, result.overlay, as_json(result.data)

    return answer


def as_json(data: Image.Image | Mapping[str, Mask | Joint | None]) -> dict[str, Any] | None:
    """Joints as coordinates; masks as box, area and score; None for a picture."""
    if isinstance(data, Image.Image):
        return None
    return {
        name: {"box": reading.box, "area": int(reading.pixels.sum()), "score": reading.score}
        if isinstance(reading, Mask)
        else reading and reading._asdict()
        for name, reading in data.items()
    }


if __name__ == "__main__":
    run_script(main)
