"""`evaluate` with small components: resuming, errors, scores, contact sheets."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_tiny
import tiny
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageOps
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from instructdiffusion_pipeline import InstructDiffusionPipeline, ask
from instructdiffusion_pipeline.datasets.mixture import Source
from instructdiffusion_pipeline.evaluation import Example, LazyExample, evaluate, examples_from
from instructdiffusion_pipeline.image_grid import MARGIN, PANEL
from instructdiffusion_pipeline.pipeline_instruct_diffusion import center_crop
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.tasks.keypoints import Keypoints
from instructdiffusion_pipeline.tasks.restoration import Restoration, add_noise
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation
from instructdiffusion_pipeline.types import Edit, Joint

DEMO = tiny.ROOT / "examples" / "demo"
SHIPPED = tiny.ROOT / "examples" / "instructdiffusion-tiny"


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def assert_first_reading(sheet: Path, shown: Image.Image) -> None:
    """Check the decoded data in the first row of a contact sheet whose examples have one task."""
    pixels, panel = np.asarray(Image.open(sheet)), np.asarray(ImageOps.contain(shown, (PANEL, PANEL)))
    left, top = MARGIN + 2 * (PANEL + MARGIN), pixels.shape[0] // 3 - PANEL - 3 * MARGIN // 2
    assert (pixels[top : top + PANEL, left : left + PANEL] == panel).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An evaluation that was not interrupted."""
    folder = tmp_path_factory.mktemp("evaluation") / "whole"
    run_tiny.run(folder)
    return folder


@pytest.fixture
def torn(whole, tmp_path):
    """Make copies of the evaluation that look as if it had been killed after `size` bytes of records."""

    def tear(size: int) -> Path:
        folder = tmp_path / f"torn-{size}"
        shutil.copytree(whole, folder)
        for path in [*folder.glob("*.png"), folder / "table.md", folder / "results.json"]:
            path.unlink()
        os.truncate(folder / "records.jsonl", size)
        return folder

    return tear


