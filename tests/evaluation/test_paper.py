"""The paper's protocol: the prompts, and scores that agree with independent implementations."""

import contextlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).parent.parent / "datasets"))

from paper_data import AP10K_NAMES, write_ade20k_150, write_ap10k  # noqa: E402

from instructdiffusion_pipeline.datasets.keypoints import AP10K_SIGMAS  # noqa: E402
from instructdiffusion_pipeline.evaluation import Example, every_object, examples_from, whole_person  # noqa: E402
from instructdiffusion_pipeline.evaluation.paper import PAPER_TABLES, open_source  # noqa: E402
from instructdiffusion_pipeline.evaluation.scoring import measure, summarize  # noqa: E402
from instructdiffusion_pipeline.tasks.segmentation import Mask  # noqa: E402
from instructdiffusion_pipeline.types import Joint  # noqa: E402

FIGURES = {figure.key: figure for table in PAPER_TABLES for figure in table.figures}
# configs/_base_/datasets/ap10k.py of AP-10K's authors, in the order of AP10K_NAMES
PUBLISHED_SIGMAS = [
    0.025, 0.025, 0.026, 0.035, 0.035, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.107, 0.087,
    0.089,
]  # fmt: skip


def test_sigmas_of_animals_are_the_published_ones():
    assert [AP10K_SIGMAS[name.replace("_", " ")] for name in AP10K_NAMES] == PUBLISHED_SIGMAS


@pytest.mark.parametrize("steps", [(1, 2, 3), (0.5, 1, 6), (2, 2.5, 4)])
def test_ap_of_animals_is_that_of_pycocotools_with_the_joints_of_coco(steps, tmp_path):
    content = json.loads(write_ap10k(tmp_path / "ap-10k", "test-split1").read_text())
    source = open_source(FIGURES["ap10k"], tmp_path, 64)
    shared = [not any(word in name for word in ("neck", "tail", "paw")) for name in AP10K_NAMES]

    measures, results = [], []
    for index, step in enumerate(steps):
        image, pose = source.read(index, random.Random(0))
        assert len(pose) == sum(shared) == 11
        zoom = 64 / (200 * source.dataset[index][1].scale[0])
        steps_of = {name.replace("_", " "): step * (1 + place % 3) / 2 for place, name in enumerate(AP10K_NAMES)}
        found = {name: joint and Joint(joint.x + steps_of[name] * zoom, joint.y) for name, joint in pose.items()}
        tasks = whole_person(image, pose, random.Random(0))
        measures.append(measure(Example(image, tasks, pose), found, (0, 0, 64, 64)))
        item = content["annotations"][index]
        places = np.array(item["keypoints"]) + np.kron(list(steps_of.values()), [1, 0, 0])
        results.append({"image_id": index, "category_id": 1, "keypoints": places.tolist(), "score": 1.0})
        item |= {
            "image_id": index,
            "category_id": 1,
            "keypoints": np.where(np.repeat(shared, 3), item["keypoints"], 0),
        }
        item["num_keypoints"] = int((item["keypoints"][2::3] > 0).sum())

    truth = COCO()
    truth.dataset = content | {"images": [{"id": index} for index in range(len(steps))]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "keypoints")
        run.params.kpt_oks_sigmas = np.array(PUBLISHED_SIGMAS)
        run.evaluate(), run.accumulate(), run.summarize()
    scores = summarize(measures)
    assert 0 < run.stats[0] < 1
    assert [scores[name] for name in ("AP", "AP50", "AP75")] == pytest.approx(run.stats[:3])


def test_each_class_of_an_image_has_a_prompt_and_mciou_is_the_mean_over_classes(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "ADEChallengeData2016"
    write_ade20k_150(root, "validation")
    numbers = {"wall": 1, "building": 2, "water": 22}
    labels = [rng.choice(choices, (30, 40)).astype(np.uint8) for choices in ([0, 1, 2], [1, 22], [0, 22])]
    for index, label in enumerate(labels):
        tiny.picture(40, 30).save(root / "images" / "validation" / f"{index}.jpg")
        Image.fromarray(label).save(root / "annotations" / "validation" / f"{index}.png")
    source = open_source(FIGURES["ade20k-150"], tmp_path, 64)

    measures, counts = [], {name: np.zeros(2) for name in numbers}
    for lazy, label in zip(examples_from(source, 9, 0, every_object), labels, strict=True):
        example = lazy.open()
        names = [name for task in example.tasks for name in task.colors]
        assert names == [name for name, number in numbers.items() if number in label]
        assert all(len(task.colors) == 1 for task in example.tasks)
        reading = {}
        for name in names:
            found = (label == numbers[name]) ^ (rng.random((30, 40)) < 0.2)
            reading[name] = Mask(found, 1.0)
            both, either = found & (label == numbers[name]), (found | (label == numbers[name])) & (label != 0)
            counts[name] += both.sum(), either.sum()
        measures.append(measure(example, reading, (0, 0, 40, 30)))
    assert summarize(measures)["mcIoU"] == pytest.approx(np.mean([both / either for both, either in counts.values()]))


def test_an_expression_without_a_target_has_a_prompt_too():
    masks = {"the zebra": np.zeros((32, 32), bool), "a unicorn": np.zeros((32, 32), bool)}
    asked = [list(task.colors) for task in every_object(tiny.picture(), masks, random.Random(0))]
    assert asked == [["the zebra"], ["a unicorn"]]


def test_images_of_gopro_are_whole_and_those_of_sidd_are_cropped(tmp_path):
    for folder in ("GoPro/test/clip/blur", "GoPro/test/clip/sharp", "SIDD/val/input", "SIDD/val/gt"):
        (tmp_path / folder).mkdir(parents=True)
        tiny.picture(128, 72).save(tmp_path / folder / "1.png")
    for key, size in (("gopro", (128, 72)), ("sidd", (64, 64))):
        image, clean = open_source(FIGURES[key], tmp_path, 64).read(0, random.Random(0))
        assert image.size == clean.size == size
