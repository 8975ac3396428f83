import pickle

import numpy as np
import pytest
import test_segmentation_datasets
import test_keypoints_datasets
import tiny
from folders import save_image, write_json
from numpy.lib.stride_tricks import sliding_window_view

from instructdiffusion_pipeline.datasets.specs import ORIGINAL, original_mixture
from instructdiffusion_pipeline.datasets.transforms import PersonCrop


def write_all(root):
    """A few sources of each family, each with one or two samples."""
    content = test_keypoints_datasets.people(test_people.annotation(7, area=300))
    write_json(root / "coco" / "annotations" / "person_keypoints_train2017.json", content)
    save_image(root / "coco" / "images" / "train2017" / "000000000001.jpg")
    test_segmentation_datasets.write_stuff(root / "coco-stuff")
    references = [test_segmentation_datasets.reference(1, 1, "left cat")]
    path, images = test_segmentation_datasets.write_references(root / "coco_2014" / "refcoco", references)
    images.rename(root / "coco_2014" / "images")
    (root / "coco_2014" / "images" / "train2014").mkdir()
    (root / "coco_2014" / "images" / "5.jpg").rename(root / "coco_2014" / "images" / "train2014" / "5.jpg")
    for side in ("NOISY", "GT"):
        save_image(root / "SIDD" / "Data" / "0001" / f"0001_{side}_SRGB_010.PNG", tiny.picture(300, 280))
    items = [{"input": "a.jpg", "output": "b.jpg", "expert_summary": ["dim", "dark"], "amateur_summary": []}] * 2
    write_json(root / "GIER_editing_data" / "GIER.json", items)
    for name in "ab":
        save_image(root / "GIER_editing_data" / "images" / f"{name}.jpg")


def test_a_part_of_the_originals_mixture(tmp_path):
    write_all(tmp_path)
    mixed = original_mixture(tmp_path, ["coco", "coco-stuff", "refcoco", "sidd", "gier"], seed=3)
    # SIDD counts twenty times; a pair of GIER counts twice, however many instructions it has
    assert len(mixed) == 1 + 1 + 1 + 20 + 2
    for sample in (mixed[position] for position in range(len(mixed))):
        assert sample.image.size == sample.target.size == (256, 256) and sample.instruction
    pickle.dumps(mixed)


def test_noise_is_cut_out_of_its_picture_pixel_by_pixel(tmp_path):
    write_all(tmp_path)
    sample = original_mixture(tmp_path, ["sidd"])[0]
    crops = sliding_window_view(np.asarray(tiny.picture(300, 280)), (256, 256, 3))
    image = np.asarray(sample.image)
    assert any((crops == cut).all((-3, -2, -1)).any() for cut in (image, image[:, ::-1]))


def test_half_bodies_are_cocos_alone_in_three_of_ten_cases():
    halves = {
        name: item.geometry.half_body for name, item in ORIGINAL.items() if isinstance(item.geometry, PersonCrop)
    }
    assert halves == {"coco": 0.3, "mpii": 0, "crowdpose": 0, "aic": 0}


def test_names_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="`names` must be out of mpii, coco, .*; got COCO"):
        original_mixture(tmp_path, ["coco", "COCO"])


def test_weights_are_the_originals():
    weights = {name: ingredient.weight for name, ingredient in ORIGINAL.items() if ingredient.weight != 1}
    expected = {"aic": 0.1, "gopro": 2, "reds": 0.2, "sidd": 20, "clwd": 0.2, "instructpix2pix": 0.2, "gier": 2}
    assert weights == expected and len(ORIGINAL) == 17
