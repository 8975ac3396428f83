"""The held-out datasets for the scores of `instructdiffusion-tiny`, one for each row of its table."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import edits
import sources
from pose import WholePose
from recipes import Recipe
from sources import GeneratedDataset, few_keypoints, one_of_names
from world import UNSEEN_STYLE, World

from instructdiffusion_pipeline.datasets.mixture import FixedTask, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

# Scenes and degradations of the table do not change with those of training, so that scores remain comparable.
SIZES = (20 / 64, 40 / 64)
COUNTS = {1: 0.15, 2: 0.45, 3: 0.4}
SIGMA = 25.0  # gray levels
BLUR_RADII = (0.7 / 64, 2.5 / 64)  # relative to the image's side
OPACITIES = (0.35, 0.85)
# Rows of an unseen drawing style, by size and by number of objects.
SIZE_ROWS = {
    f"segmentation, objects of {low} to {high} of the side": (low, high)
    for low, high in ((0.12, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5))
}
COUNT_ROWS = {f"segmentation, {count} of 0.3 to 0.5 of the side": count for count in (1, 2, 3, 4)}
SEED = 7  # of the scenes; training uses 0 and 1, the readout 3
CHANGES = {"removed": edits.remove, "replaced": edits.replace, "added": edits.add, "moved": edits.move}


def held_out_world(recipe: Recipe, folder: Path, **options: Any) -> World:
    """Return a world of held-out photographs with the table's scenes. `options` are arguments of `World`."""
    table = {"unseen_photographs": True, "sizes": SIZES, "counts": COUNTS, "figures": 0, "varied": False}
    return recipe.world(folder, **table | options)


def rows(recipe: Recipe, folder: Path, count: int) -> list[Source]:
    """Return sources of `count` examples each, from the material that `fetch` wrote to `folder`."""
    seen = held_out_world(recipe, folder)
    names = held_out_world(recipe, folder, unseen_objects=True)
    style = held_out_world(recipe, folder, styles=(UNSEEN_STYLE,))
    figures = held_out_world(recipe, folder, frame=recipe.frame_of("keypoints"))
    figure = partial(sources.keypoints, objects_share=0)
    layouts = {row: {"sizes": sizes} for row, sizes in SIZE_ROWS.items()}
    layouts |= {row: {"sizes": (0.3, 0.5), "counts": {count: 1}} for row, count in COUNT_ROWS.items()}

    def source(name: str, example: Callable, make_task: Callable, world: World = seen, **options: Any) -> Source:
        return Source(name, GeneratedDataset(partial(example, world, **options), count, SEED), make_task)

    return [
        source("segmentation, seen names", sources.segmentation, Segmentation.from_annotation),
        source("segmentation, unseen drawing style", sources.segmentation, Segmentation.from_annotation, style),
        source("segmentation, unseen names", sources.segmentation, partial(one_of_names, names=names.names), names),
        source("segmentation, left or right of two", sources.pairs, Segmentation.from_annotation),
        *(
            source(
                row,
                sources.present,
                Segmentation.from_annotation,
                held_out_world(recipe, folder, styles=(UNSEEN_STYLE,), **layout),
            )
            for row, layout in layouts.items()
        ),
        source("one joint, facing", figure, partial(few_keypoints, counts=(1,)), figures, facing_share=1),
        source("one joint, from behind", figure, partial(few_keypoints, counts=(1,)), figures, facing_share=0),
        source("keypoints, facing", figure, Keypoints.from_annotation, figures, facing_share=1),
        source("keypoints, from behind", figure, Keypoints.from_annotation, figures, facing_share=0),
        source("pose, facing", figure, FixedTask(WholePose()), figures, facing_share=1),
        source("pose, from behind", figure, FixedTask(WholePose()), figures, facing_share=0),
        source("noise", sources.noisy, FixedTask(Restoration("noise")), sigmas=(SIGMA, SIGMA)),
        source("blur", sources.blurred, FixedTask(Restoration("blur")), radii=BLUR_RADII),
        source("watermark", sources.watermarked, FixedTask(Restoration("watermark")), opacities=OPACITIES),
        *(
            source(f"objects {what}", sources.edited, Editing.from_annotation, change=change)
            for what, change in CHANGES.items()
        ),
        source("color edits", sources.color_edited, Editing.from_annotation),
    ]
