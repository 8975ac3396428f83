"""Gradio demo with one tab for each task family.

    pip install ".[app]"
    python examples/app.py --model path/to/model

It shows the output image, the masks or joints, and an overlay, and offers the data as files. Several users can use it
at once; the model processes one request after the other. The server listens on localhost only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from instructdiffusion_pipeline import (
    COCO_JOINTS,
    KEYPOINT_COLORS,
    MASK_COLORS,
    Answer,
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
from instructdiffusion_pipeline.ask import settings_of
from instructdiffusion_pipeline.cli import UsageError, load_pipeline, open_image, run_script, split_names
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import assign_colors
from instructdiffusion_pipeline.tasks.keypoints import MAX_JOINTS
from instructdiffusion_pipeline.tasks.restoration import Degradation, add_noise

try:
    import gradio as gr
except ModuleNotFoundError:
    gr = None  # because --help works without gradio

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
DRAWINGS = Path(__file__).parent / "demo"

Outputs = tuple[str, Image.Image, Image.Image, dict[str, Any] | None, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub id (default: examples/instructdiffusion-tiny)"
    )
    args = parser.parse_args()
    if gr is None:
        sys.exit('error: gradio is not installed; `pip install ".[app]"` installs it.')
    build(load_pipeline(args.model)).launch(prevent_thread_lock=True)
    threading.Event().wait()  # run until Ctrl-C


def build(pipe: InstructDiffusionPipeline) -> gr.Blocks:
    """Build the page. Each tab is an endpoint of the page's API, named after its task family."""
    model, pictures = Model(pipe), example_pictures()
    downloads = tempfile.TemporaryDirectory()  # deleted when the server ends
    with gr.Blocks(title="InstructDiffusion", analytics_enabled=False) as page:
        gr.Markdown("# InstructDiffusion\nSelect an image or click an example, ask, and press Run.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    pictures["sunflower"], type="pil", image_mode=None, format="png", label="image", height=300
                )
                picture.upload(check_picture, picture, picture, preprocess=False, api_visibility="private")
                tabs = gr.Tabs()
            with gr.Column():
                instruction = gr.Textbox(label="instruction")
                with gr.Row():
                    answer = gr.Image(label="output image", format="png", height=300)
                    overlay = gr.Image(label="overlay", format="png", height=300)
                data = gr.JSON(label="data")
                files = gr.File(label="files", file_count="multiple", interactive=False)
        with tabs:
            for tab in tabs_of(pictures):
                family = tab.task.family
                with gr.Tab(family):
                    asked = tab.component()
                    settings = settings_of(pipe, tab.task)
                    with gr.Accordion("settings", open=False):
                        seed = gr.Number(0, label="seed", precision=0)
                        sliders = [
                            gr.Slider(1, 100, settings["num_inference_steps"], step=1, label="steps"),
                            gr.Slider(0, 15, settings["guidance_scale"], step=0.1, label="guidance scale"),
                            gr.Slider(0, 5, settings["image_guidance_scale"], step=0.05, label="image guidance scale"),
                        ]
                    with gr.Row():
                        run, cancel = gr.Button("Run", variant="primary"), gr.Button("Cancel")
                    running = run.click(
                        answer_with(model, tab.make_task, downloads),
                        [picture, asked, seed, *sliders],
                        [instruction, answer, overlay, data, files],
                        api_name=family,
                        show_progress_on=answer,
                        concurrency_id="model",  # the scheduler of a pipeline can run only one call at a time
                    )
                    cancel.click(model.canceller(family), cancels=running, queue=False, api_visibility="private")
                    gr.Examples(tab.examples, [picture, asked], label="examples")
    return page


def check_picture(upload: dict[str, Any]) -> Any:
    """Remove an uploaded file that is not an image, with a message; otherwise gradio would show "Error" after Run."""
    try:
        open_image("picture", Path(upload["path"]))
    except UsageError:
        gr.Warning("The file is not an image, or is too large.")
        return None
    return gr.skip()


class Cancelled(Exception):
    """Raised if the user has canceled the request."""


class Model:
    """A pipeline that processes one request at a time. A canceled request stops after the current step."""

    def __init__(self, pipe: InstructDiffusionPipeline):
        self.pipe = pipe
        self.lock = threading.Lock()
        self.cancelled: dict[tuple[str | None, str], threading.Event] = {}  # by session and task family

    def ask(self, session: str | None, picture: Image.Image, task: Task, **settings: Any) -> Answer:
        """Call `ask` for a user. Raises `Cancelled`."""
        cancelled = self.cancelled[session, task.family] = threading.Event()

        def stop_if_cancelled(*_: Any) -> None:
            if cancelled.is_set():
                raise Cancelled

        with self.lock:  # gradio starts the next request while a canceled one is in its last step
            stop_if_cancelled()
            return ask(self.pipe, picture, task, callback_on_step_end=stop_if_cancelled, **settings)

    def canceller(self, family: str) -> Callable[[gr.Request], None]:
        """The function behind the Cancel button of a tab."""

        def cancel(request: gr.Request) -> None:
            if question := self.cancelled.get((request.session_hash, family)):
                question.set()

        return cancel


