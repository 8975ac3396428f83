"""The table of all datasets for training and evaluation, and the training mixture of the original code.

The splits, transforms and weights for training are those of the published configuration of the original code. One of
its sixteen sources, IEIW, was never released. RefCOCO+, RefCOCOg, RefClef, HumanArt, AP-10K, ADE20K, PASCAL-Context
and PASCAL VOC are not among them: the paper evaluates on them only.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from instructdiffusion_pipeline.datasets import AnnotatedImages, ReducibleImages
from instructdiffusion_pipeline.datasets.captions import coco_captions, img2dataset
from instructdiffusion_pipeline.datasets.editing import HubTable, InstructPix2Pix, gier, gqa_inpaint, magicbrush
from instructdiffusion_pipeline.datasets.instances import coco_instances
from instructdiffusion_pipeline.datasets.keypoints import (
    AIC_SIGMAS,
    AP10K_SIGMAS,
    COCO_SIGMAS,
    CROWDPOSE_SIGMAS,
    aic,
    ap10k,
    coco,
    crowdpose,
    humanart,
    mpii,
)
from instructdiffusion_pipeline.datasets.label_maps import (
    CocoStuff,
    LabelMaps,
    ade20k_150,
    ade20k_847,
    pascal_context_59,
    pascal_context_459,
    voc,
)
from instructdiffusion_pipeline.datasets.mixture import FixedTask, MakeTask, Mixture, Source
from instructdiffusion_pipeline.datasets.preferences import load_preferences
from instructdiffusion_pipeline.datasets.referring_expressions import ReferringExpressions
from instructdiffusion_pipeline.datasets.restoration import clwd, gopro, reds, sidd
from instructdiffusion_pipeline.datasets.transforms import EvaluationPersonCrop, PersonCrop, Resize, SquareCrop
from instructdiffusion_pipeline.tasks.adaptation import Adaptation
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration
from instructdiffusion_pipeline.tasks.segmentation import Segmentation

COCO_SPLITS = ("train2017", "val2017")
Transform = PersonCrop | EvaluationPersonCrop | SquareCrop | Resize


@dataclass(frozen=True)
class DatasetSpec:
    """The reader, transforms, task and splits of a dataset.

    Attributes:
        read: reads a split of a folder: `read(folder, split)`.
        make_task: chooses the task for a sample.
        transform: crops and flips a sample for training.
        test_transform: crops a sample for evaluation, and adds the OKS sigmas of joints; None: no crop.
        train_split: the split to train on.
        test_split: the split to evaluate on; None: the dataset is for training only.
        weight: factor for the length of the dataset in a mixture.
        folder: path of the dataset relative to a folder of all datasets, for `original_mixture` and the tables of the
            paper; None if it is in neither.
    """

    read: Callable[..., AnnotatedImages[Any]]
    make_task: MakeTask
    transform: Transform
    test_transform: Transform | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    weight: float = 1.0
    folder: str | None = None

    def source(self, name: str, folder: Path, size: int = 256, **columns: str) -> tuple[Source, float]:
        """The training split of `folder` as a source with images of `size` x `size` pixels, and its weight."""
        dataset = self.read(folder, self.train_split, **columns)
        if isinstance(dataset, ReducibleImages):
            dataset.reduce_to(size)
        # The original code draws one of a pair's instructions at random, so a pair with five does not count five
        # times.
        repeats = len(dataset) / getattr(dataset, "pictures", len(dataset))
        return Source(name, dataset, self.make_task, replace(self.transform, size=size)), self.weight / repeats

    def test_source(self, name: str, folder: Path, size: int, split: str | None = None, **columns: str) -> Source:
        """The test split of `folder`, or another `split`, as a source called "name split"."""
        chosen = self.test_split if split is None else split
        if chosen is None or self.test_split is None:
            raise ValueError(f"--data {name}: this dataset is for training only.")
        transform = self.test_transform and replace(self.test_transform, size=size)
        return Source(f"{name} {chosen}", self.read(folder, chosen, **columns), self.make_task, transform)


def table(folder: Path, default_split: str, split: str | None = None, **options: str) -> HubTable:
    """Pairs of images as a table of Hugging Face's `datasets`; `options` are those of `HubTable.load`."""
    return HubTable.load(folder, default_split if split is None else split, **options)


KEYPOINTS, SEGMENTATION = Keypoints.from_annotation, Segmentation.from_annotation
EDITING, CAPTION = Editing.from_annotation, Adaptation.from_annotation
DEBLUR, DENOISE, UNMARK = (FixedTask(Restoration(degradation)) for degradation in ("blur", "noise", "watermark"))
FLIPPED = SquareCrop(flip=0.5)
TEST_CROP = SquareCrop(enlarge=False)  # enlarging would change the PSNR


