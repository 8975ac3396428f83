"""The held-out data sets that the small model is scored on, one for each row of its table."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import edits
import sources
from pose import WholePose
from sources import GeneratedDataset, few_keypoints, one_of_names
from world import UNSEEN_STYLE, World

from instructdiffusion_pipeline.datasets.mixture import FixedTask, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

SIGMA = 25.0  # grey levels
SEED = 7  # of the scenes; training uses 0 and 1, the readout 3
CHANGES = {"removed": edits.remove, "replaced": edits.replace, "added": edits.add, "moved": edits.move}


def rows(folder: Path, count: int) -> list[Source]:
    """Return sources of `count` examples each, from the material that `fetch` wrote to `folder`."""
    seen = World(folder, unseen_photographs=True)
    names = World(folder, unseen_photographs=True, unseen_objects=True)
    style = World(folder, unseen_photographs=True, styles=(UNSEEN_STYLE,))

    def source(name: str, example: Callable, make_task: Callable, world: World = seen, **options: Any) -> Source:
        return Source(name, GeneratedDataset(partial(example, world, **options), count, SEED), make_task)

    return [
        source("segmentation, seen names", sources.segmentation, Segmentation.from_annotation),
        source("segmentation, unseen drawing style", sources.segmentation, Segmentation.from_annotation, style),
        source("segmentation, unseen names", sources.segmentation, partial(one_of_names, names=names.names), names),
        source("segmentation, left or right of two", sources.pairs, Segmentation.from_annotation),
        source("one joint, facing", sources.keypoints, partial(few_keypoints, counts=(1,)), facing_share=1),
        source("one joint, from behind", sources.keypoints, partial(few_keypoints, counts=(1,)), facing_share=0),
        source("keypoints, facing", sources.keypoints, Keypoints.from_annotation, facing_share=1),
        source("keypoints, from behind", sources.keypoints, Keypoints.from_annotation, facing_share=0),
        source("pose, facing", sources.keypoints, FixedTask(WholePose()), facing_share=1),
        source("pose, from behind", sources.keypoints, FixedTask(WholePose()), facing_share=0),
        source("noise", sources.noisy, FixedTask(Restoration("noise")), sigmas=(SIGMA, SIGMA)),
        source("blur", sources.blurred, FixedTask(Restoration("blur"))),
        source("watermark", sources.watermarked, FixedTask(Restoration("watermark"))),
        *(
            source(f"objects {what}", sources.edited, Editing.from_annotation, change=change)
            for what, change in CHANGES.items()
        ),
        source("color edits", sources.color_edited, Editing.from_annotation),
    ]
