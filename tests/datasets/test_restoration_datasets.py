import pytest
import tiny
from folders import same, save_image, write_broken

from instructdiffusion_pipeline.datasets import UnreadableSample
from instructdiffusion_pipeline.datasets.restoration import clwd, gopro, reds, sidd

LAYOUTS = [
    (gopro, "train/GOPR0372_07_00/blur/000047.png", "train/GOPR0372_07_00/sharp/000047.png"),
    (gopro, "train/input/a-000047.png", "train/target/a-000047.png"),
    (reds, "train/train_blur/000/00000001.png", "train/train_sharp/000/00000001.png"),
    (reds, "train/blur/000/00000001.png", "train/sharp/000/00000001.png"),
    (sidd, "Data/0001_001_S6/0001_NOISY_SRGB_010.PNG", "Data/0001_001_S6/0001_GT_SRGB_010.PNG"),
    (reds, "train/train_blur_jpeg/000/00000001.jpg", "train/train_sharp/000/00000001.png"),
    (reds, "train/blur/000-00000001.jpg", "train/sharp/000-00000001.png"),
    (sidd, "train/input/1.png", "train/gt/1.png"),
    (sidd, "train/input/0001_NOISY_SRGB_010.PNG", "train/gt/0001_GT_SRGB_010.PNG"),
    (sidd, "train/input_crops/0001_NOISY_SRGB_010_s001.PNG", "train/gt_crops/0001_GT_SRGB_010_s001.PNG"),
    (sidd, "train/input_crops/0001_s001.PNG", "train/gt_crops/0001_s001.PNG"),
    (clwd, "train/Watermarked_image/1.jpg", "train/Watermark_free_image/1.jpg"),
]


@pytest.mark.parametrize("read, degraded, clean", LAYOUTS)
def test_pairs(read, degraded, clean, tmp_path):
    save_image(tmp_path / degraded, tiny.picture(40, 30, seed=1))
    save_image(tmp_path / clean, tiny.picture(40, 30, seed=2))
    (tmp_path / degraded).with_name("Thumbs.db").write_bytes(b"no picture")
    dataset = read(tmp_path)
    image, target = dataset[0]
    assert len(dataset) == 1 and degraded.endswith(dataset.name(0)) and not dataset.skipped
    assert same(image, tiny.picture(40, 30, seed=1)) and same(target, tiny.picture(40, 30, seed=2))


def test_images_are_paired_by_name_and_other_files_are_ignored(tmp_path):
    for number in (1, 2, 4):
        save_image(tmp_path / "val" / "input" / f"000{number}_NOISY_SRGB_010.PNG", tiny.picture(40, 30, seed=number))
    for number in (2, 3, 4):
        save_image(tmp_path / "val" / "gt" / f"000{number}_GT_SRGB_010.PNG", tiny.picture(40, 30, seed=number))
    dataset = sidd(tmp_path, "val")
    assert len(dataset) == 2 and all(same(*dataset[index]) for index in range(2))
    assert dataset.skipped == [("input/0001_NOISY_SRGB_010.PNG", "no clean image")]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    for kind, seed in (("blur", 1), ("sharp", 2)):
        save_image(tmp_path / "disk" / "clip" / kind / "1.png", tiny.picture(40, 30, seed=seed))
        save_image(tmp_path / "data" / "test" / "other" / kind / "2.png", tiny.picture(40, 30, seed=seed))
    (tmp_path / "data" / "test" / "linked").symlink_to(tmp_path / "disk" / "clip", target_is_directory=True)
    for link, target in (
        (tmp_path / "data" / "test" / "circle", tmp_path / "data"),
        (tmp_path / "disk" / "clip" / "back", tmp_path / "data" / "test" / "other"),
        (tmp_path / "data" / "test" / "other" / "there", tmp_path / "disk" / "clip"),
        (tmp_path / "data" / "test" / "same", tmp_path / "data" / "test" / "other"),
    ):
        link.symlink_to(target, target_is_directory=True)
    dataset = gopro(tmp_path / "data", "test")
    assert len(dataset) == 2 and not dataset.skipped
    assert {dataset.name(index).rpartition("/")[2] for index in range(2)} == {"1.png", "2.png"}
    assert same(dataset[0][0], tiny.picture(40, 30, seed=1))


def test_gopro_has_its_blur_with_and_without_gamma(tmp_path):
    for number, kind in enumerate(["blur", "blur_gamma", "sharp"]):
        save_image(tmp_path / "test" / "GOPR0384" / kind / "1.png", tiny.picture(40, 30, seed=number))
    for gamma in (False, True):
        image, clean = gopro(tmp_path, "test", gamma=gamma)[0]
        assert same(image, tiny.picture(40, 30, seed=int(gamma))) and same(clean, tiny.picture(40, 30, seed=2))


def test_training_data_of_sidd_as_validation_raises_an_error(tmp_path):
    for side in ("NOISY", "GT"):
        save_image(tmp_path / "Data" / "0001_001_S6" / f"0001_{side}_SRGB_010.PNG")
    for split in ("val", "tset"):
        with pytest.raises(ValueError, match=f"`split` is '{split}', but .*Data is .*{split}/input and .*{split}/gt"):
            sidd(tmp_path, split)
    for side in ("input", "gt"):
        save_image(tmp_path / "val" / side / "1.png")
    assert sidd(tmp_path, "val").name(0) == "input/1.png" and "NOISY" in sidd(tmp_path).name(0)


def test_missing_and_damaged_files_are_listed(tmp_path):
    marked, clean = tmp_path / "train" / "Watermarked_image", tmp_path / "train" / "Watermark_free_image"
    save_image(marked / "1.jpg")
    with pytest.raises(ValueError, match="train: no usable samples; skipped 1 with no clean image"):
        clwd(tmp_path)
    save_image(marked / "2.jpg")
    write_broken(clean / "2.jpg")
    save_image(marked / "3.jpg", tiny.picture(40, 30))
    save_image(clean / "3.jpg", tiny.picture(30, 40))
    dataset = clwd(tmp_path)
    assert dataset.skipped == [("Watermarked_image/1.jpg", "no clean image")]
    with pytest.raises(UnreadableSample, match="Watermark_free_image/2.jpg"):
        dataset[0]
    with pytest.raises(UnreadableSample, match=r"Watermarked_image/3.jpg: is of \(40, 30\) pixels"):
        dataset[1]
    with pytest.raises(ValueError, match="nowhere.*no samples found"):
        clwd(tmp_path / "nowhere")
