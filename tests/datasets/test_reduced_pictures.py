"""Large JPEGs are decoded at a smaller size for training, and only there."""

import json
import random
from pathlib import Path

import datasets as hub
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from instructdiffusion_pipeline.datasets import UnreadableSample, read_image
from instructdiffusion_pipeline.datasets.editing import HubTable
from instructdiffusion_pipeline.datasets.specs import load_sources, load_test_sources

SIZE = 30


def save_photograph(path: Path, width: int = 640, height: int = 480, seed: int = 0, **options) -> Path:
    small = tiny.picture(10, 8, seed)
    small.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, **options)
    return path


def turned_left() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@settings(max_examples=60)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 200), st.sampled_from(["RGB", "L", "CMYK"]))
def test_reduced_sides_are_at_least_twice_those_after_resizing(tmp_path_factory, width, height, size, mode):
    path = tmp_path_factory.mktemp("pictures") / "a.jpg"
    Image.new(mode, (width, height)).save(path)
    picture = read_image(path, resized_to=size)
    scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(width, height) >= 2 * size * scale)
    assert picture.size == (-(-width // scale), -(-height // scale))
    assert min(picture.size) >= min(width, height, 2 * size)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("a.jpg", {}, (80, 60)),
        ("a.jpg", {"progressive": True}, (80, 60)),
        ("a.mpo", {"save_all": True, "append_images": [tiny.picture()]}, (80, 60)),  # of telephones
        ("a.jpg", {"exif": turned_left()}, (60, 80)),
        ("a.png", {}, (640, 480)),
        ("a.webp", {}, (640, 480)),
    ],
)
def test_formats_and_orientations(tmp_path, name, options, size):
    path = save_photograph(tmp_path / name, **options)
    reduced, whole = read_image(path, resized_to=SIZE), read_image(path)
    assert reduced.size == size and sorted(whole.size) == [480, 640]
    square = (SIZE, SIZE)
    reduced, whole = (np.asarray(image.resize(square, Image.Resampling.LANCZOS), int) for image in (reduced, whole))
    assert np.abs(reduced - whole).mean() < 1 and np.abs(reduced - whole).max() < 8


def write_table(folder: Path) -> None:
    folder.mkdir()
    save_photograph(folder / "before.jpg", exif=turned_left())
    save_photograph(folder / "after.jpg", 1280, 960, exif=turned_left(), seed=1)
    row = {"original_image_file_name": "before.jpg", "edited_image_file_name": "after.jpg", "edit_prompt": "dim it"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))


def write_parquet(folder: Path) -> None:
    write_table(folder)
    content = {
        "original_image": [(folder / "before.jpg").read_bytes()],
        "edit_prompt": ["dim it"],
        "edited_image": [(folder / "after.jpg").read_bytes()],
    }
    features = {"original_image": hub.Image(), "edit_prompt": hub.Value("string"), "edited_image": hub.Image()}
    table = hub.Dataset.from_dict(content, features=hub.Features(features))
    for file in folder.iterdir():
        file.unlink()
    table.to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("write", [write_table, write_parquet])
def test_tables(tmp_path, write):
    write(tmp_path / "mine")
    entry = f"table={tmp_path / 'mine'}"
    (training, _), (test,) = load_sources([entry], SIZE)[0], load_test_sources([entry], SIZE)
    image, edit = training.dataset[0]
    assert image.size == (60, 80) and edit.edited.size == (120, 160), "an eighth of 480 x 640 and of 960 x 1280"
    image, edit = test.dataset[0]
    assert image.size == (480, 640) and edit.edited.size == (960, 1280), "evaluation reads whole images"
    reduced, whole = (source.read(0, random.Random(0)) for source in (training, test))
    for first, second in ((reduced[0], whole[0]), (reduced[1].edited, whole[1].edited)):
        assert first.size == (SIZE, SIZE)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < 1


def test_folders_of_triples_and_of_captions(tmp_path):
    items = [{"input": f"{n}a.jpg", "output": f"{n}b.jpg", "expert_summary": ["dim it"]} for n in range(2)]
    (tmp_path / "GIER.json").write_text(json.dumps(items))
    (tmp_path / "images").mkdir()
    for name in ("0a", "0b", "1a", "1b"):
        save_photograph(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "images" / f"{name}.txt").write_text("a cat")
    entries = [f"gier={tmp_path}", f"captions={tmp_path / 'images'}"]
    for source, _ in load_sources(entries, SIZE):
        assert source.dataset[0][0].size == (80, 60)
        assert source.read(0, random.Random(0))[0].size == (SIZE, SIZE)
    assert load_test_sources(entries[:1], SIZE)[0].dataset[0][0].size == (640, 480)


def test_unreadable_files_are_reported_as_without_reducing(tmp_path):
    path = save_photograph(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    rows = {"original_image": [str(path), None, str(tmp_path / "no.jpg")], "edit_prompt": ["dim it"] * 3}
    features = {"original_image": hub.Image(), "edit_prompt": hub.Value("string"), "edited_image": hub.Image()}
    table = HubTable(
        hub.Dataset.from_dict(rows | {"edited_image": [tiny.picture()] * 3}, features=hub.Features(features))
    )
    table.reduce_to(SIZE)
    for index in range(3):
        with pytest.raises(UnreadableSample, match=f"row {index}"):
            table[index]
