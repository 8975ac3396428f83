"""The mixture that the original trains on, with the weights of its published configuration.

Of its sixteen sources IEIW was never released; RefCOCO+ and RefCOCOg are not among them, but read like RefCOCO.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from instructdiffusion_pipeline.datasets import AnnotatedImages
from instructdiffusion_pipeline.datasets.coco_stuff import CocoStuff
from instructdiffusion_pipeline.datasets.editing import InstructPix2Pix, gier, gqa_inpaint, magicbrush
from instructdiffusion_pipeline.datasets.keypoints import aic, coco, crowdpose, mpii
from instructdiffusion_pipeline.datasets.mixture import FixedTask, MakeTask, Mixture, Source
from instructdiffusion_pipeline.datasets.referring_expressions import ReferringExpressions
from instructdiffusion_pipeline.datasets.restoration import clwd, gopro, reds, sidd
from instructdiffusion_pipeline.datasets.transforms import PersonCrop, Resize, SquareCrop
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation


@dataclass(frozen=True)
class DatasetSpec:
    """How one source is read, from its folder, and what is asked of it how often."""

    folder: str
    read: Callable[[Path], AnnotatedImages[Any]]
    make_task: MakeTask
    geometry: PersonCrop | SquareCrop | Resize
    weight: float = 1.0

    def source(self, name: str, folder: Path, size: int | None = None) -> tuple[Source, float]:
        """What `folder` holds as a source with its weight; `size` of its pictures in pixels (default: 256)."""
        dataset = self.read(folder)
        geometry = replace(self.geometry, size=size) if size else self.geometry
        # The original draws one of a pair's instructions at random: a pair with five must not count five times.
        repeats = len(dataset) / getattr(dataset, "pictures", len(dataset))
        return Source(name, dataset, self.make_task, geometry), self.weight / repeats


def refer(name: str) -> Callable[[Path], ReferringExpressions]:
    """A reader of references in a folder coco_2014: {name} there, and pictures in images/train2014."""
    return lambda root: ReferringExpressions(root / name, root / "images" / "train2014")


DEBLUR, DENOISE, UNMARK = (FixedTask(Restoration(defect)) for defect in ("blur", "noise", "watermark"))
FLIPPED = SquareCrop(flip=0.5)

ORIGINAL = {
    "mpii": DatasetSpec("mpii", mpii, Keypoints.from_annotation, PersonCrop()),
    "coco": DatasetSpec("coco", coco, Keypoints.from_annotation, PersonCrop(half_body=0.3)),
    "crowdpose": DatasetSpec("crowdpose", crowdpose, Keypoints.from_annotation, PersonCrop()),
    "aic": DatasetSpec("aic", aic, Keypoints.from_annotation, PersonCrop(), 0.1),
    "coco-stuff": DatasetSpec("coco-stuff", CocoStuff, Segmentation.from_annotation, FLIPPED),
    # A referring expression says where things are: no flips.
    "grefcoco": DatasetSpec(
        "coco_2014", refer("grefcoco/grefs(unc).json"), Segmentation.from_annotation, SquareCrop()
    ),
    "refcoco": DatasetSpec("coco_2014", refer("refcoco/refs(unc).p"), Segmentation.from_annotation, SquareCrop()),
    "refcoco+": DatasetSpec("coco_2014", refer("refcoco+/refs(unc).p"), Segmentation.from_annotation, SquareCrop()),
    "refcocog": DatasetSpec("coco_2014", refer("refcocog/refs(umd).p"), Segmentation.from_annotation, SquareCrop()),
    "gopro": DatasetSpec("GoPro", gopro, DEBLUR, FLIPPED, 2),
    "reds": DatasetSpec("REDS", reds, DEBLUR, FLIPPED, 0.2),
    # Noise is of single pixels: resizing would take it out.
    "sidd": DatasetSpec("SIDD", sidd, DENOISE, SquareCrop(flip=0.5, resize=False), 20),
    "clwd": DatasetSpec("CLWD", clwd, UNMARK, FLIPPED, 0.2),
    "instructpix2pix": DatasetSpec(
        "clip-filtered-dataset", InstructPix2Pix, Editing.from_annotation, Resize(flip=0.5), 0.2
    ),
    "gier": DatasetSpec("GIER_editing_data", gier, Editing.from_annotation, Resize(), 2),
    "gqa-inpaint": DatasetSpec("gqa-inpaint", gqa_inpaint, Editing.from_annotation, Resize()),
    "magicbrush": DatasetSpec("MagicBrush", magicbrush, Editing.from_annotation, Resize(flip=0.5)),
}


def original_mixture(root: str | PathLike[str], names: Iterable[str], seed: int = 0) -> Mixture:
    """Those sources of the original's training data that `names`, keys of `ORIGINAL`, pick.

    Each source lies in a folder of `root`, in the layout that its reader describes: mpii, coco, crowdpose, aic,
    coco-stuff, coco_2014 (with refcoco, refcoco+, refcocog, grefcoco and images/train2014), GoPro, REDS, SIDD, CLWD,
    clip-filtered-dataset, GIER_editing_data, gqa-inpaint, MagicBrush.
    """
    names = list(names)
    unknown = sorted(set(names) - ORIGINAL.keys())
    if unknown:
        raise ValueError(f"`names` must be out of {', '.join(ORIGINAL)}; got {', '.join(unknown)}.")
    return Mixture([ORIGINAL[name].source(name, Path(root) / ORIGINAL[name].folder) for name in names], seed)