def referring(name: str, pictures: str = "train2014") -> DatasetSpec:
    """References in {folder}/{name} to the images in {folder}/images/{pictures}."""

    def read(folder: Path, split: str) -> ReferringExpressions:
        return ReferringExpressions(folder / name, folder / "images" / pictures, split)

    # No flips, because referring expressions contain left and right.
    return DatasetSpec(read, SEGMENTATION, SquareCrop(), test_split="val", folder="coco_2014")


def label_maps(read: Callable[..., LabelMaps], folder: str) -> DatasetSpec:
    """Label maps with the splits training and validation."""
    return DatasetSpec(read, SEGMENTATION, FLIPPED, None, "training", "validation", folder=folder)


DATASETS: dict[str, DatasetSpec] = {
    "mpii": DatasetSpec(mpii, KEYPOINTS, PersonCrop(), EvaluationPersonCrop(), test_split="valid", folder="mpii"),
    "coco": DatasetSpec(
        coco, KEYPOINTS, PersonCrop(half_body=0.3), EvaluationPersonCrop(256, COCO_SIGMAS), *COCO_SPLITS, folder="coco"
    ),
    "crowdpose": DatasetSpec(
        crowdpose, KEYPOINTS, PersonCrop(), EvaluationPersonCrop(256, CROWDPOSE_SIGMAS), folder="crowdpose"
    ),
    "aic": DatasetSpec(
        aic, KEYPOINTS, PersonCrop(), EvaluationPersonCrop(256, AIC_SIGMAS), "train", "val", 0.1, folder="aic"
    ),
    "humanart": DatasetSpec(
        humanart,
        KEYPOINTS,
        PersonCrop(),
        EvaluationPersonCrop(256, COCO_SIGMAS),
        "training",
        "validation",
        folder="HumanArt",
    ),
    "ap10k": DatasetSpec(
        ap10k,
        KEYPOINTS,
        PersonCrop(),
        EvaluationPersonCrop(256, AP10K_SIGMAS),
        "train-split1",
        "test-split1",
        folder="ap-10k",
    ),
    "coco-stuff": DatasetSpec(CocoStuff, SEGMENTATION, FLIPPED, None, *COCO_SPLITS, folder="coco-stuff"),
    "coco-instances": DatasetSpec(coco_instances, SEGMENTATION, FLIPPED, None, *COCO_SPLITS),
    "ade20k-150": label_maps(ade20k_150, "ADEChallengeData2016"),
    "ade20k-847": label_maps(ade20k_847, "ADE20K_2021_17_01"),
    "pascal-context-59": label_maps(pascal_context_59, "pascal_ctx_d2"),
    "pascal-context-459": label_maps(pascal_context_459, "pascal_ctx_d2"),
    "voc": DatasetSpec(voc, SEGMENTATION, FLIPPED, None, "train", "val", folder="VOCdevkit/VOC2012"),
    "grefcoco": referring("grefcoco/grefs(unc).json"),
    "refcoco": referring("refcoco/refs(unc).p"),
    "refcoco+": referring("refcoco+/refs(unc).p"),
    "refcocog": referring("refcocog/refs(umd).p"),
    "refcocog-google": referring("refcocog/refs(google).p"),
    "refclef": referring("refclef/refs(unc).p", "saiapr_tc-12"),
    "gopro": DatasetSpec(gopro, DEBLUR, FLIPPED, TEST_CROP, weight=2, folder="GoPro"),
    "reds": DatasetSpec(reds, DEBLUR, FLIPPED, TEST_CROP, test_split="val", weight=0.2, folder="REDS"),
    # Not reduced, because that would remove noise.
    "sidd": DatasetSpec(
        sidd,
        DENOISE,
        SquareCrop(flip=0.5, reduce=False),
        SquareCrop(reduce=False, enlarge=False),
        "train",
        "val",
        20,
        folder="SIDD",
    ),
    "clwd": DatasetSpec(clwd, UNMARK, FLIPPED, TEST_CROP, weight=0.2, folder="CLWD"),
    "instructpix2pix": DatasetSpec(
        InstructPix2Pix, EDITING, Resize(flip=0.5), Resize(), weight=0.2, folder="clip-filtered-dataset"
    ),
    "gier": DatasetSpec(gier, EDITING, Resize(), Resize(), weight=2, folder="GIER_editing_data"),
    "gqa-inpaint": DatasetSpec(gqa_inpaint, EDITING, Resize(), Resize(), folder="gqa-inpaint"),
    "magicbrush": DatasetSpec(magicbrush, EDITING, Resize(flip=0.5), Resize(), test_split="dev", folder="MagicBrush"),
    "table": DatasetSpec(table, EDITING, Resize(), Resize(), test_split="train"),
    "preferences": DatasetSpec(lambda folder, _: load_preferences(folder), EDITING, Resize(), test_split=None),
    "captions": DatasetSpec(lambda folder, _: img2dataset(folder), CAPTION, SquareCrop(), test_split=None),
    "coco-captions": DatasetSpec(coco_captions, CAPTION, SquareCrop(), train_split="train2017", test_split=None),
}