def example_pictures() -> dict[str, Image.Image]:
    """The photographs of demo.py: with a sunflower, with a figure, with noise, and of a cup of coffee."""
    from skimage import data

    def photograph(pixels: np.ndarray) -> Image.Image:
        return ImageOps.fit(Image.fromarray(pixels), (256, 256), Image.Resampling.LANCZOS)

    pictures = {"sunflower": photograph(data.chelsea()), "figure": photograph(data.rocket())}
    for (name, picture), place in zip(pictures.items(), [(10, 10), (0, 0)], strict=True):
        drawing = Image.open(DRAWINGS / f"{name}.png").convert("RGBA")
        picture.paste(drawing, place, drawing)
    pictures["noise"] = add_noise(photograph(data.astronaut()), 40.0, np.random.default_rng(0))
    return pictures | {"coffee": photograph(data.coffee())}


class Tab(NamedTuple):
    """A tab of the page."""

    task: type[Task]
    make_task: Callable[[Image.Image, Any], Task]  # makes a task from the image and the user's input
    component: Callable[[], gr.components.Component]  # makes the component for the user's input
    examples: list[list[Any]]  # pairs of an image and an input


def tabs_of(pictures: Mapping[str, Image.Image]) -> list[Tab]:
    """A tab for each family."""
    return [
        Tab(
            Segmentation,
            lambda picture, names: Segmentation(assign_colors(picture, split_names(names), MASK_COLORS)),
            lambda: gr.Textbox("sunflower", label="objects, separated by commas"),
            [[pictures["sunflower"], "sunflower"]],
        ),
        Tab(
            Keypoints,
            lambda picture, names: Keypoints(assign_colors(picture, names, KEYPOINT_COLORS)),
            lambda: gr.Dropdown(
                list(COCO_JOINTS), value=["nose"], multiselect=True, max_choices=MAX_JOINTS, label="joints"
            ),
            [[pictures["figure"], ["left wrist", "right wrist", "left knee"]]],
        ),
        Tab(
            Restoration,
            lambda _, degradation: Restoration(degradation),
            lambda: gr.Radio(list(get_args(Degradation)), value="noise", label="remove"),
            [[pictures["noise"], "noise"]],
        ),
        Tab(
            Editing,
            lambda _, text: Editing(text),
            lambda: gr.Textbox("make it night", label="instruction"),
            [[pictures["coffee"], "make it night"], [pictures["sunflower"], "remove the sunflower"]],
        ),
    ]


def answer_with(
    model: Model, make_task: Callable[[Image.Image, Any], Task], downloads: tempfile.TemporaryDirectory[str]
) -> Callable[..., Outputs]:
    """The function behind the Run button of a tab."""

    def answer(
        picture: Image.Image | None,
        asked: Any,
        seed: int | None,
        steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - gradio looks for it here
    ) -> Outputs:
        if picture is None or seed is None:
            raise gr.Error("Select an image and enter an integer seed.")
        try:
            picture = upright_rgb(picture)
            task = make_task(picture, asked)
            result = model.ask(
                request.session_hash,
                picture,
                task,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            )
        except Cancelled:
            return tuple(gr.skip() for _ in range(5))
        except ValueError as error:
            raise gr.Error(str(error)) from error
        if result.nsfw_content_detected:
            raise gr.Error("The safety checker flagged the output image and replaced it with a black image.")
        files = write_files(Path(tempfile.mkdtemp(dir=downloads.name)), result.data)
        return result.instruction, result.picture, result.overlay, as_json(result.data), files

    return answer


def write_files(folder: Path, data: Image.Image | Mapping[str, Mask | Joint | None]) -> list[str]:
    """Write an image as answer.png, joints as answer.json, or masks as answer.json and mask-1.png ..."""
    if isinstance(data, Image.Image):
        data.save(folder / "answer.png")
    else:
        (folder / "answer.json").write_text(json.dumps(as_json(data), indent=2) + "\n")
        for number, reading in enumerate(data.values(), start=1):
            if isinstance(reading, Mask):
                Image.fromarray(reading.pixels).save(folder / f"mask-{number}.png")
    return sorted(map(str, folder.iterdir()))


def as_json(data: Image.Image | Mapping[str, Mask | Joint | None]) -> dict[str, Any] | None:
    """Joints as coordinates; masks as box, area and score; None for an image."""
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
