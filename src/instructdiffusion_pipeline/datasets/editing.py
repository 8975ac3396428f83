"""A picture, an instruction and the edited picture: InstructPix2Pix, GIER, GQA-Inpaint, MagicBrush, Hub tables."""

import io
import json
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.datasets import (
    Skipped,
    UnreadableSample,
    list_records,
    read_annotations,
    read_image,
    require_samples,
)
from instructdiffusion_pipeline.pipeline_instruct_diffusion import upright_rgb
from instructdiffusion_pipeline.types import Edit

T = TypeVar("T")
BLANK = " \t\r\n\ufeff"  # what is cut off instructions: white space, and the byte order mark of some editors

# InstructPix2Pix and GIER come without splits; the original cuts them at these shares.
SHARES = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}


def part_of(items: Sequence[T], split: str) -> Sequence[T]:
    """The share of `items` that `split` (train, val, test) stands for: the first nine tenths, and a twentieth each."""
    if split not in SHARES:
        raise ValueError(f"`split` must be one of {', '.join(SHARES)}; got {split!r}.")
    first, last = (int(share * len(items)) for share in SHARES[split])
    return items[first:last]


class EditTriples:
    """Edits that are listed somewhere: paths from `folder` to the picture and the edited picture, and an instruction.

    Pictures of a triple may differ in size. `pictures` counts the pairs: a pair may come with several instructions.
    A triple that lacks one of the three (None) is skipped.
    """

    def __init__(self, folder: str | PathLike[str], triples: Iterable[tuple[str | None, str | None, str | None]]):
        self.folder, self.skipped = Path(folder), Skipped()
        self._triples: list[tuple[str, str, str]] = []
        for before, instruction, after in triples:
            if not before or not after:
                self.skipped.append((f"{before} to {after}: {instruction}", "no file name"))
            elif missing := [path for path in (before, after) if not (self.folder / path).is_file()]:
                self.skipped.append((missing[0], "a missing file"))
            elif not instruction or not instruction.strip():
                self.skipped.append((f"{before} to {after}", "no instruction"))
            else:
                self._triples.append((before, instruction.strip(), after))
        require_samples(self.folder, self._triples, self.skipped)
        self.pictures = len({(before, after) for before, _, after in self._triples})

    def __len__(self) -> int:
        return len(self._triples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        before, instruction, after = self._triples[index]
        return read_image(self.folder / before), Edit(instruction, read_image(self.folder / after))

    def name(self, index: int) -> str:
        before, instruction, after = self._triples[index]
        return f"{before} to {after}: {instruction}"


def gier(root: str | PathLike[str], split: str = "train") -> EditTriples:
    """GIER: GIER.json and images/. Each summary, an expert's or an amateur's, is an instruction of its own."""
    root = Path(root)
    items = list_records(read_annotations(root / "GIER.json", "a JSON file of edits"), root / "GIER.json")

    def path(file: str | None) -> str | None:
        return file and file.replace("/", "_")

    return EditTriples(
        root / "images",
        (
            (path(item.get("input")), text, path(item.get("output")))
            for item in part_of(items, split)
            for text in dict.fromkeys(
                (item.get("expert_summary") or []) + (item.get("amateur_summary") or []) or [None]
            )
        ),
    )


def magicbrush(root: str | PathLike[str], split: str = "train") -> EditTriples:
    """MagicBrush: {split}/edit_turns.json (or edit_sessions.json) and {split}/images/; splits train, dev, test."""
    root = Path(root)
    turns_file = root / split / "edit_turns.json"
    if turns_file.is_file():
        turns = list_records(read_annotations(turns_file, "a JSON file of turns"), turns_file)
    else:
        file = root / split / "edit_sessions.json"
        sessions = read_annotations(file, "a JSON file of sessions")
        turns = [turn for session in dict(sessions) for turn in list_records(sessions, file, session)]

    def path(file: str | None) -> str | None:
        return file and f"{file.split('-')[0]}/{file}"

    return EditTriples(
        root / split / "images",
        ((path(turn.get("input")), turn.get("instruction"), path(turn.get("output"))) for turn in turns),
    )


def gqa_inpaint(root: str | PathLike[str], split: str = "train") -> EditTriples:
    """GQA-Inpaint: objects taken out of GQA's images/{picture}.jpg in images_inpainted/{picture}/{object}.jpg.

    The words come from {split}_instructions.json where there is one (test), else from {split}_scenes.json: the name
    of the object, and its relation to another where there are several of the name. One that this does not tell apart
    is skipped.
    """
    root = Path(root)
    scenes = read_annotations(root / f"{split}_scenes.json", "a JSON file of scenes")
    fixed_file = root / f"{split}_instructions.json"
    fixed = read_annotations(fixed_file, "a JSON file of instructions") if fixed_file.is_file() else None
    return EditTriples(
        root,
        (
            (
                f"images/{picture}.jpg",
                fixed.get(f"i{picture}-o{id}", "") if fixed is not None else removal(scene["objects"], id),
                f"images_inpainted/{picture}/{id}.jpg",
            )
            for picture, scene in scenes.items()
            for id, item in scene["objects"].items()
            if item.get("bidirected", True)
        ),
    )


def removal(objects: dict[str, Any], id: str) -> str:
    """Words that ask to remove one object of a GQA scene; none where its name and relations do not tell it apart."""
    counts = Counter(item["name"] for item in objects.values())
    name = objects[id]["name"]
    if counts[name] == 1:
        return f"remove the {name}"
    for relation in objects[id].get("relations", []):
        other = objects.get(relation["object"], {}).get("name")
        if counts[other] == 1:
            return f"remove the {name} {relation['name']} the {other}"
    return ""


class InstructPix2Pix:
    """InstructPix2Pix's generated data in its zip files, shard-00.zip and on; one item a pair of pictures.

    A shard holds folders with a prompt.json (its "edit" is the instruction), metadata.jsonl and pairs {seed}_0.jpg,
    {seed}_1.jpg. The zip files stay packed. Only places in them are held in memory, no open file, so that workers may
    share the data set. `split`: see `part_of`; it parts prompts, not pairs.
    """

    def __init__(self, root: str | PathLike[str], split: str = "train"):
        self.skipped = Skipped()
        self.shards = sorted(Path(root).glob("shard-*.zip"))
        members: dict[str, dict[str, tuple[int, int, int, int]]] = {}
        for number, shard in enumerate(self.shards):
            try:
                with zipfile.ZipFile(shard) as archive:
                    for entry in archive.infolist():
                        folder, _, file = entry.filename.rpartition("/")
                        if file.endswith((".jpg", "prompt.json")):
                            place = (number, entry.header_offset, entry.compress_size, entry.compress_type)
                            members.setdefault(folder, {})[file] = place
            except (OSError, zipfile.BadZipFile) as error:
                self.skipped.append((shard.name, f"a broken zip file ({error})"))
        names, places = [], []
        for folder in part_of(sorted(members), split):
            files = members[folder]
            for before in sorted(file for file in files if file.endswith("_0.jpg")):
                after = before.replace("_0.jpg", "_1.jpg")
                missing = [file for file in ("prompt.json", after) if file not in files]
                if missing:
                    self.skipped.append((f"{folder}/{missing[0]}", "a missing file"))
                else:
                    names.append(f"{folder}/{before}")
                    places.append([files[file] for file in ("prompt.json", before, after)])
        require_samples(root, names, self.skipped)
        # Arrays, because there are a million pairs.
        self._names = np.array(names, dtype=bytes)
        self._places = np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        name = self.name(index)
        try:
            prompt, before, after = (self._member(*place) for place in self._places[index].tolist())
            instruction = json.loads(prompt)["edit"].strip()
        except Exception as error:  # whatever a cut or changed zip file and a broken JSON may raise
            raise UnreadableSample(name, f"{type(error).__name__}: {error}") from error
        if not instruction:
            raise UnreadableSample(name, "no instruction")
        return read_image(io.BytesIO(before), name), Edit(instruction, read_image(io.BytesIO(after), name))

    def name(self, index: int) -> str:
        return f"{self.shards[self._places[index, 0, 0]].name}/{self._names[index].decode()}"

    def _member(self, shard: int, offset: int, size: int, method: int) -> bytes:
        """One file of a shard: it lies behind a header of 30 bytes, its name and an extra field."""
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            file.seek(name_length + extra_length, io.SEEK_CUR)
            data = file.read(size)
        return zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data


class HubTable:
    """Edits of a Hugging Face `datasets` table or image folder (what `load_dataset` returns for one split).

    The columns are named by the arguments; the defaults are those of timbrooks/instructpix2pix-clip-filtered.
    MagicBrush's are source_img, instruction, target_img. Rows are decoded when they are read; a row whose instruction
    is missing or no text is skipped.
    """

    def __init__(
        self,
        table: Any,
        image: str = "original_image",
        instruction: str = "edit_prompt",
        edited: str = "edited_image",
    ):
        self.columns, self.skipped = [image, instruction, edited], Skipped()
        unknown = sorted(set(self.columns) - set(table.column_names))
        if unknown:
            raise ValueError(
                f"`table` has no column {unknown}, but {', '.join(table.column_names)}; rename those, or name them as"
                " arguments. A folder of pictures needs a metadata.jsonl."
            )
        self.table = table.select_columns(self.columns)
        rows = []
        for row, text in enumerate(table[instruction]):
            if not isinstance(text, str | None):
                self.skipped.append((f"row {row}", f"an instruction that is no text but a {type(text).__name__}"))
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
        """Read a table: a folder of pictures or parquet files, a parquet file, a folder of `save_to_disk`, a Hub id.

        Args:
            name: the folder, file or Hub id.
            split: the part of the table, as in `load_dataset`; not for a folder of `save_to_disk` without splits.
            revision: branch, tag or commit of the Hub.
            columns: the arguments `image`, `instruction` and `edited` of the class.

        Raises:
            ValueError: the table cannot be read, or has no such split or columns.
            OSError: the Hub cannot be reached.
        """
        from datasets import DatasetDict, load_dataset, load_from_disk  # of the extra `data`
        from datasets.exceptions import DatasetGenerationError

        path = Path(name)
        try:
            if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
                table = load_from_disk(str(path))
            elif path.suffix == ".parquet" and path.is_file():
                table = load_dataset("parquet", data_files=str(path), split=split)
            else:
                table = load_dataset(str(name), split=split, revision=revision)
        # What `datasets` raises for broken files, and for a folder with a script, which it does not run.
        except (DatasetGenerationError, RuntimeError) as error:
            raise ValueError(f"`name`: {name} cannot be read as a table: {error.__cause__ or error}") from error
        if isinstance(table, DatasetDict):
            if split not in table:
                raise ValueError(f"`split` must be one of {', '.join(table)}; got {split!r}.")
            table = table[split]
        return cls(table, **columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Edit]:
        place = int(self._rows[index])
        try:
            row = self.table[place]
            image, text, edited = (row[column] for column in self.columns)
            return upright_rgb(image), Edit(text.strip(BLANK), upright_rgb(edited))
        except Exception as error:  # decoders raise nearly anything on a broken file
            raise UnreadableSample(self.name(index), f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        return f"row {self._rows[index]}"
