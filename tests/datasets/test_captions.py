import json

import pytest
from PIL import Image

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.captions import coco_captions, img2dataset


def picture(path, color=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path)


def test_img2dataset_folders(tmp_path):
    for name, color in (("00000/000000000.png", (9, 8, 7)), ("00001/000010000.png", (1, 1, 1))):
        picture(tmp_path / name, color)
        (tmp_path / name).with_suffix(".txt").write_text(f"a picture\n of {color[0]} ")
        (tmp_path / name).with_suffix(".json").write_text("{}")
    (tmp_path / "00000_stats.json").write_text("{}")
    picture(tmp_path / "00001/000010001.png")
    picture(tmp_path / "00001/000010002.png")
    (tmp_path / "00001/000010002.txt").write_text(" \n")
    data = img2dataset(tmp_path)
    assert [data[index][1] for index in range(len(data))] == ["a picture of 9", "a picture of 1"]
    assert data[0][0].getpixel((0, 0)) == (9, 8, 7) and data.name(0) == "00000/000000000.png"
    assert data.skipped == [("00001/000010001.png", "no caption"), ("00001/000010002.png", "no caption")]
    (tmp_path / "00000/000000000.png").write_bytes(b"broken")
    with pytest.raises(UnreadableSample, match="000000000.png"):
        data[0]


@pytest.mark.parametrize("place", ["train2017", "images/train2017"])
def test_coco_captions(tmp_path, place):
    picture(tmp_path / place / "000000000009.png")
    images = [{"id": 9, "file_name": "000000000009.png"}, {"id": 10, "file_name": "000000000010.png"}]
    captions = [
        {"image_id": 9, "caption": "one"},
        {"image_id": 9, "caption": "two "},
        {"image_id": 10, "caption": "x"},
        {"image_id": 9, "caption": ["three", "four"]},
    ]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    data = coco_captions(tmp_path)
    assert [data[index][1] for index in range(len(data))] == ["one", "two"]
    assert data.skipped == [("000000000010.png", "a missing file"), ("000000000009.png", "no caption")]


def test_a_byte_order_mark_is_removed_from_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8-sig")
    assert img2dataset(tmp_path)[0][1] == "a cat"


def test_a_dataset_without_usable_samples_raises_an_error(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no usable samples; skipped 1 with no caption"):
        img2dataset(tmp_path)
