"""A page to ask a model by hand: a picture, a question of each family, the answer, and what is read from it.

    python examples/app.py --model path/to/model

`pip install ".[app]"` brings what it needs. The page is served on this machine only.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import gradio as gr
import torch
from demo import overlaid
from edit import TINY_MODEL, load
from PIL import Image
from skimage import data

from instructdiffusion_pipeline import (
    Editing,
    InstructDiffusionPipeline,
    Keypoints,
    LearnedReading,
    Restoration,
    Segmentation,
    ask,
    load_presets,
    upright_rgb,
)
from instructdiffusion_pipeline.tasks import Task
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS, MASK_COLORS, RGB, most_visible_first
from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS, MAX_JOINTS
from instructdiffusion_pipeline.tasks.restoration import Degradation
from instructdiffusion_pipeline.tasks.segmentation import Mask
from instructdiffusion_pipeline.types import Joint

Make = Callable[[Image.Image, Any], Task]
Outputs = tuple[str, Image.Image, Image.Image, dict[str, Any] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the model that ships)")
    args = parser.parse_args()
    build(load(args.model), load_presets(args.model), LearnedReading.beside(args.model)).launch()


def build(
    pipeline: InstructDiffusionPipeline, presets: Mapping[str, Mapping[str, Any]], reading: LearnedReading | None
) -> gr.Blocks:
    """The page: one tab a family, each an endpoint of its name in the page's API."""
    with gr.Blocks(title="InstructDiffusion", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column():
                example = overlaid(data.chelsea(), "sunflower", (10, 10))
                picture = gr.Image(example, type="pil", image_mode=None, format="png", label="picture")
                seed = gr.Number(0, label="seed", precision=0)
                tabs = gr.Tabs()
            with gr.Column():
                words = gr.Textbox(label="instruction")
                answer = gr.Image(label="the model's answer", format="png")
                overlay = gr.Image(label="what is read from it", format="png")
                found = gr.JSON(label="as data")
        with tabs:
            for task_class, make, component in questions():
                family = task_class.family
                with gr.Tab(family):
                    asked = component()
                    settings = task_class.settings | presets.get(family, {})
                    settings = [
                        gr.Slider(1, 100, preset["num_inference_steps"], step=1, label="steps"),
                        gr.Slider(0, 15, preset["guidance_scale"], step=0.1, label="guidance scale"),
                        gr.Slider(0, 5, preset["image_guidance_scale"], step=0.05, label="image guidance scale"),
                    ]
                    gr.Button("Ask", variant="primary").click(
                        answering(pipeline, reading, make),
                        [picture, asked, seed, *settings],
                        [words, answer, overlay, found],
                        api_name=family,
                        concurrency_id="model",  # a pipeline's scheduler serves one call at a time
                    )
    return page


def questions() -> list[tuple[type[Task], Make, Callable[[], gr.components.Component]]]:
    """Of each family: its task, how a question is made of the picture and what was typed or chosen, and where that is
    done."""
    return [
        (
            Segmentation,
            lambda picture, names: Segmentation(colored(picture, listed(names), MASK_COLORS)),
            lambda: gr.Textbox("sunflower", label="objects, with commas between"),
        ),
        (
            Keypoints,
            lambda picture, names: Keypoints(colored(picture, names, KEYPOINT_COLORS)),
            lambda: gr.Dropdown(
                list(COCO_JOINTS), value=["nose"], multiselect=True, max_choices=MAX_JOINTS, label="joints"
            ),
        ),
        (
            Restoration,
            lambda _, defect: Restoration(defect),
            lambda: gr.Radio(list(get_args(Degradation)), value="noise", label="take out"),
        ),
        (Editing, lambda _, text: Editing(text), lambda: gr.Textbox("make it night", label="instruction")),
    ]


def listed(names: str) -> list[str]:
    """What was typed between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def colored(picture: Image.Image, names: Sequence[str], colors: Mapping[str, RGB]) -> dict[str, str]:
    """A colour for each name, those first that show on most of the picture.

    Raises a ValueError if a name comes twice, if there is none, or if there are more than colours.
    """
    if not 0 < len(set(names)) == len(names) <= len(colors):
        raise ValueError(f"Name one to {len(colors)} different things; got {', '.join(names) or 'none'}.")
    return dict(zip(names, most_visible_first(picture, colors), strict=False))


def answering(
    pipeline: InstructDiffusionPipeline, reading: LearnedReading | None, make: Make
) -> Callable[..., Outputs]:
    """What the button of a tab does."""

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
            raise gr.Error("A question needs a picture and a seed: drop one into the frame, and type a whole number.")
        try:
            picture = upright_rgb(picture)
            task = make(picture, asked)
            result = ask(
                pipeline,
                picture,
                task,
                reading=reading,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                image_guidance_scale=image_guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            )
        except ValueError as error:
            raise gr.Error(str(error)) from error
        if result.nsfw_content_detected:
            raise gr.Error("The model's safety checker blackened the answer, so nothing can be read from it.")
        return task.instruction(), result.picture, result.overlay, as_json(result.data)

    return answer


def as_json(found: Image.Image | Mapping[str, Mask | Joint | None]) -> dict[str, Any] | None:
    """Joints as places, masks as box, area and confidence; None for a picture."""
    if isinstance(found, Image.Image):
        return None
    return {
        name: {"box": each.box, "area": int(each.pixels.sum()), "confidence": each.confidence}
        if isinstance(each, Mask)
        else each and each._asdict()
        for name, each in found.items()
    }


if __name__ == "__main__":
    main()
