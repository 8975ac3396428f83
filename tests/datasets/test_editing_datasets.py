import io
import json
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import datasets as hub
import pytest
import tiny
from folders import same, save_image, write_broken, write_json
from hypothesis import given
from hypothesis import strategies as st

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.editing import (
    HubTable,
    InstructPix2Pix,
    gier,
    gqa_inpaint,
    json_entries,
    magicbrush,
    part_of,
)
from instructdiffusion_pipeline.datasets.zip_files import list_files, read_file

BEFORE, AFTER = tiny.picture(40, 30, seed=1), tiny.picture(40, 30, seed=2)


def is_triple(item, instruction):
    image, edit = item
    return same(image, BEFORE) and same(edit.edited, AFTER) and edit.instruction == instruction


def test_datasets_without_splits_are_split():
    parts = [part_of(range(1000), split) for split in ("train", "val", "test")]
    assert parts == [range(900), range(900, 950), range(950, 1000)]
    assert [len(part_of(range(40), split)) for split in ("train", "val", "test")] == [36, 2, 2]
    with pytest.raises(ValueError, match="`split` must be one of train, val, test; got 'dev'"):
        part_of([], "dev")


def gier_item(number, **changes):
    item = {"input": f"a/{number}.jpg", "output": f"b_{number}.jpg", "request": "crawled", "detailed_request": ""}
    return item | {"expert_summary": ["darker", "less light"], "amateur_summary": ["darker"], "operator": {}} | changes


def test_gier(tmp_path):
    write_json(tmp_path / "GIER.json", [gier_item(n) for n in range(9)] + [gier_item(9, amateur_summary=[" dim "])])
    for number in range(10):
        save_image(tmp_path / "images" / f"a_{number}.jpg", BEFORE)
        save_image(tmp_path / "images" / f"b_{number}.jpg", AFTER)
    train, test = gier(tmp_path), gier(tmp_path, "test")
    assert (len(train), train.pictures, len(test), test.pictures) == (18, 9, 3, 1)
    assert is_triple(train[0], "darker") and is_triple(train[1], "less light") and is_triple(test[2], "dim")
    assert train.name(1) == "a_0.jpg to b_0.jpg: less light"


def test_no_image_of_gier_is_in_two_splits(tmp_path):
    write_json(tmp_path / "GIER.json", [gier_item(n % 20, output=f"b_{n}.jpg") for n in range(60)])
    for number in range(60):
        save_image(tmp_path / "images" / f"a_{number % 20}.jpg", BEFORE)
        save_image(tmp_path / "images" / f"b_{number}.jpg", AFTER)
    parts = {split: gier(tmp_path, split) for split in ("train", "val", "test")}
    inputs = {split: {data.name(i).split()[0] for i in range(len(data))} for split, data in parts.items()}
    assert {split: len(names) for split, names in inputs.items()} == {"train": 18, "val": 1, "test": 1}
    assert len(set.union(*inputs.values())) == 20 and sum(data.pictures for data in parts.values()) == 60


@pytest.mark.parametrize("folder", ["", "splits"])
def test_gier_has_the_published_splits(folder, tmp_path):
    items = [gier_item(n) | {"detailed_request": float("nan")} for n in range(10)]
    write_json(tmp_path / "GIER.json", items)
    for number in range(10):
        save_image(tmp_path / "images" / f"a_{number}.jpg", BEFORE)
        save_image(tmp_path / "images" / f"b_{number}.jpg", AFTER)
    for split, chosen in (("train", items[2:]), ("val", items[1:2]), ("test", items[:1])):
        write_json(tmp_path / folder / f"{split}_sess_3.json", chosen)
    found = {split: gier(tmp_path, split) for split in ("train", "val", "test")}
    assert {split: data.pictures for split, data in found.items()} == {"train": 8, "val": 1, "test": 1}
    assert found["val"].name(0).startswith("a_1.jpg")


