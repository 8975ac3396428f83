import json
import random
import warnings
from collections import Counter

import paper_data
import pytest
import tiny
from folders import reasons, same, save_image, write_broken, write_json
from PIL import Image

from instructdiffusion_pipeline import upright_rgb
from instructdiffusion_pipeline.datasets import UnreadableSample, read_image
from instructdiffusion_pipeline.datasets.keypoints import (
    AIC_JOINTS,
    AP10K_SIGMAS,
    CROWDPOSE_JOINTS,
    MPII_JOINTS,
    CocoKeypoints,
    MpiiKeypoints,
    aic,
    ap10k,
    coco,
    crowdpose,
    humanart,
    mpii,
)
from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS
from instructdiffusion_pipeline.types import Joint

BOX = [4, 2, 20, 24]


def annotation(id, image_id=1, joints=17, **changes):
    keypoints = [5, 6, 2, 7, 8, 1, 0, 0, 0] + [0] * 3 * (joints - 3)
    item = {"id": id, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": BOX, "keypoints": keypoints}
    return item | changes


def without(entry, field):
    return {key: value for key, value in entry.items() if key != field}


def people(*annotations):
    images = [{"id": id, "file_name": f"{id:012}.jpg", "width": 40, "height": 30} for id in (1, 2, 3)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    return {"images": images, "categories": categories, "annotations": list(annotations)}


@pytest.mark.parametrize("folder", ["val2017", "images/val2017"])
def test_coco(folder, tmp_path):
    content = people(annotation(7, area=300.5))
    write_json(tmp_path / "annotations" / "person_keypoints_val2017.json", content)
    picture = tiny.picture(40, 30)
    save_image(tmp_path / folder / "000000000001.jpg", picture)
    dataset = coco(tmp_path, "val2017")
    image, person = dataset[0]
    assert len(dataset) == 1 and same(image, picture)
    assert dataset.name(0) == "000000000001.jpg, annotation 7"
    assert tuple(person.joints) == COCO_JOINTS
    assert person.joints["nose"] == Joint(5, 6) and person.joints["left eye"] == Joint(7, 8)
    assert person.joints["right eye"] is None
    # as in the original code, a box of 20 x 24 pixels spans 19 x 23, and the square around it is padded by a quarter
    assert person.center == (13.5, 13.5) and person.scale == pytest.approx((23 * 1.25 / 200,) * 2)
    assert (person.area, person.image_id, person.id) == (300.5, 1, 7)


def test_a_box_is_clipped_to_its_image(tmp_path):
    save_image(tmp_path / "000000000001.jpg")
    content = people(annotation(1, bbox=[-4, 20, 100, 100]))
    _, person = CocoKeypoints(write_json(tmp_path / "people.json", content), tmp_path)[0]
    # the rest spans pixels 0 to 39 and 20 to 29
    assert person.center == (19.5, 24.5) and person.scale == pytest.approx((39 * 1.25 / 200,) * 2)


def test_crowdpose_and_ai_challenger(tmp_path):
    content = people(annotation(7, joints=14))
    write_json(tmp_path / "json" / "crowdpose_train.json", content)
    save_image(tmp_path / "images" / "000000000001.jpg")
    _, person = crowdpose(tmp_path)[0]
    assert tuple(person.joints) == CROWDPOSE_JOINTS and person.area == pytest.approx(0.53 * 20 * 24)
    write_json(tmp_path / "json" / "crowdpose_val.json", people(annotation(7, joints=14, area=None)))
    assert crowdpose(tmp_path, "val")[0][1] == person

    (tmp_path / "json" / "crowdpose_val.json").unlink()
    write_json(tmp_path / "annotations" / "mmpose_crowdpose_val.json", content)
    assert crowdpose(tmp_path, "val")[0][1] == person

    write_json(tmp_path / "annotations" / "aic_val.json", content)
    folder = "ai_challenger_keypoint_validation_20170911/keypoint_validation_images_20170911"
    save_image(tmp_path / folder / "000000000001.jpg")
    _, person = aic(tmp_path, "val")[0]
    assert tuple(person.joints) == AIC_JOINTS and person.joints["right shoulder"] == Joint(5, 6)
    assert person.area == 20 * 24  # AI Challenger's evaluation uses the whole box
    with pytest.raises(ValueError, match="`split` must be one of train, val; got 'test'"):
        aic(tmp_path, "test")


def test_humanart_has_the_joints_of_coco_and_paths_from_its_parent_folder(tmp_path, monkeypatch):
    file = paper_data.write_humanart(tmp_path / "HumanArt", "validation")
    monkeypatch.chdir(tmp_path / "HumanArt")
    for root in (tmp_path / "HumanArt", ".", "annotations/.."):
        dataset = humanart(root, "validation")
        image, person = dataset[0]
        assert len(dataset) == 3 and same(image, tiny.picture(40, 30)) and tuple(person.joints) == COCO_JOINTS
    assert person.joints["nose"] == Joint(9, 5) and person.joints["right ankle"] is None and person.area == 500
    (tmp_path / "HumanArt").rename(tmp_path / "human-art")
    with pytest.raises(ValueError, match=f"{file.name}: no usable samples; skipped 3 with a missing file"):
        humanart(tmp_path / "human-art", "validation")


def test_ap10k_has_animals_of_all_categories_and_its_own_joints(tmp_path):
    file = paper_data.write_ap10k(tmp_path, "test-split1")
    dataset = ap10k(tmp_path, "test-split1")
    image, animal = dataset[1]
    assert len(dataset) == 3 and same(image, tiny.picture(40, 30)) and animal.id == 2 and animal.area == 500
    assert list(animal.joints) == [name.replace("_", " ") for name in paper_data.AP10K_NAMES] == list(AP10K_SIGMAS)
    assert animal.joints["left eye"] == Joint(12, 6) and animal.joints["right back paw"] is None
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 9
    file.write_text(json.dumps(content))
    assert reasons(ap10k(tmp_path, "test-split1")) == ["another category than those listed"]


@pytest.mark.parametrize(
    "name, joints",
    [("CrowdPose", CROWDPOSE_JOINTS), ("AIC", AIC_JOINTS), ("MPII", MPII_JOINTS), ("COCO", COCO_JOINTS)],
)
def test_joints_have_the_order_of_the_original_code(golden, name, joints):
    case = json.loads((golden / "data" / "pose" / f"target_{name}Dataset_0" / "case.json").read_text())
    original = {int(number): joint.replace("_", " ") for number, joint in case["keypoints_type"].items()}
    said = {"top head": "head top"}  # in CrowdPose; otherwise the names are those of the original code
    assert joints == tuple(said.get(original[number], original[number]) for number in range(len(original)))


def test_unusable_entries_are_skipped_with_a_reason(tmp_path):
    save_image(tmp_path / "000000000001.jpg")
    write_broken(tmp_path / "000000000002.jpg")
    content = people(
        annotation(1),
        annotation(2, image_id=2),
        annotation(3, image_id=3),
        annotation(4, keypoints=[0] * 51),
        annotation(5, iscrowd=1),
        annotation(6, category_id=2),
        annotation(7, bbox=[3, 3, 0, 0]),
        annotation(8, image_id=99),
        annotation(9, bbox=[]),
        annotation(10, image_id=4),
        without(annotation(11), "bbox"),
        annotation(12, keypoints=None),
        annotation(13, keypoints=[float("nan")] + annotation(13)["keypoints"][1:]),
        annotation(14, bbox=[4, 2, float("nan"), 24]),
        annotation(15, keypoints=[None] + annotation(15)["keypoints"][1:]),
        without(annotation(16), "id"),
        annotation(17, image_id=None),
        without(annotation(18), "category_id"),
        annotation(19, image_id=5),
        annotation(20, area=0),
        annotation(21, joints=14),
        annotation(22, bbox=[4, 2, 20]),
        annotation(23, area="large"),
        annotation(24, keypoints=5),
        annotation(25, keypoints=[[5, 6, 2]] * 17),
        annotation(26, image_id=[1]),
        annotation(27, bbox=[4, 2, 20, 1e300]),
        annotation(28, image_id=7),
        annotation(10**30),
    )
    content["images"].append({"id": 4, "file_name": "000000000001.jpg"})
    content["images"] += [{"id": 5, "width": 40, "height": 30}, {"file_name": "6.jpg", "width": 40, "height": 30}]
    content["images"].append({"id": 7, "file_name": "000000000001.jpg", "width": "40", "height": 30})
    content["images"] += [{"id": 8, "file_name": name} for name in ("../1.jpg", "/etc/1.jpg", "\0", "\ud800", 5)]
    content["categories"] += [{"supercategory": "animal"}, {"id": [1], "name": "person"}]
    dataset = CocoKeypoints(write_json(tmp_path / "people.json", content), tmp_path)
    assert len(dataset) == 2 and ("000000000003.jpg, annotation 3", "a missing file") in dataset.skipped
    assert ("image 99, annotation 8", "an image that the JSON lacks") in dataset.skipped
    assert ("000000000001.jpg, annotation None", "no 'id'") in dataset.skipped
    assert dataset.skipped[:2] == [("image 5", "no 'file_name'"), ("image 6.jpg", "no 'id'")]
    assert Counter(reasons(dataset)) == {
        "a crowd": 1,
        "a malformed 'area'": 1,
        "a malformed 'bbox'": 4,
        "a malformed 'file_name'": 5,
        "a malformed 'id'": 1,
        "a malformed 'image_id'": 1,
        "a malformed 'keypoints'": 4,
        "a malformed 'width'": 1,
        "a missing file": 1,
        "an image that the JSON lacks": 2,
        "an empty box": 2,
        "another category than person": 1,
        "another number of joints than 17": 1,
        "no 'bbox'": 1,
        "no 'category_id'": 1,
        "no 'file_name'": 1,
        "no 'id'": 2,
        "no 'image_id'": 1,
        "no 'keypoints'": 1,
        "no 'width'": 1,
        "no labeled joint": 1,
    }
    dataset[0]
    with pytest.raises(UnreadableSample, match=r"000000000002.jpg: .*(truncated|Truncated|broken)"):
        dataset[1]

    content = people(annotation(3, image_id=3), annotation(4, keypoints=[0] * 51), annotation(5, keypoints=[0] * 51))
    with pytest.raises(ValueError, match="people.json.*2 with no labeled joint, 1 with a missing file"):
        CocoKeypoints(write_json(tmp_path / "people.json", content), tmp_path)
    with pytest.raises(ValueError, match="skipped 1 with another number of joints than 17"):
        CocoKeypoints(write_json(tmp_path / "people.json", people(annotation(1, joints=14))), tmp_path)


def test_an_image_of_another_size_than_in_its_annotation_is_unreadable(tmp_path):
    save_image(tmp_path / "000000000001.jpg", tiny.picture(80, 60))
    dataset = CocoKeypoints(write_json(tmp_path / "people.json", people(annotation(1))), tmp_path)
    with pytest.raises(UnreadableSample, match=r"01.jpg: is of \(80, 60\) pixels, but of \(40, 30\) in its annot"):
        dataset[0]


@pytest.mark.parametrize(
    "read, file", [(CocoKeypoints, "a JSON file of COCO"), (MpiiKeypoints, "a JSON file of MPII")]
)
def test_annotations_that_cannot_be_read_raise_errors(read, file, tmp_path):
    path = tmp_path / "people.json"
    with pytest.raises(ValueError, match=f"There is no file .*people.json; it must be {file}"):
        read(path, tmp_path)
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=f"people.json must be {file}.*; got JSONDecodeError"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    "read, content, where",
    [
        (CocoKeypoints, [], " under 'categories'; got \\[\\]"),
        (CocoKeypoints, without(people(), "images"), " under 'images'; got {"),
        (CocoKeypoints, people() | {"images": {"1": "1.jpg"}}, " under 'images'; got {"),
        (CocoKeypoints, people(7), " under 'annotations'; got {"),
        (MpiiKeypoints, {"annolist": []}, "; got {'annolist': "),
        (MpiiKeypoints, ["a.jpg"], "; got \\['a.jpg'\\]"),
    ],
)
def test_annotations_of_a_wrong_structure_raise_errors(read, content, where, tmp_path):
    with pytest.raises(ValueError, match=f"people.json must contain a list of objects{where}"):
        read(write_json(tmp_path / "people.json", content), tmp_path)


def test_an_exif_orientation_is_not_applied_to_annotated_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = save_image(tmp_path / "000000000001.jpg", tiny.picture(40, 30), exif=exif)
    assert Image.open(picture).getexif()[0x0112] == 6
    image, _ = CocoKeypoints(write_json(tmp_path / "people.json", people(annotation(1))), tmp_path)[0]
    assert same(image, tiny.picture(40, 30))
    assert same(upright_rgb(image.crop((0, 0, 20, 30))), image.crop((0, 0, 20, 30))), "nor later on"


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_damaged_exif_block_is_ignored(kind, turn, tmp_path):
    exif, rng, readable = Image.Exif(), random.Random(0), 0
    exif[0x0112], exif[0x010F] = 6, "a maker"
    block, path = exif.tobytes(), tmp_path / f"picture.{kind}"
    for _ in range(150):
        damaged = bytearray(block[: rng.choice([len(block), rng.randint(1, len(block))])])
        for _ in range(rng.randint(0, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        tiny.picture(40, 30).save(path, kind, exif=bytes(damaged))
        with warnings.catch_warnings(action="ignore"):  # Pillow's warning that the block is damaged
            try:
                Image.open(path).load()
            except OSError:
                continue
            readable += 1
            size = read_image(path, turn=turn).size
        assert size == (40, 30) or turn and size == (30, 40)
    assert readable > 100


def test_mpii(tmp_path):
    person = {"image": "a.jpg", "center": [21.0, 11.0], "scale": 0.1, "joints": [[1.0, 1.0]] * 15 + [[9.0, 4.0]]}
    person["joints_vis"] = [0] + [1] * 15
    others = [
        person | {"image": "missing.jpg"},
        person | {"center": [-1, -1]},
        person | {"joints_vis": [0] * 16},
        person | {"image": "broken.jpg"},
        person | {"scale": 0},
        person | {"joints": person["joints"][:15], "joints_vis": [1] * 15},
        person | {"joints": [[float("nan"), 1.0]] * 16},
        person | {"center": None},
        *(without(person, field) for field in person),
        person | {"center": [21.0]},
        person | {"center": "21, 11"},
        person | {"scale": float("nan")},
        person | {"scale": 1e-300},
        person | {"image": "../a.jpg"},
        person | {"image": ["a.jpg"]},
        person | {"joints_vis": [None] * 16},
        person | {"joints": [1.0] * 16},
        person | {"joints": [[1e300, 1.0]] * 16},
    ]
    write_json(tmp_path / "annot" / "valid.json", [person, *others])
    save_image(tmp_path / "images" / "a.jpg")
    write_broken(tmp_path / "images" / "broken.jpg")
    dataset = mpii(tmp_path, "valid")
    assert len(dataset) == 2 and ("a.jpg, annotation 5", "no scale") in dataset.skipped
    assert ("None, annotation 9", "no 'image'") in dataset.skipped
    assert Counter(reasons(dataset)) == {
        "a malformed 'center'": 2,
        "a malformed 'image'": 2,
        "a malformed 'joints'": 4,
        "a malformed 'joints_vis'": 1,
        "a malformed 'scale'": 1,
        "a missing file": 1,
        "no 'center'": 2,
        "no 'image'": 1,
        "no 'joints'": 1,
        "no 'joints_vis'": 1,
        "no 'scale'": 1,
        "no center": 1,
        "no labeled joint": 1,
        "no scale": 2,
    }
    image, found = dataset[0]
    assert tuple(found.joints) == MPII_JOINTS
    assert found.joints["right ankle"] is None and found.joints["left wrist"] == Joint(8, 3)
    # counted from 1, and moved down by 15 pixels per unit of scale
    assert found.center == pytest.approx((20, 11.5)) and found.scale == pytest.approx((0.125, 0.125))
    assert dataset.name(1) == "broken.jpg, annotation 4"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annot" / "valid.json").rename(tmp_path / "annotations" / "mpii_val.json")
    assert len(mpii(tmp_path, "valid")) == 2
    with pytest.raises(UnreadableSample, match="broken.jpg"):
        dataset[1]