ON_HUB = ("table", "magicbrush")  # the folder may be a Hub id


class Entry(NamedTuple):
    """A dataset of a command line: its key in `DATASETS`, its folder, and a unique `name`."""

    key: str
    folder: Path
    name: str


MASKS_OR_JOINTS = [name for name, spec in DATASETS.items() if spec.make_task in (KEYPOINTS, SEGMENTATION)]


def parse_entries(entries: Sequence[str], option: str = "--data") -> list[Entry]:
    """Parse entries "NAME=FOLDER" of a command-line option. FOLDER may contain any characters, even commas and "=".

    Several folders of one NAME are called "NAME:folder name", or "NAME:path" if two folders have the same name. Raises
    a ValueError for an unknown NAME, a folder that does not exist, a file instead of a folder, and a repeated entry.
    """
    pairs: list[tuple[str, Path]] = []
    for entry in entries:
        key, _, folder = entry.partition("=")
        if key not in DATASETS or not folder:
            raise ValueError(
                f"{option} must be NAME=FOLDER, such as table=my-pictures; got {entry!r}. NAME is one of"
                f" {', '.join(DATASETS)}."
            )
        path = Path(folder).expanduser()
        if not path.exists() and not (key in ON_HUB and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder)):
            raise ValueError(f"{option} {key}: there is no folder {folder}.")
        if path.is_file() and key != "table":
            raise ValueError(f"{option} {key}: must be a folder; got the file {folder}.")
        if (key, path.resolve()) in [(other, known.resolve()) for other, known in pairs]:
            raise ValueError(f"{option} {entry} is given twice; name each folder once.")
        pairs.append((key, path))
    keys = Counter(key for key, _ in pairs)
    short = Counter(f"{key}:{path.resolve().name}" for key, path in pairs)

    def name(key: str, path: Path) -> str:
        by_folder = f"{key}:{path.resolve().name}"
        return key if keys[key] == 1 else by_folder if short[by_folder] == 1 else f"{key}:{path}"

    return [Entry(key, path, name(key, path)) for key, path in pairs]


def load_sources(
    entries: Sequence[str], size: int, columns: Mapping[str, str] | None = None
) -> list[tuple[Source, float]]:
    """The training splits of entries "NAME=FOLDER" (see `parse_entries`), as sources with their weights.

    Args:
        entries: as on the command line.
        size: side of the training images, in pixels.
        columns: names of the columns of every `table`, by the arguments of `HubTable`.
    """
    return [
        DATASETS[entry.key].source(entry.name, entry.folder, size, **columns_of(entry, columns))
        for entry in parse_entries(entries)
    ]


def load_test_sources(
    entries: Sequence[str], size: int, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Source]:
    """The test splits of entries "NAME=FOLDER", or another `split`, as sources called "NAME SPLIT".

    `entries` and `columns` are those of `load_sources`; `size` is the working size in pixels. Raises a ValueError for
    a dataset that is for training only.
    """
    return [
        DATASETS[entry.key].test_source(entry.name, entry.folder, size, split, **columns_of(entry, columns))
        for entry in parse_entries(entries)
    ]


def columns_of(entry: Entry, columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """The `columns` if the entry is a table."""
    return (columns or {}) if entry.key == "table" else {}


# RefCOCO+ and RefCOCOg are not among the sources of the original code, but have the same format.
ORIGINAL = (
    "mpii", "coco", "crowdpose", "aic", "coco-stuff", "grefcoco", "refcoco", "refcoco+", "refcocog", "gopro", "reds",
    "sidd", "clwd", "instructpix2pix", "gier", "gqa-inpaint", "magicbrush",
)  # fmt: skip


def original_mixture(root: str | PathLike[str], names: Iterable[str], seed: int = 0) -> Mixture:
    """The datasets `names` with the sampling weights of the original code, at 256 x 256 pixels.

    `names` are from `ORIGINAL`. Each dataset is in the `folder` of its spec in `root`, in the layout that its reader
    describes: mpii, coco, crowdpose, aic, coco-stuff, coco_2014 (with refcoco, refcoco+, refcocog,
    grefcoco and images/train2014), GoPro, REDS, SIDD, CLWD, clip-filtered-dataset, GIER_editing_data, gqa-inpaint,
    MagicBrush.
    """
    names = list(names)
    folders = {name: Path(root, str(DATASETS[name].folder)) for name in ORIGINAL}
    if unknown := sorted(set(names) - folders.keys()):
        raise ValueError(f"`names` must be from {', '.join(folders)}; got {', '.join(unknown)}.")
    return Mixture([DATASETS[name].source(name, folders[name]) for name in names], seed)