def test_missing_entries_of_triples_are_listed(tmp_path):
    items = [gier_item(0), gier_item(1), gier_item(2, expert_summary=[], amateur_summary=[])] + [gier_item(3)] * 7
    items[3:5] = [gier_item(0, expert_summary=None, amateur_summary=["dim"]), gier_item(2, expert_summary=[None])]
    nothing = {"output": "b_2.jpg"}
    items[5:7] = [nothing, gier_item(2, expert_summary=None, amateur_summary=None)]
    write_json(tmp_path / "GIER.json", items)
    for number in (0, 2):
        save_image(tmp_path / "images" / f"a_{number}.jpg", BEFORE)
        save_image(tmp_path / "images" / f"b_{number}.jpg", AFTER)
    save_image(tmp_path / "images" / "a_1.jpg")
    write_broken(tmp_path / "images" / "b_0.jpg")
    dataset = gier(tmp_path)
    assert ("b_1.jpg", "a missing file") in dataset.skipped
    assert dataset.skipped.count(("a_2.jpg to b_2.jpg", "no instruction")) == 3
    assert ("None to b_2.jpg: None", "no file name") in dataset.skipped
    assert [dataset.name(index).split(": ")[1] for index in (0, 1, 2, 3)] == ["darker", "less light", "dim", "darker"]
    with pytest.raises(UnreadableSample, match="b_0.jpg"):
        dataset[0]
    with pytest.raises(ValueError, match="images: no usable samples; skipped 6 with a missing file"):
        gier(tmp_path, "test")


@pytest.mark.parametrize(
    "read, name",
    [
        (gier, "GIER.json"),
        (magicbrush, "train/edit_turns.json"),
        (magicbrush, "train/edit_sessions.json"),
        (gqa_inpaint, "train_scenes.json"),
        (gqa_inpaint, "train_instructions.json"),
    ],
)
def test_lists_that_cannot_be_read_raise_errors(read, name, tmp_path):
    write_json(tmp_path / "train_scenes.json", {})
    write_json(tmp_path / name, {}).write_text("{")
    with pytest.raises(ValueError, match=f"{name} must be a JSON file of .*; got JSONDecodeError"):
        read(tmp_path)


@pytest.mark.parametrize("content", [{"items": []}, ["a.jpg"]])
@pytest.mark.parametrize("read, name", [(gier, "GIER.json"), (magicbrush, "train/edit_turns.json")])
def test_lists_of_a_wrong_structure_raise_errors(read, name, content, tmp_path):
    write_json(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name} must contain a list of objects; got "):
        read(tmp_path)