def kill_after(folder: Path, lines: int, delay: float) -> None:
    """Start an evaluation in another process, and kill it `delay` seconds after it wrote `lines` records."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, run_tiny.__file__, str(folder)], env=environment, stderr=subprocess.PIPE)
    path = folder / "records.jsonl"
    while child.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()


@pytest.mark.parametrize("moment", ["half-way", "at random"])
def test_a_killed_and_resumed_evaluation_writes_the_same_files(whole, tmp_path, moment):
    count = len(run_tiny.examples())
    lines, delay = (count // 2, 0.0) if moment == "half-way" else (random.randrange(count // 2), random.random() / 20)
    kill_after(tmp_path, lines, delay)
    left = (tmp_path / "records.jsonl").read_bytes().count(b"\n")
    assert lines <= left < count and not (tmp_path / "table.md").exists()
    run_tiny.run(tmp_path)
    resumed, expected = tiny.contents(tmp_path, tiny.HIDDEN), tiny.contents(whole)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if resumed[name] != expected[name]] == []


def test_incomplete_lines_and_batches_are_evaluated_again(whole, torn):
    lines = (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    for size in (sum(map(len, lines[:9])) + 10, sum(map(len, lines)) - 1):
        folder = torn(size)
        run_tiny.run(folder)
        assert tiny.contents(folder) == tiny.contents(whole), f"cut after {size} bytes"


def test_a_complete_run_does_not_call_the_pipeline_again(whole, torn, monkeypatch):
    folder = torn((whole / "records.jsonl").stat().st_size)
    for path in (folder / "answers").iterdir():
        os.utime(path, (1, 1))
    run_tiny.run(folder)
    assert tiny.contents(folder) == tiny.contents(whole)
    assert {path.stat().st_mtime for path in (folder / "answers").iterdir()} == {1}


def test_every_example_has_one_record_in_order(whole):
    assert [(record["index"], record["name"]) for record in records(whole)] == [
        (index, lazy.name) for index, lazy in enumerate(run_tiny.examples())
    ]


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("seed", {"seed": 6}),
        ("settings", {"settings_by_family": {"editing": {"num_inference_steps": 3}}}),
        ("batch_size", {"batch_size": 3}),
        ("resolution", {"resolution": 128}),
        ("examples", {"examples": run_tiny.examples()[:-1]}),
    ],
)
def test_records_of_another_run_raise_an_error(whole, word, changes):
    before = tiny.contents(whole)
    with pytest.raises(ValueError, match=f"{whole.name} must be new or have records of the same run; {word} was "):
        run_tiny.run(whole, **changes)
    assert tiny.contents(whole) == before


def test_records_of_another_model_raise_an_error(whole):
    pipe = run_tiny.model()
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="model was "):
        run_tiny.run(whole, pipeline=pipe)


@pytest.mark.parametrize("part", ["image", "truth", "task"])
def test_records_of_examples_with_other_content_raise_an_error(tmp_path, part):
    image, other = tiny.picture(64, 64, 1), tiny.picture(64, 64, 2)
    example = Example(image, [Editing("make it winter")], Edit("make it winter", image))
    change = {"image": other, "truth": Edit("make it winter", other), "task": [Editing("make it night")]}
    changed = example._replace(**{"tasks" if part == "task" else part: change[part]})
    names = ("first", "second")
    run_tiny.run(tmp_path, examples=[LazyExample(name, "edits", lambda: example) for name in names])
    before = tiny.contents(tmp_path)
    opened = [LazyExample(name, "edits", lambda it=it: it) for name, it in zip(names, (example, changed), strict=True)]
    with pytest.raises(ValueError, match="records of the same run; 'second' has changed since"):
        run_tiny.run(tmp_path, examples=opened)
    assert tiny.contents(tmp_path) == before


def test_records_without_run_json_raise_an_error(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="There is no run.json beside .*records.jsonl"):
        run_tiny.run(tmp_path)


def test_examples_need_unique_names(tmp_path):
    with pytest.raises(ValueError, match="unique names; .* cat 0"):
        run_tiny.run(tmp_path, examples=run_tiny.examples()[:1] * 2)
    with pytest.raises(ValueError, match="unique file names; .* one-row"):
        run_tiny.run(tmp_path, examples=[LazyExample("a", "one row", None), LazyExample("b", "one, row", None)])
    assert list(tmp_path.iterdir()) == []


def test_two_sources_with_one_name_raise_an_error_and_with_two_names_have_two_rows(tmp_path):
    class Cats:
        skipped = []

        def __init__(self, seed):
            self.seed = seed

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return tiny.picture(64, 64, self.seed + index), {"cat": run_tiny.blob(self.seed + index)}

        def name(self, index):
            return f"{self.seed + index}.png"

    def examples(*names):
        sources = [Source(name, Cats(3 * i), Segmentation.from_annotation) for i, name in enumerate(names)]
        return [lazy for source in sources for lazy in examples_from(source, 2)]

    assert len({lazy.name for lazy in examples("table", "table")}) == 4, "names of examples do not show it"
    with pytest.raises(ValueError, match="Sources must have different names; .* more than once: table"):
        run_tiny.run(tmp_path, examples=examples("table", "table"))
    assert list(tmp_path.iterdir()) == []
    results = run_tiny.run(tmp_path, examples=examples("table (a)", "table (b)"))
    assert [(row["row"], row["samples"]) for row in results["rows"]] == [("table (a)", 2), ("table (b)", 2)]
    first, second = (row["scores"]["cIoU"]["model"] for row in results["rows"])
    assert first != second


def test_with_a_readout_decoding_by_color_has_a_separate_column(tmp_path):
    class Everything(UNet2DModel):
        """Finds each object everywhere, and each joint in the center."""

        def forward(self, inputs, timestep):
            planes = torch.full_like(inputs[:, :2], 9.0)
            planes[:, 1] = -9.0
            planes[:, 1, inputs.shape[2] // 2, inputs.shape[3] // 2] = 9.0
            return SimpleNamespace(sample=planes)

    pipe = run_tiny.model()
    pipe.register_modules(
        readout=Everything(sample_size=64, in_channels=10, out_channels=2, block_out_channels=(32, 32, 32, 32))
    )
    examples = [lazy for lazy in run_tiny.examples() if lazy.name in ("cat 1", "person 0", "noise 1")]
    results = run_tiny.run(tmp_path, pipeline=pipe, examples=examples)
    of = {record["name"]: record["measures"] for record in records(tmp_path)}
    truth = int(run_tiny.blob(1).sum())
    assert of["cat 1"]["model"]["masks"] == [["cat", truth, 64 * 64, truth]]
    assert np.allclose([joint[:2] for joint in of["person 0"]["model"]["joints"].values()], 32)
    for name, kind in (("cat 1", "masks"), ("person 0", "joints")):
        (lazy,) = (lazy for lazy in examples if lazy.name == name)
        example, index = lazy.open(), examples.index(lazy)
        expected = {}
        for number, task in enumerate(example.tasks):
            state = np.random.SeedSequence((5, index, number)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0]))
            settings = run_tiny.QUICK | {"resolution": 64, "use_readout": False, "generator": generator}
            expected |= ask(pipe, example.image, task, **settings).data
        found = of[name]["decoding by color"][kind]
        if kind == "joints":
            assert found == {joint: place and list(place) for joint, place in expected.items()}
        else:
            pixels = expected["cat"].pixels
            assert found[0][1:3] == [(pixels & run_tiny.blob(1)).sum(), (pixels | run_tiny.blob(1)).sum()]
    assert of["noise 1"].keys() == {"model", "ceiling", "output alone", "input", "input through the VAE"}
    columns = {row["row"]: row["scores"] for row in results["rows"]}
    assert columns["segmentation, blobs"]["mIoU"].keys() == {"model", "ceiling", "decoding by color"}
    assert "decoding by color" in (tmp_path / "table.md").read_text().splitlines()[0]
    # The sheet shows the decoded data of the model: everything is the cat.
    (example,) = (lazy.open() for lazy in examples if lazy.name == "cat 1")
    shown = example.tasks[0].overlay(example.image, {"cat": Mask(np.ones((64, 64), bool), 1.0)})
    assert_first_reading(tmp_path / "segmentation-blobs.png", shown)


def test_records_of_another_readout_or_task_settings_raise_an_error(tmp_path):
    pipe, examples = run_tiny.model(), run_tiny.examples()[:1]
    run_tiny.run(tmp_path, pipeline=pipe, examples=examples)
    readout = UNet2DModel(sample_size=64, in_channels=10, out_channels=2, block_out_channels=(32, 32, 32, 32))
    for changes in ({"readout": readout}, {"task_settings": {"segmentation": {"num_inference_steps": 3}}}):
        other = InstructDiffusionPipeline(**(pipe.components | changes))
        with pytest.raises(ValueError, match="model was "):
            run_tiny.run(tmp_path, pipeline=other, examples=examples)


def test_settings_of_the_model_are_the_default_and_arguments_override_them(tmp_path):
    own = {"num_inference_steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 0.7}
    pipe = InstructDiffusionPipeline(**run_tiny.model().components, task_settings={"segmentation": own})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.default_resolution == 128
    examples = run_tiny.examples()[:1]
    for folder, overrides in (("own", {}), ("other", {"guidance_scale": 0.5})):
        settings = {"segmentation": overrides} if overrides else None
        run_tiny.run(tmp_path / folder, pipeline=pipe, examples=examples, settings_by_family=settings, resolution=None)
        example = examples[0].open()
        state = np.random.SeedSequence((5, 0, 0)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        settings = own | overrides | {"resolution": 128, "output_type": "np"}
        pixels = pipe(example.tasks[0].instruction(), example.image, generator=generator, **settings).images[0]
        assert np.abs(saved_answer(tmp_path / folder, 0, 0) - 255 * pixels).max() <= 1.5


def test_examples_that_fail_are_counted_and_listed(whole):
    (noise,) = (row for row in json.loads((whole / "results.json").read_text())["rows"] if row["row"] == "noise")
    assert noise["samples"] == 5
    failed = {failure["name"]: failure["error"] for failure in noise["failed"]}
    assert failed.keys() == {"broken file", "long strip", "other size"}
    assert failed["broken file"] == "OSError: the file is cut off"
    assert "too elongated" in failed["long strip"] and "(64, 64); got (32, 64)" in failed["other size"]
    table = (whole / "table.md").read_text()
    assert all(f"- {name}: {error}" in table for name, error in failed.items())
    assert [line for line in table.splitlines() if line.startswith("| noise | PSNR |")][0].endswith("| 5 | 3 |")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"resize_mode": "strech"}, "`resize_mode` must be .*; got 'strech'"),
        ({"seed": -1}, "`seed` must be at least 0; got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"baselines": {"ceiling": lambda example: None}}, "`baselines` must not have the names ceiling"),
    ],
)
def test_wrong_arguments_raise_errors_and_leave_no_files(pipe, tmp_path, arguments, told):
    with pytest.raises(ValueError, match=told):
        evaluate(pipe, [], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_without_any_score_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 1 could be scored"):
        run_tiny.run(tmp_path, examples=[LazyExample("broken", "noise", run_tiny.unreadable)])
    assert "- broken: OSError" in (tmp_path / "table.md").read_text()


def saved_answer(folder: Path, index: int, number: int) -> np.ndarray:
    return np.asarray(Image.open(folder / "answers" / f"{index:06d}-{number}.png")).astype(int)


def test_an_output_is_that_of_ask_with_the_seed_of_the_example(whole):
    """Other examples in the batch do not change an output visibly."""
    pipe = run_tiny.model()
    for index, lazy in enumerate(run_tiny.examples()):
        if lazy.row in ("editing", "keypoints"):
            example = lazy.open()
            for number, task in enumerate(example.tasks):
                state = np.random.SeedSequence((5, index, number)).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(state[0]))
                answer = ask(pipe, example.image, task, resolution=64, generator=generator, **run_tiny.QUICK)
                assert np.abs(saved_answer(whole, index, number) - np.asarray(answer.picture)).max() <= 1


def test_all_tasks_of_all_examples_have_different_noise(tmp_path):
    twice = Example(tiny.picture(64, 64), [Segmentation({"cat": "blue"})] * 2, {"cat": run_tiny.blob(1)})
    run_tiny.run(
        tmp_path, examples=[LazyExample(name, "cats", partial(Example, *twice)) for name in ("one", "another")]
    )
    answers = [saved_answer(tmp_path, index, number) for index in (0, 1) for number in (0, 1)]
    for first, second in itertools.combinations(answers, 2):
        assert np.abs(first - second).max() > 10


def test_all_joints_of_a_person_are_scored_together(whole):
    people = [record for record in records(whole) if record["row"] == "keypoints"]
    for record in people:
        assert len(record["measures"]["model"]["joints"]) == 17
        assert len(list((whole / "answers").glob(f"{record['index']:06d}-?.png"))) == 4
    (row,) = (row for row in json.loads((whole / "results.json").read_text())["rows"] if row["row"] == "keypoints")
    assert row["samples"] == 1 and {"AP", "AP50", "PCK@0.05 of the side"} <= row["scores"].keys()


@pytest.fixture(scope="module")
def shipped() -> InstructDiffusionPipeline:
    pipeline = InstructDiffusionPipeline.from_pretrained(SHIPPED)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_decoding_by_color_is_that_of_ask_on_an_image_larger_than_the_working_size(shipped, tmp_path):
    image = Image.fromarray(data.chelsea()).crop((0, 0, 300, 300))
    flower = Image.open(DEMO / "sunflower.png").convert("RGBA").resize((150, 150))
    image.paste(flower, (20, 40), flower)
    whole = np.ones((300, 300), bool)
    tasks = [Segmentation({"sunflower": "blue", "dog": "red"}), Keypoints({"nose": "red", "left wrist": "blue"})]
    truths = [{"sunflower": whole, "dog": whole}, {"nose": Joint(0, 0), "left wrist": Joint(0, 0)}]
    parts = zip(tasks, truths, strict=True)
    examples = [LazyExample(str(i), str(i), partial(Example, image, [task], it)) for i, (task, it) in enumerate(parts)]
    evaluate(shipped, examples, tmp_path)
    for index, task in enumerate(tasks):
        state = np.random.SeedSequence((0, index, 0)).generate_state(1, np.uint64)
        expected = ask(shipped, image, task, use_readout=False, generator=torch.Generator().manual_seed(int(state[0])))
        found = records(tmp_path)[index]["measures"]["decoding by color"]
        if index == 0:
            assert expected.data["sunflower"].pixels.any()
            assert [row[1] for row in found["masks"]] == [int(mask.pixels.sum()) for mask in expected.data.values()]
        else:
            assert found["joints"] == {name: joint and list(joint) for name, joint in expected.data.items()}
        saved = [Image.open(tmp_path / "answers" / name) for name in sorted(os.listdir(tmp_path / "answers"))]
        assert [picture.size for picture in saved] == [(96, 96), (96, 96), (300, 300), (64, 64), (300, 300)]


@torch.no_grad()
def through_vae(pipeline: InstructDiffusionPipeline, picture: Image.Image) -> Image.Image:
    """Encode and decode an image whose sides are multiples of 64."""
    pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 127.5 - 1
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return Image.fromarray(((decoded[0].clamp(-1, 1) / 2 + 0.5) * 255).movedim(0, -1).numpy().astype(np.uint8))


def test_the_ceiling_is_the_score_of_the_ground_truth_through_the_vae(shipped, tmp_path):
    image = Image.fromarray(data.coffee()).resize((128, 128))
    mask = np.zeros((128, 128), bool)
    mask[30:90, 20:70] = True
    segment, point = Segmentation({"cat": "blue"}), Keypoints({"nose": "green", "left wrist": "red"})
    joints = {"nose": Joint(40.0, 60.0), "left wrist": Joint(88.0, 34.0)}
    noisy = add_noise(image, 25, np.random.default_rng(0))
    examples = [
        Example(image, [segment], {"cat": mask}),
        Example(image, [point], joints),
        Example(noisy, [Restoration("noise")], image),
    ]
    families = ("segmentation", "keypoints", "restoration")
    evaluate(
        shipped,
        [
            LazyExample(family, family, partial(Example, *example))
            for family, example in zip(families, examples, strict=True)
        ],
        tmp_path,
        {family: run_tiny.QUICK for family in families},
        resolution=128,
    )
    masks, points, restored = (record["measures"] for record in records(tmp_path))

    found = segment.read(image, through_vae(shipped, segment.draw(image, {"cat": mask})))["cat"].pixels
    assert masks["ceiling"]["masks"] == [["cat", (found & mask).sum(), (found | mask).sum(), mask.sum()]]
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    read = point.read(image, through_vae(shipped, point.draw(image, joints)))
    assert points["ceiling"]["joints"]["nose"] == pytest.approx(read["nose"], abs=0.01)
    assert np.hypot(read["nose"].x - 40, read["nose"].y - 60) < 2
    for of, picture in {
        "ceiling": through_vae(shipped, image),
        "input": noisy,
        "input through the VAE": through_vae(shipped, noisy),
    }.items():
        expected = peak_signal_noise_ratio(np.asarray(image), np.asarray(picture))
        assert restored[of]["picture"]["PSNR"] == pytest.approx(expected, abs=0.01), of
    answer = Image.open(tmp_path / "answers" / "000002-0.png")
    expected = peak_signal_noise_ratio(np.asarray(image), np.asarray(answer))
    assert restored["model"]["picture"]["PSNR"] == pytest.approx(expected, abs=0.01)


def test_outside_the_box_images_are_not_scored_and_masks_count_as_missed(tmp_path):
    """With "crop" the output for 128 x 80 pixels shows the columns 24 to 104."""
    image = tiny.picture(128, 80)
    pixels = np.array(image)
    pixels[:, :24], pixels[:, 104:] = 0, 0
    mask = np.zeros((80, 128), bool)
    mask[:, :10] = True
    examples = [
        LazyExample("picture", "pictures", partial(Example, image, [Restoration("noise")], Image.fromarray(pixels))),
        LazyExample("mask", "masks", partial(Example, image, [Segmentation({"sky": "red"})], {"sky": mask})),
    ]
    run_tiny.run(tmp_path, examples=examples, resize_mode="crop")
    picture, masks = records(tmp_path)
    assert picture["box"] == [24, 0, 104, 80]
    assert picture["measures"]["input"]["picture"] == {"PSNR": 100, "SSIM": 1}
    ((_, intersection, union, truth),) = masks["measures"]["ceiling"]["masks"]
    assert intersection == 0 and union >= truth == 800


@pytest.mark.parametrize("row, middle, last", [("editing", 1, 2), ("noise", 2, 4)])
def test_contact_sheets_show_best_median_and_worst(whole, row, middle, last):
    assert {path.stem for path in whole.glob("*.png")} == {"segmentation-blobs", "noise", "editing", "keypoints"}
    scored = [record for record in records(whole) if record["row"] == row and "score_key" in record]
    ranked = sorted(scored, key=lambda record: -record["score_key"])
    merits = [record["score_key"] for record in ranked]
    assert len(ranked) == last + 1 and len(set(merits)) == len(merits)
    examples = run_tiny.examples()
    sheet = np.asarray(Image.open(whole / f"{row}.png"))
    height = sheet.shape[0] // 3
    for place, record in enumerate([ranked[0], ranked[middle], ranked[last]]):
        example = examples[record["index"]].open()
        answer = Image.open(whole / "answers" / f"{record['index']:06d}-0.png")
        truth = example.truth.edited if row == "editing" else example.truth
        strip = sheet[place * height : (place + 1) * height]
        for column, picture in ((0, example.image), (1, answer), (3, truth)):
            panel = np.asarray(ImageOps.contain(picture, (PANEL, PANEL)))
            left = MARGIN + column * (PANEL + MARGIN)
            # Each caption has one line, so the panels end one and a half margins above the next row.
            top = height - PANEL - 3 * MARGIN // 2
            assert (strip[top : top + panel.shape[0], left : left + panel.shape[1]] == panel).all()


@pytest.mark.parametrize("settings", [{"resize_mode": "crop"}, {"resize_mode": "crop", "resolution": 128}])
def test_the_size_in_the_settings_of_a_family_is_used(tmp_path, settings):
    image = tiny.picture(160, 70)
    edit = Editing("make it winter")
    example = LazyExample("wide", "editing", lambda: Example(image, [edit], Edit(edit.text, image)))
    steps = {"num_inference_steps": 1}
    run_tiny.run(tmp_path, examples=[example], settings_by_family={"editing": settings | steps}, resolution=None)
    (record,) = records(tmp_path)
    size = run_tiny.model().working_size(160, 70, **settings).size
    assert tuple(record["box"]) == center_crop((160, 70), size) != (0, 0, 160, 70)


def test_offloading_does_not_change_the_scores(tmp_path):
    pipe, examples = run_tiny.model(), run_tiny.examples()[:1]
    run_tiny.run(tmp_path, pipeline=pipe, examples=examples)
    offloaded = run_tiny.model()
    offloaded.enable_sequential_cpu_offload(device="cpu")
    assert next(offloaded.unet.parameters()).is_meta
    before = tiny.contents(tmp_path)
    run_tiny.run(tmp_path, pipeline=offloaded, examples=examples)  # it is recognized as the same model
    assert tiny.contents(tmp_path) == before


def test_the_contact_sheet_of_edits_shows_the_scored_image(tmp_path):
    (example,) = (lazy for lazy in run_tiny.examples() if lazy.name == "edit 1")
    run_tiny.run(tmp_path, examples=[example])
    result = np.asarray(Image.open(tmp_path / "answers" / "000000-0-result.png"))
    assert (saved_answer(tmp_path, 0, 0) != result).any()
    opened = example.open()
    (record,) = records(tmp_path)
    expected = peak_signal_noise_ratio(np.asarray(opened.truth.edited), result, data_range=255)
    assert record["score_key"] == pytest.approx(expected, abs=1e-3)
    assert_first_reading(tmp_path / "editing.png", opened.tasks[0].overlay(opened.image, Image.fromarray(result)))
