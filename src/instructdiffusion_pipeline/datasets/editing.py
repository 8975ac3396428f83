"""An image, an instruction and the edited image: InstructPix2Pix, GIER, GQA-Inpaint, MagicBrush, Hub tables."""

import io
import json
import os
import re
import reprlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    ReducibleImages,
    Skipped,
    UnreadableSample,
    is_file_name,
    is_list_of,
    list_records,
    named_entries,
    read_annotations,
    read_image,
    require_samples,
)
from instructdiffusion_pipeline.datasets.zip_files import list_files, read_file
from instructdiffusion_pipeline.pipeline_instruct_diffusion import is_text, upright_rgb
from instructdiffusion_pipeline.types import Edit

T = TypeVar("T")
BLANK = " \t\r\n\ufeff"  # removed from both ends of instructions; \ufeff is a byte order mark

# InstructPix2Pix and GIER are published without splits; these are the splits of the original code.
SHARES = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}


def part_of(items: Sequence[T], split: str) -> Sequence[T]:
    """The `items` of a split, in order: train 90 %, val 5 %, test 5 %."""
    if split not in SHARES:
        raise ValueError(f"`split` must be one of {', '.join(SHARES)}; got {split!r}.")
    first, last = (int(share * len(items)) for share in SHARES[split])
    return items[first:last]


