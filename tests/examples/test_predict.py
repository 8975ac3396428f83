import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import predict
import pytest
import tiny
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_mixed_pictures import save_picture

from instructdiffusion_pipeline import Editing, InstructDiffusionPipeline, Mask, Segmentation, ask, ask_batch
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.datasets.instances import CocoInstances
from instructdiffusion_pipeline.tasks.colors import MASK_COLORS, most_visible_first


@pytest.fixture
def run_predict(pipe, tmp_path, monkeypatch):
    """Runs the script in this process, with a model of random weights and a folder of four images."""
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 64), (64, 96)]):
        tiny.picture(*size, seed=number).save(f"photos/{number}.png")

    def run(*options):
        argv = ["predict.py", "--model", "model", "--images", "photos", "--output", "out", "--steps", "1", *options]
        monkeypatch.setattr(sys, "argv", argv)
        run_script(predict.main)

    return run


def test_a_missing_package_is_reported_before_the_model_runs(run_predict, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit) as exit:
        run_predict("--task", "segmentation", "--objects", "cat")
    assert exit.value.code == 1 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "pycocotools" in said and said.endswith('; `pip install ".[eval]"` installs it.\n')


def test_masks_are_those_of_ask_and_a_coco_file(run_predict, pipe, tmp_path):
    run_predict("--task", "segmentation", "--objects", "cat, dog")
    data = COCO("out/coco.json")
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == ["cat", "dog"]
    assert [image["file_name"] for image in data.loadImgs(data.getImgIds())] == [f"{n}.png" for n in range(4)]
    for number in range(4):
        image = Image.open(f"photos/{number}.png")
        task = Segmentation(dict(zip(("cat", "dog"), most_visible_first(image, MASK_COLORS), strict=False)))
        answer = ask(pipe, image, task, num_inference_steps=1, generator=predict.seeded(0, number))
        for category, (name, mask) in enumerate(answer.data.items(), 1):
            np.testing.assert_array_equal(np.asarray(Image.open(f"out/{number}-{name}.png")), mask.pixels)
            found = data.loadAnns(data.getAnnIds(imgIds=number + 1, catIds=category))
            assert len(found) == mask.pixels.any()
            for annotation in found:
                np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), mask.pixels)
                assert annotation["bbox"] == list(coco_mask.toBbox(mask.rle))
                assert annotation["score"] == pytest.approx(mask.score)


def test_masks_can_be_trained_on(tmp_path):
    records, masks = {}, {}
    rows, columns = np.mgrid[:30, :40]
    for number in (1, 2):
        tiny.picture(40, 30, number).save(path := tmp_path / f"{number}.png")
        disc = (columns - 10 * number) ** 2 + (rows - 15) ** 2 < 50
        found = {"cat": Mask(disc, 0.9), "dog": Mask(np.zeros_like(disc) if number == 1 else ~disc, 0.8)}
        masks[path.name] = found
        readings = {name: predict.as_json(mask) for name, mask in found.items()}
        records[path] = {"width": 40, "height": 30, "readings": readings}
    file = tmp_path / "coco.json"
    content = predict.coco("segmentation", ["cat", "dog"], records, predict.common_folder(list(records)))
    file.write_text(json.dumps(content))
    dataset = CocoInstances(file, tmp_path)
    assert len(dataset) == 2 and not dataset.skipped
    for index in range(2):
        image, read = dataset[index]
        np.testing.assert_array_equal(image, Image.open(tmp_path / dataset.name(index)))
        for name, mask in read.items():
            np.testing.assert_array_equal(mask, masks[dataset.name(index)][name].pixels)


def test_file_names_of_several_folders_are_relative_to_their_common_folder(run_predict):
    Path("more").mkdir()
    tiny.picture(64, 64).save("more/x.png")
    Path("photos/1.png").write_bytes(b"damaged")  # names do not depend on which images can be read
    for images, names in (
        (["photos/0.png", "photos/../more"], ["photos/0.png", "more/x.png"]),
        (["photos/1.png", "more"], ["more/x.png"]),
    ):
        output = f"out-{len(names)}"
        run_predict("--task", "segmentation", "--objects", "cat", "--images", *images, "--output", output)
        content = json.loads(Path(output, "coco.json").read_text())
        assert [image["file_name"] for image in content["images"]] == names


