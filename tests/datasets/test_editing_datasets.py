import io
import json
import pickle
import zipfile

import datasets as hub
import pytest
import tiny
from folders import same, save_image, write_broken, write_json

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.editing import (
    HubTable,
    InstructPix2Pix,
    gier,
    gqa_inpaint,
    magicbrush,
    part_of,
)

BEFORE, AFTER = tiny.picture(40, 30, seed=1), tiny.picture(40, 30, seed=2)


def is_triple(item, instruction):
    image, edit = item
    return same(image, BEFORE) and same(edit.edited, AFTER) and edit.instruction == instruction


def test_splits_part_what_comes_without():
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


def test_what_triples_lack_is_named(tmp_path):
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
    with pytest.raises(ValueError, match="images: no sample is left to use; skipped 2 with a missing file"):
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
def test_lists_that_cannot_be_read_are_named(read, name, tmp_path):
    write_json(tmp_path / "train_scenes.json", {})
    write_json(tmp_path / name, {}).write_text("{")
    with pytest.raises(ValueError, match=f"{name} must be a JSON file of .*; got JSONDecodeError"):
        read(tmp_path)


@pytest.mark.parametrize("content", [{"items": []}, ["a.jpg"]])
@pytest.mark.parametrize("read, name", [(gier, "GIER.json"), (magicbrush, "train/edit_turns.json")])
def test_lists_of_another_shape_are_named(read, name, content, tmp_path):
    write_json(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name} must hold a list of objects; got "):
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


def test_gqa_inpaint(tmp_path):
    objects = {
        "1": {"name": "dog", "relations": [], "bidirected": True},
        "2": {"name": "cat", "relations": [{"name": "near", "object": "3"}], "bidirected": True},
        "3": {"name": "cat", "relations": [{"name": "to the left of", "object": "1"}], "bidirected": True},
        "4": {"name": "tree", "relations": [], "bidirected": False},
    }
    write_json(tmp_path / "train_scenes.json", {"55": {"objects": objects}})
    write_json(tmp_path / "test_scenes.json", {"55": {"objects": objects}})
    write_json(tmp_path / "test_instructions.json", {"i55-o2": "remove the cat at the left"})
    save_image(tmp_path / "images" / "55.jpg", BEFORE)
    for id in "123":
        save_image(tmp_path / "images_inpainted" / "55" / f"{id}.jpg", AFTER)
    train, test = gqa_inpaint(tmp_path), gqa_inpaint(tmp_path, "test")
    assert is_triple(train[0], "remove the dog") and is_triple(train[1], "remove the cat to the left of the dog")
    assert train.skipped == [("images/55.jpg to images_inpainted/55/2.jpg", "no instruction")]
    assert len(test) == 1 and is_triple(test[0], "remove the cat at the left")


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
    # the last twentieth of ten prompts, rounded as the original does
    assert [InstructPix2Pix(tmp_path, "test").name(0)] == ["shard-01.zip/014/6_0.jpg"]


def test_what_shards_lack_is_named(tmp_path):
    files = [prompt("0"), *pair("0", 1), prompt("1", " "), *pair("1", 1), ("2/prompt.json", "{"), *pair("2", 1)]
    files += [prompt("3"), pair("3", 1)[0], prompt("4"), *pair("4", 1, before=png(BEFORE)[:300]), *pair("5", 1)]
    write_shard(tmp_path / "shard-00.zip", *files, *(prompt(f"9{n}") for n in range(3)))
    (tmp_path / "shard-01.zip").write_bytes(b"half a download")
    dataset = InstructPix2Pix(tmp_path)
    assert dataset.skipped[0][0] == "shard-01.zip" and "broken zip file" in dataset.skipped[0][1]
    assert dataset.skipped[1:] == [("3/1_1.jpg", "a missing file"), ("5/prompt.json", "a missing file")]
    assert len(dataset) == 4 and is_triple(dataset[0], "make it winter")
    for index, cause in [(1, "1/1_0.jpg: no instruction"), (2, "2/1_0.jpg: JSON"), (3, "shard-00.zip/4/1_0.jpg")]:
        with pytest.raises(UnreadableSample, match=cause):
            dataset[index]
    (tmp_path / "shard-00.zip").write_bytes(b"cut while training")
    with pytest.raises(UnreadableSample, match="0/1_0.jpg"):
        dataset[0]
    (tmp_path / "shard-00.zip").unlink()
    with pytest.raises(ValueError, match="no sample is left to use; skipped 1 with a broken zip file"):
        InstructPix2Pix(tmp_path)


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
def test_tables_in_every_form(tmp_path, own_cache, write):
    name = write(hub.Dataset.from_dict(ROWS, features=FEATURES), tmp_path)
    split = "train" if write in (parquet_file, saved) else "test"
    table = HubTable.load(name, split)
    assert len(table) == 2 and is_triple(table[0], "make it winter") and is_triple(table[1], "make it night")
    if write is not saved:
        with pytest.raises(ValueError, match="nowhere"):
            HubTable.load(name, "nowhere")


def test_an_instruction_that_is_no_text_is_skipped():
    features = FEATURES | {"edit_prompt": hub.List(hub.Value("string"))}
    lists = hub.Dataset.from_dict(ROWS | {"edit_prompt": [["a", "b"]] * 3}, features=hub.Features(features))
    with pytest.raises(ValueError, match="skipped 3 with an instruction that is no text but a list"):
        HubTable(lists)


def picture_folder(path, first):
    path.mkdir()
    save_image(path / "before.png", BEFORE)
    save_image(path / "after.png", AFTER)
    row = {"original_image_file_name": first, "edited_image_file_name": "after.png", "edit_prompt": "make it winter"}
    (path / "metadata.jsonl").write_text(json.dumps(row))
    return path


@pytest.mark.parametrize("name", ["mine", "other"])
def test_a_script_in_a_folder_is_never_run(tmp_path, own_cache, name):
    folder = picture_folder(tmp_path / "mine", "before.png")
    (folder / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    if name == "mine":  # the name that `datasets` once took for the folder's own script
        with pytest.raises(
            ValueError, match="mine cannot be read as a table: Dataset scripts are no longer supported"
        ):
            HubTable.load(folder)
    else:
        assert is_triple(HubTable.load(folder)[0], "make it winter")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/{}/secret.png", "http://127.0.0.1:9/secret.png"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, own_cache, name):
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
    with pytest.raises(ValueError, match="no sample is left to use; skipped 2 with no instruction"):
        HubTable(table.remove_columns("edit_prompt").add_column("edit_prompt", [None, " "]))