class EditTriples(ReducibleImages):
    """A dataset of triples (input path, instruction, edited path), with paths relative to `folder`.

    The images of a triple may differ in size. `pictures` is the number of distinct pairs, because a pair may have
    several instructions. A triple with a missing or malformed entry is skipped.
    """

    def __init__(self, folder: str | PathLike[str], triples: Iterable[tuple[Any, Any, Any]]):
        self.folder, self.skipped = Path(folder), Skipped()
        self._triples: list[tuple[str, str, str]] = []
        for before, instruction, after in triples:
            if not before or not after:
                self.skipped.append((f"{before} to {after}: {instruction}", "no file name"))
            elif not is_file_name(before) or not is_file_name(after):
                self.skipped.append((f"{before} to {after}: {instruction}", "a malformed file name"))
            elif missing := [path for path in (before, after) if not os.path.isfile(self.folder / path)]:
                self.skipped.append((missing[0], "a missing file"))
            elif not is_text(instruction) or not instruction.strip(BLANK):
                self.skipped.append((f"{before} to {after}", "no instruction"))
            else:
                self._triples.append((before, instruction.strip(BLANK), after))
        require_samples(self.folder, self._triples, self.skipped)
        self.pictures = len({(before, after) for before, _, after in self._triples})

    def __len__(self) -> int:
        return len(self._triples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        before, instruction, after = self._triples[index]
        return self._read_image(self.folder / before), Edit(instruction, self._read_image(self.folder / after))

    def name(self, index: int) -> str:
        before, instruction, after = self._triples[index]
        return f"{before} to {after}: {instruction}"


def gier(root: str | PathLike[str], split: str = "train") -> EditTriples:
    """GIER: GIER.json and images/. Each summary, by an expert or an amateur, is a separate instruction.

    The published splits (80, 10 and 10 %) are used if {split}_sess_3.json is in the folder or in splits/. Otherwise
    the input images are split, so that no image is in two splits (see `part_of`).
    """
    root = Path(root)
    lists = [folder / f"{split}_sess_3.json" for folder in (root, root / "splits")]
    file = next((file for file in lists if file.is_file()), root / "GIER.json")
    items = list_records(read_annotations(file, "a JSON file of edits"), file)
    if file not in lists:
        pictures = list(dict.fromkeys(item["input"] for item in items if is_text(item.get("input"))))
        chosen = set(part_of(pictures, split))
        items = [item for item in items if not is_text(item.get("input")) or item["input"] in chosen]

    def path(file: Any) -> str | None:
        return file.replace("/", "_") if isinstance(file, str) else None

    return EditTriples(
        root / "images",
        ((path(item.get("input")), text, path(item.get("output"))) for item in items for text in summaries(item)),
    )


def summaries(item: dict[str, Any]) -> list[str | None]:
    """The distinct instructions of an edit of GIER, with None for one that is not a text; [None] if there are none."""
    fields = (item.get("expert_summary"), item.get("amateur_summary"))
    said = [text for texts in fields if isinstance(texts, list) for text in texts]
    return list(dict.fromkeys(text if is_text(text) else None for text in said)) or [None]


def magicbrush(root: str | PathLike[str], split: str = "train") -> "EditTriples | HubTable":
    """MagicBrush: train and dev from its table, a folder of parquet files or a Hub id; test from its zip file.

    The table's columns are source_img, instruction and target_img. The zip file holds {split}/edit_turns.json (or
    edit_sessions.json) and {split}/images/. If `root` has both, `split` is read from the zip file's folder if that
    contains it."""
    folder = Path(root) / split
    turns_file, file = folder / "edit_turns.json", folder / "edit_sessions.json"
    if turns_file.is_file():
        turns = list_records(read_annotations(turns_file, "a JSON file of turns"), turns_file)
    elif file.is_file():
        sessions = named_entries(read_annotations(file, "a JSON file of sessions"), file)
        turns = [turn for session in sessions for turn in list_records(sessions, file, session)]
    else:
        return HubTable.load(root, split, image="source_img", instruction="instruction", edited="target_img")

    def path(file: Any) -> str | None:
        return f"{file.split('-')[0]}/{file}" if isinstance(file, str) and file else None

    return EditTriples(
        folder / "images",
        ((path(turn.get("input")), turn.get("instruction"), path(turn.get("output"))) for turn in turns),
    )


def gqa_inpaint(root: str | PathLike[str], split: str = "train") -> EditTriples:
    """GQA-Inpaint: GQA's images/{picture}.jpg, and without an object images_inpainted/{picture}/{object}.jpg.

    Splits: train, test. Instructions come from {split}_instructions.json if it exists (test), otherwise from
    {split}_scenes.json. Objects that cannot be identified by name and position are skipped (see `removal`).
    """
    root = Path(root)
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be one of train, test; got {split!r}.")
    file, fixed_file = root / f"{split}_scenes.json", root / f"{split}_instructions.json"
    scenes = named_entries(read_annotations(file, "a JSON file of scenes"), file)
    fixed = None
    if fixed_file.is_file():
        fixed = named_entries(read_annotations(fixed_file, "a JSON file of instructions"), fixed_file)
    malformed = [picture for picture, scene in scenes.items() if not is_scene(scene)]

    def triples() -> Iterator[tuple[str, Any, str]]:
        for picture, scene in scenes.items():
            if picture in malformed:
                continue
            for id, item in scene["objects"].items():
                if item.get("bidirected", True):
                    words = fixed.get(f"i{picture}-o{id}") if fixed is not None else removal(scene, id)
                    yield f"images/{picture}.jpg", words, f"images_inpainted/{picture}/{id}.jpg"

    data = EditTriples(root, triples())
    data.skipped[:0] = [(f"image {picture}", "a malformed scene") for picture in malformed]
    return data


def is_scene(value: Any) -> bool:
    """Whether a value of a file is a scene of GQA: objects by their ids, each with a name."""
    objects = value.get("objects") if isinstance(value, dict) else None
    return isinstance(objects, dict) and is_list_of(lambda item: isinstance(item, dict) and is_text(item.get("name")))(
        list(objects.values())
    )


def removal(scene: dict[str, Any], id: str) -> str | None:
    """The instruction to remove an object of a GQA scene. None if the object cannot be identified.

    As in the published loader, two objects may have the same name if they are in different thirds of the image; the
    instruction then ends in "at the left", "at the center" or "at the right".
    """
    objects, positions = scene["objects"], scene.get("image_relative_positions")
    name = objects[id]["name"]
    alike = [other for other, item in objects.items() if item["name"] == name]
    if len(alike) == 1:
        return f"remove the {name}"
    if len(alike) > 2 or not isinstance(positions, dict):
        return None
    # "to the left" and the like
    thirds = {other: positions[other].split()[-1:] for other in alike if is_text(positions.get(other))}
    if len(thirds) < 2 or thirds[alike[0]] == thirds[alike[1]] or thirds[id] not in (["left"], ["center"], ["right"]):
        return None
    return f"remove the {name} at the {thirds[id][0]}"


LONGEST_NAME = 200  # maximum bytes of a file in a shard; InstructPix2Pix has no larger ones
# The shard of a pair, and the offsets and sizes in it of the prompt, the image and the edited image.
PAIR = np.dtype([("shard", "u2"), ("offsets", "u8", 3), ("sizes", "u4", 3)])


class InstructPix2Pix:
    """InstructPix2Pix's generated data in its zip files (shard-00.zip ...); one sample per pair.

    A shard contains folders with a prompt.json (its "edit" is the instruction), metadata.jsonl and pairs {seed}_0.jpg,
    {seed}_1.jpg. Samples are read from the zip files. Only file offsets are kept in memory, so data loader workers can
    share the dataset. The split is by prompt, not by pair (see `part_of`). The prompts are in the order of the
    published seeds.json if it is in the folder of the zip files, otherwise sorted by name.
    """

    def __init__(self, root: str | PathLike[str], split: str = "train"):
        self.skipped = Skipped()
        self.shards = sorted(Path(root).glob("shard-*.zip"))
        seeds_file = Path(root) / "seeds.json"
        wanted = read_seeds(seeds_file, split) if seeds_file.is_file() else None
        # Arrays need less memory than lists; there are a million pairs.
        names, pairs = [np.empty(0, "S1")], [np.empty(0, PAIR)]
        folders: set[bytes] = set()
        incomplete: list[bytes] = []
        for number, shard in enumerate(self.shards):
            try:
                files = dict(list_files(shard))
            except (OSError, zipfile.BadZipFile) as error:
                self.skipped.append((shard.name, f"a damaged zip file ({error})"))
                continue
            found: list[bytes] = []
            places: list[int] = []
            for name in files:
                if name.endswith(b"_0.jpg") and len(name) <= LONGEST_NAME:
                    prompt, after = folder_of(name) + b"prompt.json", name[:-5] + b"1.jpg"
                    if prompt in files and after in files:
                        found.append(name)
                        places += (*files[prompt], *files[name], *files[after])
                    else:
                        incomplete.append(after if prompt in files else prompt)
            if wanted is None:
                folders.update(folder_of(name) for name in files if name.endswith((b"_0.jpg", b"/prompt.json")))
            table = np.array(places, np.uint64).reshape(-1, 3, 2)
            names.append(np.array(found, "S"))
            pairs.append(np.empty(len(found), PAIR))
            pairs[-1]["shard"], pairs[-1]["offsets"], pairs[-1]["sizes"] = number, table[..., 0], table[..., 1]
        all_names = np.concatenate(names)
        del names
        order = np.argsort(all_names, kind="stable")
        if wanted is None:
            part = part_of(sorted(folders), split)
            # "/" is the last byte of each folder, so folders have the same order as names.
            edges = np.array([part[0], part[-1] + b"\xff"] if part else [b"", b""])
            order = order[slice(*np.searchsorted(all_names, edges, sorter=order))]
            chosen = set(part)
            missing = [file for file in incomplete if folder_of(file) in chosen]
        else:
            order, missing = places_of(wanted, all_names, order)
        self.skipped += [(name.decode(errors="replace"), "a missing file") for name in missing]
        require_samples(root, order, self.skipped)
        self._names, self._pairs = all_names[order], np.empty(len(order), PAIR)
        start = 0
        for part_pairs in pairs:
            here = (start <= order) & (order < start + len(part_pairs))
            self._pairs[here] = part_pairs[order[here] - start]
            start += len(part_pairs)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        name, pair = self.name(index), self._pairs[index]
        places = zip(pair["offsets"].tolist(), pair["sizes"].tolist(), strict=True)
        try:
            prompt, before, after = (read_file(self.shards[pair["shard"]], place) for place in places)
            instruction = json.loads(prompt)["edit"]
        except Exception as error:  # a damaged zip file or JSON can raise any exception
            raise UnreadableSample(name, f"{type(error).__name__}: {error}") from error
        if not is_text(instruction) or not instruction.strip(BLANK):
            raise UnreadableSample(name, "no instruction")
        edited = read_image(io.BytesIO(after), name)
        return read_image(io.BytesIO(before), name), Edit(instruction.strip(BLANK), edited)

    def name(self, index: int) -> str:
        return f"{self.shards[self._pairs[index]['shard']].name}/{self._names[index].decode(errors='replace')}"


def folder_of(name: bytes) -> bytes:
    """The folder of a file in a zip file, with a slash at the end."""
    return name[: name.rfind(b"/") + 1]


def read_seeds(file: Path, split: str) -> np.ndarray:
    """The first files of the pairs of a split in the order of seeds.json, which lists [folder, [seed, ...]]."""

    def parse(text: str) -> tuple[np.ndarray, list[int]]:
        parts, counts = [np.empty(0, "S1")], [0]
        names: list[bytes] = []
        for entry in json_entries(text):
            if not is_prompt(entry):
                raise ValueError(f"{reprlib.repr(entry)}, which is not [folder, [seed, ...]]")
            folder, seeds = entry
            names += [f"{folder}/{seed}_0.jpg".encode() for seed in seeds]
            counts.append(len(seeds))
            if len(names) > 50_000:
                parts.append(np.array(names, "S"))
                names.clear()
        return np.concatenate([*parts, np.array(names, "S")]), counts

    names, counts = read_annotations(file, "a JSON list of prompts and seeds", parse)
    ends = np.cumsum(counts)
    chosen = part_of(range(len(counts) - 1), split)
    return names[ends[chosen[0]] : ends[chosen[-1] + 1]] if chosen else names[:0]


def json_entries(text: str) -> Iterator[Any]:
    """The entries of a JSON list one by one, because all million prompts and seeds together take 150 MB."""
    decode, separator = json.JSONDecoder().raw_decode, re.compile(r"\s*([],])\s*")
    start = re.match(r"\s*\[\s*", text)
    if not start:
        raise ValueError("no list")
    position, going_on = start.end(), text[start.end() : start.end() + 1] != "]"
    while going_on:
        entry, position = decode(text, position)
        yield entry
        end = separator.match(text, position)
        if not end:
            raise ValueError(f"no comma at character {position}")
        position, going_on = end.end(), end[1] == ","


def is_prompt(value: Any) -> bool:
    """Whether a value of seeds.json is a folder and its seeds."""

    def is_name(part: Any) -> bool:
        return is_text(part) and len(part.encode()) <= LONGEST_NAME

    return isinstance(value, list) and len(value) == 2 and is_name(value[0]) and is_list_of(is_name)(value[1])


def places_of(wanted: np.ndarray, names: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """The indices of the `wanted` strings in `names`, which `order` sorts, and the strings that are not in `names`."""
    ranks = np.empty(len(wanted), np.int64)
    by_name = np.argsort(wanted, kind="stable")
    ranks[by_name] = np.searchsorted(names, wanted[by_name], sorter=order)
    ranks = ranks.clip(max=len(names) - 1)
    found = names[order[ranks]] == wanted if len(names) else np.zeros(len(wanted), bool)
    return order[ranks[found]], wanted[~found].tolist()


class HubTable(ReducibleImages):
    """Edits of a Hugging Face `datasets` table or image folder (what `load_dataset` returns for one split).

    The columns are named by the arguments; the defaults are those of timbrooks/instructpix2pix-clip-filtered.
    MagicBrush's are source_img, instruction, target_img. Rows are decoded when they are read; a row whose instruction
    is missing or is not a text is skipped.
    """

    def __init__(
        self,
        table: Any,
        image: str = "original_image",
        instruction: str = "edit_prompt",
        edited: str = "edited_image",
    ):
        from datasets import Dataset
        from datasets import Image as ImageFeature

        self.columns, self.skipped = [image, instruction, edited], Skipped()
        if not isinstance(table, Dataset):
            raise TypeError(
                "`table` must be a datasets.Dataset, as `load_dataset` returns with `split` and without `streaming`;"
                f" got {type(table).__name__}."
            )
        if len(set(self.columns)) < 3:
            raise ValueError(f"`image`, `instruction` and `edited` must be three columns; got {self.columns}.")
        unknown = sorted(set(self.columns) - set(table.column_names))
        if unknown:
            raise ValueError(
                f"`table` has no column {unknown}; it has {', '.join(table.column_names)}. Pass the column names. A"
                " folder of images needs a metadata.jsonl."
            )
        for column in (image, edited):
            if not isinstance(feature := table.features[column], ImageFeature):
                raise ValueError(
                    f"`table` must have images in the column {column!r}; got {feature}. For paths, call"
                    f" `table.cast_column({column!r}, datasets.Image())`."
                )
        self.table = table.select_columns(self.columns)
        rows = []
        for row, text in enumerate(table[instruction]):
            if not isinstance(text, str | None):
                self.skipped.append((f"row {row}", f"an instruction that is not a text but {type(text).__name__}"))
            elif text and text.strip(BLANK):
                rows.append(row)
            else:
                self.skipped.append((f"row {row}", "no instruction"))
        require_samples("`table`", rows, self.skipped)
        self._rows = np.array(rows)

    @classmethod
    def load(
        cls, name: str | PathLike[str], split: str = "train", revision: str | None = None, **columns: str
    ) -> Self:
        """Read a table: a folder of images or parquet files, a parquet file, a folder of `save_to_disk`, a Hub id.

        Args:
            name: the folder, file or Hub id.
            split: the part of the table, as in `load_dataset`. A folder of `save_to_disk` without splits is "train".
            revision: branch, tag or commit of the Hub.
            columns: the arguments `image`, `instruction` and `edited` of the class.

        Raises:
            ValueError: if the table cannot be read, or has no such split or columns.
            OSError: if the Hub cannot be reached.
        """
        from datasets import DatasetDict, load_dataset, load_from_disk  # from the extra `data`
        from datasets.exceptions import DatasetGenerationError

        path = Path(name)
        on_hub = not path.exists()
        if path.is_file() and path.suffix != ".parquet":
            raise ValueError(f"`name` must be a folder, a parquet file or a Hub id; got the file {name}.")
        try:
            if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
                table = load_from_disk(str(path))
            elif path.suffix == ".parquet" and path.is_file():
                table = load_dataset("parquet", data_files=str(path), split=split)
            else:
                table = load_dataset(path.as_posix(), split=split, revision=revision)
        except Exception as error:
            # A damaged file can raise any exception, as can a folder with a script, which `datasets` does not run.
            if on_hub and not isinstance(error, DatasetGenerationError | RuntimeError | ValueError):
                raise OSError(f"`name`: there is no folder {name}, and the Hub answers: {error}") from error
            raise ValueError(f"`name`: {name} cannot be read as a table: {error.__cause__ or error}") from error
        if isinstance(table, DatasetDict):
            if split not in table:
                raise ValueError(f"`split` must be one of {', '.join(table)}; got {split!r}.")
            table = table[split]
        elif (path / "state.json").is_file() and split != "train":
            raise ValueError(f"`split` must be 'train', because {name} was saved without splits; got {split!r}.")
        return cls(table, **columns)

    def reduce_to(self, size: int) -> None:
        from datasets import Image as ImageFeature

        super().reduce_to(size)
        for column in (self.columns[0], self.columns[2]):
            if isinstance(self.table.features[column], ImageFeature):
                self.table = self.table.cast_column(column, ImageFeature(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        place = int(self._rows[index])
        try:
            row = self.table[place]
            image, text, edited = (row[column] for column in self.columns)
            return self._picture(image, index), Edit(text.strip(BLANK), self._picture(edited, index))
        except UnreadableSample:
            raise
        except Exception as error:  # a damaged file can raise any exception
            raise UnreadableSample(self.name(index), f"{type(error).__name__}: {error}") from error

    def _picture(self, value: Any, index: int) -> Image.Image:
        """An image of a row. After `reduce_to` the value is an encoded image."""
        if not isinstance(value, dict):
            return upright_rgb(value)
        if value["bytes"] is not None:
            return self._read_image(io.BytesIO(value["bytes"]), self.name(index))
        if os.path.isfile(value["path"]):
            return self._read_image(value["path"], self.name(index))
        from datasets import Image as ImageFeature

        return upright_rgb(ImageFeature().decode_example(value))  # of a URL

    def name(self, index: int) -> str:
        return f"row {self._rows[index]}"