def test_more_than_five_joints_need_several_tasks(run_predict):
    names = ["nose", "left eye", "right eye", "left ear", "right ear", "left wrist"]
    run_predict("--task", "keypoints", "--joints", ", ".join(names))
    content = json.loads(Path("out/coco.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "person", "keypoints": names}]
    assert [len(annotation["keypoints"]) for annotation in content["annotations"]] == [18] * 4


def test_edited_images_are_those_of_ask(run_predict, pipe):
    run_predict("--task", "editing", "--instruction", "make it night", "--batch_size", "1")
    image = Image.open("photos/1.png")
    answer = ask(pipe, image, Editing("make it night"), num_inference_steps=1, generator=predict.seeded(0, 1))
    np.testing.assert_array_equal(Image.open("out/1.png"), answer.data)


def test_a_run_continues_and_skips_unreadable_images(run_predict, tmp_path, capsys):
    (tmp_path / "photos" / "4.png").write_bytes(b"no picture")
    tiny.picture(640, 64).save(tmp_path / "photos" / "5.png")
    options = ("--task", "segmentation", "--objects", "cat")
    run_predict(*options)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "4 of 6 images processed" in said and "4.png cannot be read" in said
    assert "skipped: photos/5.png: `image` of 640 x 64 pixels is too elongated" in said
    whole = tiny.contents(tmp_path / "out")
    # As if it had been killed: two images have no record, and one of them lacks files.
    for path in ("records/1.json", "records/3.json", "1-cat.png", "coco.json"):
        (tmp_path / "out" / path).unlink()
    run_predict(*options)
    assert tiny.contents(tmp_path / "out") == whole
    with pytest.raises(SystemExit):
        run_predict("--task", "segmentation", "--objects", "dog")
    assert "question was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--task segmentation", "--objects must be given"),
        ("--task segmentation --objects cat,cat", "different names; got 'cat,cat'"),
        ("--task editing --instruction x --objects cat", "--objects has no effect with --task editing"),
        ("--task keypoints --joints nose --slices 0.5", "--slices must be"),
        ("--task segmentation --objects cat --images missing", "there is no file or folder missing"),
        ("--task segmentation --objects cat --images model", "the folder model has no images"),
    ],
)
def test_an_invalid_argument_ends_with_a_one_line_message(options, told, run_predict, capsys):
    with pytest.raises(SystemExit) as exit:
        run_predict(*options.split())
    assert exit.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_batches_have_one_working_size_and_each_image_once(pipe, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for number, path in enumerate(paths):
        Image.new("RGB", (64 + 64 * (number % 3), 64 + 32 * (number % 2))).save(path)
    task = Editing("make it night")
    found = list(predict.batches(pipe, paths, lambda image: [task], 2, predict.tqdm(disable=True)))
    sizes = [
        {pipe.working_size(*image.size, resize_mode="stretch").size for image, *_ in batch.values()} for batch in found
    ]
    assert all(len(size) == 1 for size in sizes) and all(len(batch) <= 2 for batch in found)
    assert sorted(path for batch in found for path in batch) == sorted(paths)


def test_batches_have_the_working_size_of_the_models_settings(run_predict, pipe, tmp_path):
    """At the resolution of the pipeline, 32, these two images have one working size."""
    sizes = [(234, 200), (237, 200)]
    assert len({pipe.working_size(*size, resize_mode="stretch").size for size in sizes}) == 1
    model = InstructDiffusionPipeline(**pipe.components, task_settings={"keypoints": {"resolution": 128}})
    model.save_pretrained(tmp_path / "own")
    assert len({model.working_size(*size, 128, "stretch").size for size in sizes}) == 2
    (tmp_path / "two").mkdir()
    for number, size in enumerate(sizes):
        tiny.picture(*size).save(tmp_path / "two" / f"{number}.png")
    run_predict("--task", "keypoints", "--joints", "nose", "--model", "own", "--images", "two")
    assert len(list(Path("out/records").iterdir())) == 2


def test_a_folder_with_other_files_is_not_written_to(run_predict, tmp_path, capsys):
    Path("other").mkdir()
    Path("other/1.png").write_bytes(b"not of this run")
    before = tiny.contents(tmp_path / "other")
    with pytest.raises(SystemExit) as exit:
        run_predict("--task", "editing", "--instruction", "make it night", "--output", "other")
    assert exit.value.code == 2
    assert "error: --output: other has files that are not of an interrupted run" in capsys.readouterr().err
    assert tiny.contents(tmp_path / "other") == before


@pytest.mark.parametrize("output", ["photos", "model/../photos", "link"])
def test_the_folder_of_the_images_is_not_written_to(run_predict, tmp_path, capsys, output):
    """Not even if a run has written to it, as earlier versions did."""
    options = ("--task", "editing", "--instruction", "make it night")
    run_predict(*options)
    for entry in ("run.json", "records"):
        Path("out", entry).rename(Path("photos", entry))
    Path("link").symlink_to("photos")
    before = tiny.contents(tmp_path / "photos")
    with pytest.raises(SystemExit) as exit:
        run_predict(*options, "--output", output)
    assert exit.value.code == 2
    assert f"error: --output: must not be the folder of --images; {output} has 0.png." in capsys.readouterr().err
    assert tiny.contents(tmp_path / "photos") == before


def test_an_empty_folder_is_written_to_and_a_file_is_not(run_predict, capsys):
    Path("out").mkdir()
    run_predict("--task", "editing", "--instruction", "make it night")
    assert Path("out/1.png").exists()
    with pytest.raises(SystemExit):
        run_predict("--task", "editing", "--instruction", "make it night", "--output", "photos/1.png")
    assert "--output: must be a folder, but photos/1.png is a file" in capsys.readouterr().err


def test_a_run_killed_while_it_writes_its_configuration_continues(run_predict):
    Path("out/.run.json.x7rq").mkdir(parents=True)
    run_predict("--task", "editing", "--instruction", "make it night")
    assert Path("out/1.png").exists()


@pytest.mark.parametrize("damaged", ["{", "{}", "null", "[]", "\xff"])
def test_changed_images_missing_results_and_damaged_records_are_processed_again(run_predict, tmp_path, damaged):
    options = ("--task", "segmentation", "--objects", "cat")
    run_predict(*options)
    before = tiny.contents(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in Path("out/records").iterdir()}
    Path("out/0-cat.png").unlink()
    Path("out/records/1.json").write_text(damaged, "latin-1")
    run_predict(*options)
    assert tiny.contents(tmp_path / "out") == before
    tiny.picture(96, 96, seed=9).save("photos/2.png")
    run_predict(*options)
    after = tiny.contents(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {
        "2-cat.png", "2-overlay.png", "coco.json", "records/2.json"
    }  # fmt: skip
    assert Path("out/records/3.json").stat().st_mtime_ns == times["3.json"]


@pytest.mark.parametrize("task", [("segmentation", "--objects", "cat"), ("editing", "--instruction", "make it night")])
def test_no_results_of_images_remain_that_are_skipped_now(run_predict, capsys, task):
    """One is damaged and one is a folder; a folder cannot be hashed."""
    run_predict("--task", *task)
    assert list(Path("out").glob("0*.png"))
    Path("photos/0.png").write_bytes(b"no picture")
    Path("photos/1.png").unlink()
    Path("photos/1.png").mkdir()
    capsys.readouterr()
    run_predict("--task", *task)
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "2 of 4 images processed" in said
    assert "0.png cannot be read" in said and "skipped: photos/1.png: " in said and "Is a directory" in said
    assert not list(Path("out").glob("[01]*.png")) and list(Path("out").glob("2*.png"))


def test_a_run_in_which_no_image_can_be_processed_fails(run_predict, capsys):
    for number in range(4):
        Path(f"photos/{number}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as exit:
        run_predict("--task", "editing", "--instruction", "make it night")
    captured = capsys.readouterr()
    assert exit.value.code == 1 and "0 of 4 images processed" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: --images: no image could be processed")


def test_the_names_of_results_of_images_with_the_same_stem_are_printed(run_predict, capsys):
    tiny.picture(64, 64).save("photos/0.jpg")
    run_predict("--task", "editing", "--instruction", "make it night")
    said = capsys.readouterr().out
    for name in ("0.jpg", "0.png"):
        (line,) = (line for line in said.splitlines() if line.startswith(f"photos/{name}: the names of its results"))
        assert Path("out", line.split()[-1] + ".png").is_file()


def test_an_image_that_changes_while_the_model_runs_is_processed_again(run_predict, pipe, monkeypatch, capsys):
    """It changes after it was read, when the batch with it is processed; another one is removed then."""
    options = ("--task", "editing", "--instruction", "make it night")
    other = tiny.picture(64, 64, seed=9)
    runs = []

    def change_first(model, *arguments, **settings):
        if not runs:
            other.save("photos/0.png")
            Path("photos/2.png").unlink()
        runs.append(1)
        return ask_batch(model, *arguments, **settings)

    monkeypatch.setattr(predict, "ask_batch", change_first)
    run_predict(*options)
    assert "4 of 4 images processed" in capsys.readouterr().out
    tiny.picture(64, 64, seed=2).save("photos/2.png")
    run_predict(*options)
    answer = ask(pipe, other, Editing("make it night"), num_inference_steps=1, generator=predict.seeded(0, 0))
    np.testing.assert_array_equal(Image.open("out/0.png"), answer.data)


def test_a_damaged_run_file_is_named(run_predict, capsys):
    options = ("--task", "segmentation", "--objects", "cat")
    run_predict(*options)
    Path("out/run.json").write_text("{")
    with pytest.raises(SystemExit):
        run_predict(*options)
    assert "The file out/run.json is damaged (" in capsys.readouterr().err
    Path("out/run.json").write_text("[]")
    with pytest.raises(SystemExit):
        run_predict(*options)
    assert "The file out/run.json is damaged (not an object)" in capsys.readouterr().err


def test_a_run_with_other_images_says_which(run_predict, capsys):
    options = ("--task", "segmentation", "--objects", "cat")
    run_predict(*options)
    for number in range(6):
        tiny.picture(64, 64, number).save(f"photos/new-{number}.png")
    with pytest.raises(SystemExit):
        run_predict(*options)
    error = capsys.readouterr().err
    assert (
        "error: The folder out must be new or have answers of the same run; pictures had 4 entries and has 10;"
        in error
    )
    assert "the first change is from 'nothing' to 'photos/new-0.png'. Choose another" in error


@pytest.mark.parametrize(
    ("task", "question", "stem", "option"),
    [
        ("segmentation", ("--objects", "cat," + 239 * "x"), "0", "--objects"),
        ("segmentation", ("--objects", "cat"), 233 * "0", "--objects"),
        ("keypoints", ("--joints", "nose"), 233 * "0", "--images"),
        ("editing", ("--instruction", "make it night"), 240 * "0", "--images"),
    ],
)
def test_too_long_file_names_are_found_before_the_model_runs(run_predict, capsys, task, question, stem, option):
    """The longest results have names of 245 bytes. With one byte more, they are refused."""
    for name in (f"{stem}.png", f"{stem}0.png"):
        tiny.picture(64, 64).save(name)
    run_predict("--task", task, *question, "--images", f"{stem}.png")
    assert "1 of 1 images processed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        run_predict("--task", task, *question, "--images", f"{stem}0.png", "--output", "other")
    assert exit.value.code == 2
    assert f"error: {option}: file names of results must have at most 245 bytes; got 00" in capsys.readouterr().err
    assert not Path("other").exists()


def test_slices_of_tiny_images_have_at_least_one_pixel(run_predict):
    Path("tiny").mkdir()
    tiny.picture(1, 1).save("tiny/0.png")
    run_predict("--task", "segmentation", "--objects", "cat", "--slices", "0.4", "--images", "tiny")
    assert Image.open("out/0-cat.png").size == (1, 1)


def run_until(records, command, folder):
    """Run predict.py, and kill it when the output has this number of records (None: do not kill it)."""
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        if records is not None and len(list(folder.glob("killed/records/*.json"))) >= records:
            process.kill()
            process.wait()
            return
        time.sleep(0.002)
    assert records is None and process.returncode == 0, "the run ended before it was killed"


@pytest.mark.slow  # 14 runs of the script
@pytest.mark.parametrize(
    ("question", "iou_type"),
    [
        (("--task", "segmentation", "--objects", "cat, dog"), "segm"),
        (("--task", "keypoints", "--joints", "nose, left wrist, right wrist"), "keypoints"),
    ],
)
def test_a_run_killed_five_times_writes_the_files_of_one_run(pipe, tmp_path, question, iou_type):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    rng = random.Random(0)
    for number in range(47):
        save_picture(tmp_path / "photos", f"{number:02d}", rng)
    whole = next((tmp_path / "photos").glob("00.*")).read_bytes()
    for name, content in {"empty.png": b"", "notes.jpg": b"no picture", "truncated.jpg": whole[:100]}.items():
        (tmp_path / "photos" / name).write_bytes(content)

    command = [sys.executable, predict.__file__, "--model", "model", "--images", "photos", *question]
    command += ["--steps", "4", "--batch_size", "4", "--output"]
    run_until(None, [*command, "whole"], tmp_path)
    for records in (3, 11, 20, 29, 38, None):
        run_until(records, [*command, "killed"], tmp_path)
    assert tiny.contents(tmp_path / "killed", tiny.HIDDEN) == tiny.contents(tmp_path / "whole")
    assert len(list((tmp_path / "killed" / "records").iterdir())) == 40, (
        "all except three files that are not images, and seven with sides of more than 4 : 1"
    )

    # The results are their own ground truth: pycocotools reads and finds all of them.
    content = json.loads((tmp_path / "killed" / "coco.json").read_text())
    truth = COCO()
    truth.dataset = json.loads(json.dumps(content))
    for annotation in truth.dataset["annotations"]:
        annotation.update({"area": 1000, "bbox": [0, 0, 40, 25], "iscrowd": 0} | annotation)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(content["annotations"]), iou_type)
    if iou_type == "keypoints":
        evaluation.params.kpt_oks_sigmas = np.full(3, 0.05)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert len(content["images"]) == 40 and content["annotations"]
    assert evaluation.stats[0] == pytest.approx(1)


def test_images_with_similar_names_have_separate_outputs(run_predict):
    # photo.jpg is number 6 of the folder, and the first names for its outputs are used by other images.
    for name in ("photo-6-6.png", "photo-6.png", "photo.jpg", "photo.png"):
        tiny.picture(64, 64, seed=len(name)).save(f"photos/{name}")
    run_predict("--task", "editing", "--instruction", "make it night")
    assert len(list(Path("out").glob("*.png"))) == len(list(Path("out/records").iterdir())) == 8


@pytest.mark.parametrize("objects", ["cat, overlay", "a/b, a b"])
def test_objects_whose_masks_would_overwrite_other_outputs_raise_an_error(run_predict, capsys, objects):
    with pytest.raises(SystemExit):
        run_predict("--task", "segmentation", "--objects", objects)
    assert "error: --objects: several outputs would have the name 0-" in capsys.readouterr().err
    assert not Path("out").exists()


def test_masks_that_would_overwrite_those_of_another_image_raise_an_error(run_predict, capsys):
    tiny.picture(64, 64).save("photos/0-cat.png")
    with pytest.raises(SystemExit):
        run_predict("--task", "segmentation", "--objects", "cat,cat-cat")
    assert "several outputs would have the name 0-cat-cat.png" in capsys.readouterr().err


@pytest.mark.parametrize("task", [("segmentation", "--objects", "cat"), ("editing", "--instruction", "make it night")])
def test_outputs_replaced_by_the_safety_checker_are_counted_and_left_out(run_predict, pipe, capsys, tmp_path, task):
    InstructDiffusionPipeline(**pipe.components | tiny.safety_checker(-1)).save_pretrained(tmp_path / "model")
    for _ in range(2):  # the second time there is nothing left to do
        run_predict("--task", *task)
        said = capsys.readouterr().out
        assert said.count("skipped: the safety checker replaced the output for photos/") == 4
        assert "0 of 4 images processed" in said
    assert not list(Path("out").glob("*.png"))
    if task[0] == "segmentation":
        assert COCO("out/coco.json").dataset["images"] == []