@pytest.mark.parametrize("name", ["edit_turns.json", "edit_sessions.json"])
def test_magicbrush(name, tmp_path):
    turns = [
        {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": None},
        {"mask": "7-mask1.png", "output": "7-output1.png", "instruction": "add a dog"},
        {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png"},
        {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "add a cat"},
        {"input": "7-output1.png", "mask": "7-mask2.png", "output": "7-output2.png", "instruction": "make it red"},
    ]
    write_json(tmp_path / "dev" / name, turns if name == "edit_turns.json" else {"7": turns})
    for picture in ("input", "output1"):
        save_image(tmp_path / "dev" / "images" / "7" / f"7-{picture}.png", BEFORE)
    save_image(tmp_path / "dev" / "images" / "7" / "7-output2.png", AFTER)
    dataset = magicbrush(tmp_path, "dev")
    assert len(dataset) == 2 and is_triple(dataset[1], "make it red")
    silent = ("7/7-input.png to 7/7-output1.png", "no instruction")
    assert dataset.skipped == [silent, ("None to 7/7-output1.png: add a dog", "no file name"), silent]


def write_scenes(root, scenes, split="train"):
    """Scenes of GQA; objects as (id, name, position)."""
    content = {
        picture: {
            "objects": {id: {"name": name, "relations": [{"name": "near", "object": "1"}]} for id, name, _ in items},
            "image_relative_positions": {id: position for id, _, position in items},
        }
        for picture, items in scenes.items()
    }
    for picture, items in scenes.items():
        save_image(root / "images" / f"{picture}.jpg", BEFORE)
        for id, _, _ in items:
            save_image(root / "images_inpainted" / picture / f"{id}.jpg", AFTER)
    return write_json(root / f"{split}_scenes.json", content)


def test_gqa_inpaint_skips_ambiguous_objects(tmp_path):
    left, center, right = ("to the left", "to the center", "to the right")
    scenes = {
        "10": [("1", "car", left), ("2", "man", left), ("3", "man", center), ("4", "man", right)],
        "11": [
            ("5", "cat", left),
            ("6", "cat", right),
            ("7", "dog", center),
            ("8", "dog", center),
            ("9", "cow", left),
        ],
    }
    write_scenes(tmp_path, scenes)
    data = gqa_inpaint(tmp_path)
    said = {data.name(index).split("/")[-1] for index in range(len(data))}
    assert said == {
        "1.jpg: remove the car",
        "5.jpg: remove the cat at the left",
        "6.jpg: remove the cat at the right",
        "9.jpg: remove the cow",
    }
    assert is_triple(data[0], "remove the car")
    assert len(data.skipped) == 5 and {why for _, why in data.skipped} == {"no instruction"}
    with pytest.raises(ValueError, match="`split` must be one of train, test; got 'val'"):
        gqa_inpaint(tmp_path, "val")


def test_gqa_inpaint_has_fixed_instructions_in_the_test_split(tmp_path):
    scenes = {"10": [("1", "man", "to the left"), ("2", "man", "to the left"), ("3", "man", "to the left")]}
    write_scenes(tmp_path, scenes, "test")
    write_json(tmp_path / "test_instructions.json", {"i10-o2": "remove the man at the left"})
    data = gqa_inpaint(tmp_path, "test")
    assert len(data) == 1 and is_triple(data[0], "remove the man at the left")


def test_a_malformed_scene_is_skipped(tmp_path):
    file = write_scenes(tmp_path, {"10": [("1", "car", "to the left")]})
    malformed = {
        "11": None,
        "12": [],
        "13": {"objects": []},
        "14": {"objects": {"1": {}}},
        "15": {"objects": {"1": 5}},
    }
    write_json(file, json.loads(file.read_text()) | malformed)
    data = gqa_inpaint(tmp_path)
    assert data.skipped == [(f"image {number}", "a malformed scene") for number in malformed] and len(data) == 1


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, *files, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)


def prompt(folder, edit="make it winter"):
    texts = {"caption": "a field", "edit": edit, "output": "a field in winter", "input": "a field", "url": ""}
    return f"{folder}/prompt.json", json.dumps(texts)


def pair(folder, seed, before=None, after=None):
    return [(f"{folder}/{seed}_0.jpg", before or png(BEFORE)), (f"{folder}/{seed}_1.jpg", after or png(AFTER))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_instructpix2pix(method, tmp_path):
    first = [(f"00{n}/metadata.jsonl", "{}") for n in range(5)] + [prompt(f"00{n}") for n in range(5)]
    write_shard(tmp_path / "shard-00.zip", *first, *pair("000", 11), *pair("000", 12), *pair("001", 3), method=method)
    second = [prompt(f"01{n}") for n in range(5)]
    write_shard(tmp_path / "shard-01.zip", *second, *pair("010", 5), *pair("014", 6), method=method)
    train = InstructPix2Pix(tmp_path)
    names = ["shard-00.zip/000/11_0.jpg", "shard-00.zip/000/12_0.jpg", "shard-00.zip/001/3_0.jpg"]
    assert [train.name(index) for index in range(len(train))] == [*names, "shard-01.zip/010/5_0.jpg"]
    for dataset in (train, pickle.loads(pickle.dumps(train))):
        assert all(is_triple(dataset[index], "make it winter") for index in range(4))
    # the last twentieth of ten prompts, rounded as in the original code
    assert [InstructPix2Pix(tmp_path, "test").name(0)] == ["shard-01.zip/014/6_0.jpg"]


def test_missing_entries_of_shards_are_listed(tmp_path):
    files = [prompt("0"), *pair("0", 1), prompt("1", " "), *pair("1", 1), ("2/prompt.json", "{"), *pair("2", 1)]
    files += [prompt("3"), pair("3", 1)[0], prompt("4"), *pair("4", 1, before=png(BEFORE)[:300]), *pair("5", 1)]
    write_shard(tmp_path / "shard-00.zip", *files, *(prompt(f"9{n}") for n in range(3)))
    (tmp_path / "shard-01.zip").write_bytes(b"half a download")
    dataset = InstructPix2Pix(tmp_path)
    assert dataset.skipped[0][0] == "shard-01.zip" and "damaged zip file" in dataset.skipped[0][1]
    assert dataset.skipped[1:] == [("3/1_1.jpg", "a missing file"), ("5/prompt.json", "a missing file")]
    assert len(dataset) == 4 and is_triple(dataset[0], "make it winter")
    for index, cause in [(1, "1/1_0.jpg: no instruction"), (2, "2/1_0.jpg: JSON"), (3, "shard-00.zip/4/1_0.jpg")]:
        with pytest.raises(UnreadableSample, match=cause):
            dataset[index]
    (tmp_path / "shard-00.zip").write_bytes(b"cut while training")
    with pytest.raises(UnreadableSample, match="0/1_0.jpg"):
        dataset[0]
    (tmp_path / "shard-00.zip").unlink()
    with pytest.raises(ValueError, match="no usable samples; skipped 1 with a damaged zip file"):
        InstructPix2Pix(tmp_path)


def test_instructpix2pix_has_the_published_order(tmp_path):
    files = [entry for n in (3, 1, 2) for entry in (prompt(f"00{n}"), *pair(f"00{n}", 30 + n), *pair(f"00{n}", n))]
    write_shard(tmp_path / "shard-00.zip", *files, ("005/7_0.jpg", png(BEFORE)), prompt("005"))
    seeds = [["002", ["2", "32"]], ["004", ["8", "9"]], ["001", ["1"]], ["003", ["3"]], ["005", ["7"]], ["000", ["1"]]]
    write_json(tmp_path / "seeds.json", seeds)
    train = InstructPix2Pix(tmp_path)
    names = [train.name(index) for index in range(len(train))]
    assert names == [f"shard-00.zip/00{name}_0.jpg" for name in ("2/2", "2/32", "1/1", "3/3")]
    assert all(is_triple(train[index], "make it winter") for index in range(4))
    assert train.skipped == [(f"{name}_0.jpg", "a missing file") for name in ("004/8", "004/9", "005/7")]
    with pytest.raises(ValueError, match="no usable samples; skipped 1 with a missing file"):
        InstructPix2Pix(tmp_path, "test")


@pytest.mark.parametrize(
    "content", [[[]], [["000"]], [["000", "1"]], [["000", [1]]], [[0, ["1"]]], [["\ud800", []]], [5]]
)
def test_seeds_of_a_wrong_structure_raise_errors(content, tmp_path):
    write_shard(tmp_path / "shard-00.zip", prompt("000"), *pair("000", 1))
    write_json(tmp_path / "seeds.json", content)
    with pytest.raises(ValueError, match=r"seeds.json must be a JSON list .*which is not \[folder, \[seed, ...\]\]"):
        InstructPix2Pix(tmp_path)


@given(
    entries=st.lists(st.recursive(st.none() | st.text() | st.integers(), st.lists)), indent=st.sampled_from([None, 1])
)
def test_entries_of_a_json_list_are_read_one_by_one(entries, indent):
    assert list(json_entries(f" {json.dumps(entries, indent=indent)}\n")) == entries


@pytest.mark.parametrize("text", ["", "{}", "5", "[", "[1", "[1,", "[1 2]", "[1,]", "[,1]", '["a]'])
def test_other_json_than_a_list_raises_an_error(text):
    with pytest.raises(ValueError):
        list(json_entries(text))


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("comment", [b"", b"a comment"])
def test_positions_of_files_in_a_zip_file_match_zipfile(limit, comment, tmp_path, monkeypatch):
    if limit:  # a small zip file with the structures of one of more than 4 GB
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = comment
        for number in range(5):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(f"{number}/prompt.json", b"winter " * 40 * number, method)
    with zipfile.ZipFile(path) as archive:
        expected = {
            entry.filename.encode(): (entry.header_offset, entry.compress_size) for entry in archive.infolist()
        }
        contents = {entry.filename.encode(): archive.read(entry) for entry in archive.infolist()}
    found = dict(list_files(path))
    assert found == expected
    assert {name: read_file(path, place) for name, place in found.items()} == contents


def test_a_damaged_zip_file_raises_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_shard(path, prompt("0"), *pair("0", 1))
    content, rng = path.read_bytes(), random.Random(0)
    expected = dict(list_files(path))
    for _ in range(500):
        damaged = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.randint(0, 4)):
            damaged[rng.randrange(max(0, len(damaged) - 300), len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for place in dict(list_files(path)).values():
                read_file(path, place)
        except (zipfile.BadZipFile, OverflowError):
            continue
    path.write_bytes(content)
    assert dict(list_files(path)) == expected


def test_a_zip_bomb_raises_an_error(tmp_path):
    path = tmp_path / "a.zip"
    write_shard(path, ("0/prompt.json", bytes(2**26 + 1)), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(zipfile.BadZipFile, match="a file of more than 67108864 bytes"):
        read_file(path, dict(list_files(path))[b"0/prompt.json"])


@pytest.mark.slow
def test_a_million_pairs_need_little_time_and_memory(tmp_path):
    """The lists of files of 30 shards as published: 10,400 folders each, of a prompt, metadata and three pairs."""
    write_large_shards(tmp_path, shards=30, folders=10_400, pairs=3)
    script = (
        "import re, sys, time\n"
        "from instructdiffusion_pipeline.datasets.editing import InstructPix2Pix\n"
        "status = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak is reset
        "before, start = status('VmRSS'), time.process_time()\n"
        "data = InstructPix2Pix(sys.argv[1])\n"
        "print(len(data), time.process_time() - start, status('VmHWM') - before)\n"
    )
    for published in (False, True):
        if published:
            seeds = [[f"{n:07}", [f"{4_000_000_000 + n + k}" for k in range(3)]] for n in range(312_000)]
            write_json(tmp_path / "seeds.json", seeds)
        run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
        pairs, seconds, megabytes = map(float, run.stdout.split())
        print(f"{pairs:.0f} pairs, seeds.json: {published}, {seconds:.1f} s, {megabytes:.0f} MB")
        assert pairs == 842_400 and seconds < 10 and megabytes < 250


def write_large_shards(root, shards, folders, pairs):
    """Zip files that contain only their central directories."""
    for shard in range(shards):
        entries = []
        for n in range(shard * folders, (shard + 1) * folders):
            seeds = [4_000_000_000 + n + k for k in range(pairs)]
            files = ["prompt.json", "metadata.jsonl", *(f"{seed}_{side}.jpg" for seed in seeds for side in (0, 1))]
            for file in files:
                name = f"{n:07}/{file}".encode()
                sizes = struct.pack("<LLHHH8xL", 9, 9, len(name), 0, 0, len(entries))
                entries.append(b"PK\x01\x02" + bytes(16) + sizes + name)
        directory = b"".join(entries)
        end = b"PK\x05\x06" + struct.pack("<8xLLH", len(directory), 0, 0)
        (root / f"shard-{shard:02}.zip").write_bytes(directory + end)


def magicbrush_table(root, split="train", rows=2):
    columns = {
        "img_id": [str(n) for n in range(rows)],
        "turn_index": [1] * rows,
        "source_img": [{"bytes": png(BEFORE)}] * rows,
        "mask_img": [{"bytes": png(BEFORE)}] * rows,
        "instruction": ["make it winter"] * rows,
        "target_img": [{"bytes": png(AFTER)}] * rows,
    }
    image = hub.Image()
    features = hub.Features(
        {name: image if name.endswith("_img") else hub.Value("string") for name in columns}
        | {"turn_index": hub.Value("int32")}
    )
    (root / "data").mkdir(parents=True, exist_ok=True)
    table = hub.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")


def test_published_magicbrush_has_a_table_for_training_and_a_folder_for_test(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "MagicBrush"
    magicbrush_table(root, "train", 3)
    magicbrush_table(root, "dev", 2)
    turn = {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "make it winter"}
    write_json(root / "test" / "edit_turns.json", [turn])
    save_image(root / "test" / "images" / "7" / "7-input.png", BEFORE)
    save_image(root / "test" / "images" / "7" / "7-output1.png", AFTER)
    for split, length in (("train", 3), ("dev", 2), ("test", 1)):
        data = magicbrush(root, split)
        assert len(data) == length and is_triple(data[0], "make it winter"), split


def test_an_image_folder_of_datasets(tmp_path):
    lines = []
    for number, text in enumerate(["make it winter", "", "break"]):
        save_image(tmp_path / f"{number}.png", BEFORE)
        save_image(tmp_path / f"{number}-after.png", AFTER)
        lines.append({"file_name": f"{number}.png", "after_file_name": f"{number}-after.png", "words": text})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = str(tmp_path / "cache")
    table = hub.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=cache)
    dataset = HubTable(table, image="image", instruction="words", edited="after")
    assert len(dataset) == 2 and is_triple(dataset[0], "make it winter")
    assert dataset.skipped == [("row 1", "no instruction")] and dataset.name(1) == "row 2"
    write_broken(tmp_path / "2-after.png")
    with pytest.raises(UnreadableSample, match="row 2"):
        dataset[1]


ROWS = {
    "original_image": [BEFORE, BEFORE, BEFORE],
    "edit_prompt": ["make it winter", "\ufeff make it night\n", ""],
    "edited_image": [AFTER] * 3,
}
FEATURES = hub.Features(
    {"original_image": hub.Image(), "edit_prompt": hub.Value("string"), "edited_image": hub.Image()}
)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def parquet_file(table, path):
    table.to_parquet(path / "mine.parquet")
    return path / "mine.parquet"


def parquet_folder(table, path):
    table.to_parquet(path / "test.parquet")
    return path


def saved(table, path):
    table.save_to_disk(path / "saved")
    return path / "saved"


def saved_splits(table, path):
    hub.DatasetDict(test=table, train=table.select([1])).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("write", [parquet_file, parquet_folder, saved, saved_splits])
def test_all_forms_of_tables_can_be_loaded(tmp_path, own_cache, write):
    name = write(hub.Dataset.from_dict(ROWS, features=FEATURES), tmp_path)
    split = "train" if write in (parquet_file, saved) else "test"
    table = HubTable.load(name, split)
    assert len(table) == 2 and is_triple(table[0], "make it winter") and is_triple(table[1], "make it night")
    if write is not saved:
        with pytest.raises(ValueError, match="nowhere"):
            HubTable.load(name, "nowhere")


def test_a_missing_folder_is_named_if_the_hub_has_no_such_table_either(own_cache):
    with pytest.raises(OSError, match="there is no folder my/pictures, and the Hub answers: .*my/pictures"):
        HubTable.load("my/pictures")


def test_tables_that_cannot_be_read_raise_errors_with_a_remedy():
    table = hub.Dataset.from_dict(ROWS, features=hub.Features(FEATURES))
    for other in (hub.DatasetDict(train=table), table.to_iterable_dataset()):
        with pytest.raises(TypeError, match=rf"`table` must be .* with `split` and .*; got {type(other).__name__}"):
            HubTable(other)
    with pytest.raises(ValueError, match="must be three columns; got .*'edited_image', 'edit_prompt', 'edited_image'"):
        HubTable(table, image="edited_image")
    paths = table.remove_columns("original_image").add_column("original_image", ["a.png"] * len(table))
    with pytest.raises(
        ValueError, match=r"images in the column 'original_image'; got .*\.cast_column\('original_image'"
    ):
        HubTable(paths)


def test_an_instruction_that_is_not_text_is_skipped():
    features = FEATURES | {"edit_prompt": hub.List(hub.Value("string"))}
    lists = hub.Dataset.from_dict(ROWS | {"edit_prompt": [["a", "b"]] * 3}, features=hub.Features(features))
    with pytest.raises(ValueError, match="skipped 3 with an instruction that is not a text but list"):
        HubTable(lists)


def picture_folder(path, first):
    path.mkdir()
    save_image(path / "before.png", BEFORE)
    save_image(path / "after.png", AFTER)
    row = {"original_image_file_name": first, "edited_image_file_name": "after.png", "edit_prompt": "make it winter"}
    (path / "metadata.jsonl").write_text(json.dumps(row))
    return path


def test_a_split_of_a_saved_table_without_splits_is_an_error(tmp_path, own_cache):
    from datasets import load_dataset

    load_dataset(str(picture_folder(tmp_path / "mine", "before.png")), split="train").save_to_disk(tmp_path / "saved")
    assert is_triple(HubTable.load(tmp_path / "saved", split="train")[0], "make it winter")
    for split in ("test", ""):
        with pytest.raises(ValueError, match="`split` must be 'train', because .*saved was saved without splits"):
            HubTable.load(tmp_path / "saved", split=split)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_damaged_saved_table_is_named(tmp_path, own_cache, file, content):
    from datasets import load_dataset

    load_dataset(str(picture_folder(tmp_path / "mine", "before.png")), split="train").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).write_bytes(content)
    with pytest.raises(ValueError, match="saved cannot be read as a table: "):
        HubTable.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["mine", "other"])
def test_a_script_in_a_folder_is_never_run(tmp_path, own_cache, name):
    folder = picture_folder(tmp_path / "mine", "before.png")
    (folder / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    if name == "mine":  # earlier versions of `datasets` ran a script with this name
        with pytest.raises(
            ValueError, match="mine cannot be read as a table: Dataset scripts are no longer supported"
        ):
            HubTable.load(folder)
    else:
        assert is_triple(HubTable.load(folder)[0], "make it winter")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/{}/secret.png", "http://127.0.0.1:9/secret.png"])
def test_a_file_name_outside_its_folder_raises_an_error(tmp_path, own_cache, name):
    save_image(tmp_path / "secret.png", BEFORE)
    folder = picture_folder(tmp_path / "mine", name.format(tmp_path))
    with pytest.raises(ValueError, match="mine cannot be read as a table: Invalid metadata file_name"):
        HubTable.load(folder)


def test_a_table_of_datasets():
    features = hub.Features(
        {"original_image": hub.Image(), "edit_prompt": hub.Value("string"), "edited_image": hub.Image()}
    )
    rows = {"original_image": [BEFORE, None], "edit_prompt": ["make it winter"] * 2, "edited_image": [AFTER] * 2}
    table = hub.Dataset.from_dict(rows, features=features)
    assert is_triple(HubTable(table)[0], "make it winter")
    with pytest.raises(UnreadableSample, match="row 1"):
        HubTable(table)[1]
    with pytest.raises(ValueError, match="`table` has no column .*'source_img'.*edit_prompt"):
        HubTable(table, image="source_img")
    with pytest.raises(ValueError, match="no usable samples; skipped 2 with no instruction"):
        HubTable(table.remove_columns("edit_prompt").add_column("edit_prompt", [None, " "]))
