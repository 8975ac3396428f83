import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.cocoeval import Params
from scipy.ndimage import gaussian_filter
from skimage import data
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from instructdiffusion_pipeline.datasets.keypoints import (
    AIC_JOINTS,
    AIC_SIGMAS,
    COCO_SIGMAS,
    CROWDPOSE_JOINTS,
    CROWDPOSE_SIGMAS,
)
from instructdiffusion_pipeline.evaluation import Example, metrics
from instructdiffusion_pipeline.evaluation.metrics import Overlap, keypoint_ap
from instructdiffusion_pipeline.evaluation.scoring import measure, summarize
from instructdiffusion_pipeline.tasks.colors import KEYPOINT_COLORS
from instructdiffusion_pipeline.tasks.keypoints import COCO_JOINTS, Keypoints
from instructdiffusion_pipeline.tasks.segmentation import Mask, Segmentation
from instructdiffusion_pipeline.types import Joint, LabeledMasks, Pose

AREA = 3000.0


def pose(shift=0.0, sigmas=COCO_SIGMAS, **changes):
    """A person with joints on a grid, all shifted to the right by `shift`; `changes` replace single joints."""
    joints = {name: Joint(20 + 7 * (i % 5) + shift, 20 + 9 * (i // 5), 0.9) for i, name in enumerate(sigmas)}
    return Pose(joints | {name.replace("_", " "): joint for name, joint in changes.items()}, AREA, sigmas)


def oks(person, found):
    """Object keypoint similarity as defined on COCO's page about keypoint evaluation, with k = 2 sigma."""
    parts = [
        np.exp(-((joint.x - found[name].x) ** 2 + (joint.y - found[name].y) ** 2) / (2 * AREA * (2 * sigma) ** 2))
        for name, sigma in person.sigmas.items()
        if (joint := person[name])
    ]
    return np.mean(parts)


@pytest.mark.parametrize("sigmas", [COCO_SIGMAS, CROWDPOSE_SIGMAS, AIC_SIGMAS])
@pytest.mark.parametrize("shift", [0.0, 1.5, 3.0, 6.0, 12.0])
def test_ap_of_one_person_is_the_fraction_of_thresholds_below_oks(shift, sigmas):
    person, found = pose(sigmas=sigmas), pose(shift, sigmas)
    expected = np.mean([oks(person, found) >= threshold for threshold in np.arange(50, 100, 5) / 100])
    scores = keypoint_ap([person], [found])
    assert scores["AP"] == pytest.approx(expected)
    for name, threshold in ("AP50", 0.5), ("AP75", 0.75):
        assert scores[name] == pytest.approx(float(oks(person, found) >= threshold))


def test_ap_of_a_hit_and_a_miss_depends_on_the_order_of_their_scores():
    miss = {name: Joint(500, 500, 0.5) for name in COCO_SIGMAS}
    surer_miss = {name: Joint(500, 500, 1.0) for name in COCO_SIGMAS}
    # 101 recall levels from 0 to 1; a recall of one half is reached at a precision of 1, or of 1/2.
    assert keypoint_ap([pose(), pose()], [pose(), miss])["AP"] == pytest.approx(51 / 101)
    assert keypoint_ap([pose(), pose()], [pose(), surer_miss])["AP"] == pytest.approx(51 / 101 / 2)


def test_ap_ignores_unlabeled_joints_and_people_without_joints():
    nobody = Pose(dict.fromkeys(COCO_SIGMAS), AREA, COCO_SIGMAS)
    assert keypoint_ap([nobody], [pose()]) is None
    assert keypoint_ap([nobody, pose(nose=None)], [pose(), pose(nose=Joint(900, 900, 1.0))])["AP"] > 0.999


def test_a_joint_that_was_not_found_counts_as_missed_even_in_the_corner():
    corner = Pose({name: Joint(1, 1) for name in COCO_SIGMAS}, AREA, COCO_SIGMAS)
    assert keypoint_ap([corner], [dict.fromkeys(COCO_SIGMAS)])["AP"] == 0


def test_ap_needs_areas_and_one_set_of_joints():
    with pytest.raises(ValueError, match="`poses` must all have an area"):
        keypoint_ap([Pose(pose().joints, None, COCO_SIGMAS)], [pose()])
    with pytest.raises(ValueError, match="the same sigmas"):
        keypoint_ap([pose(), pose(sigmas=AIC_SIGMAS)], [pose(), pose()])


def test_oks_sigmas_are_the_published_ones():
    assert tuple(COCO_SIGMAS) == COCO_JOINTS
    assert list(COCO_SIGMAS.values()) == pytest.approx(Params("keypoints").kpt_oks_sigmas)
    # crowdposetools has tenths; left and right joints have the same value
    pairs = {"shoulder": 0.79, "elbow": 0.72, "wrist": 0.62, "hip": 1.07, "knee": 0.87, "ankle": 0.89}
    both = {f"{side} {name}": tenths for name, tenths in pairs.items() for side in ("left", "right")}
    tenths = both | {"head top": 0.79, "neck": 0.79}
    assert {name: value / 10 for name, value in tenths.items()} == pytest.approx(CROWDPOSE_SIGMAS)
    assert all(COCO_SIGMAS[name] == pytest.approx(CROWDPOSE_SIGMAS[name]) for name in both)
    # keypoint_eval.py of AI Challenger has twice these values, in the order of its joints; left and right differ
    published = [
        0.01388152, 0.01515228, 0.01057665, 0.01417709, 0.01497891, 0.01402144, 0.03909642,
        0.03686941, 0.01981803, 0.03843971, 0.03412318, 0.02415081, 0.01291456, 0.01236173,
    ]  # fmt: skip
    assert dict(zip(AIC_JOINTS, published, strict=True)) == AIC_SIGMAS
    assert CROWDPOSE_SIGMAS.keys() == AIC_SIGMAS.keys() == set(CROWDPOSE_JOINTS)


def test_pck_is_the_fraction_of_labeled_joints_within_the_threshold():
    truth = {"nose": Joint(10, 10), "left hip": Joint(20, 20), "right hip": None, "neck": Joint(0, 0)}
    found = {"nose": Joint(13, 14), "left hip": None, "right hip": Joint(1, 1), "neck": Joint(6, 8)}
    steps = metrics.distances(truth, found, reference=100)
    assert steps == [0.05, float("inf"), 0.1]
    assert metrics.pck(steps, 0.05) == pytest.approx(1 / 3) and metrics.pck(steps, 0.1) == pytest.approx(2 / 3)
    assert metrics.pck([], 0.1) is None


def test_pixels_without_a_label_are_not_scored():
    """As in the evaluation of PASCAL VOC: a void rim around an object counts neither for nor against an output."""
    y, x = np.mgrid[:40, :40]
    distance = np.maximum(abs(x - 20), abs(y - 20))
    cat, rim = distance < 8, (distance >= 8) & (distance < 12)
    truth = LabeledMasks({"cat": cat}, ~rim)
    example = Example(Image.new("RGB", (40, 40)), [Segmentation({"cat": "red"})], truth)
    for found, score in ((cat | rim, 1.0), (cat, 1.0), (distance < 14, cat.sum() / ((distance < 14) & ~rim).sum())):
        scores = summarize([measure(example, {"cat": Mask(found, 1.0)}, (0, 0, 40, 40))])
        assert scores["mcIoU"] == scores["mIoU"] == pytest.approx(score)
    absent = Example(example.image, example.tasks, LabeledMasks({"cat": np.zeros_like(cat)}, ~rim))
    scores = summarize([measure(absent, {"cat": Mask(rim, 0.9)}, (0, 0, 40, 40))])
    assert scores["mIoU"] == scores["N-acc"] == 1 and scores["ECE"] is None


def test_pckh_leaves_out_pelvis_and_thorax():
    truth = {"upper neck": Joint(50, 30), "head top": Joint(50, 10), "pelvis": Joint(50, 80), "thorax": Joint(50, 40)}
    task = Keypoints(dict(zip(truth, KEYPOINT_COLORS, strict=False)))
    example = Example(Image.new("RGB", (100, 100)), [task], truth)
    found = truth | {"pelvis": None, "thorax": None, "head top": None}
    scores = summarize([measure(example, found, (0, 0, 100, 100))])
    assert scores["PCKh@0.5"] == 0.5 and scores["PCK@0.05 of the side"] == 0.25


def test_length_of_head_and_torso():
    joints = {"upper neck": Joint(0, 0), "head top": Joint(3, 4), "left shoulder": Joint(0, 0), "right hip": None}
    joints |= {"right shoulder": Joint(1, 0), "left hip": Joint(2, 9)}
    assert metrics.length(joints, metrics.HEAD) == 5
    assert metrics.length(joints, metrics.TORSO) is None
    # FLIC uses the distance from a shoulder to the hip of the other side.
    assert metrics.length(joints | {"right hip": Joint(8, 15)}, metrics.TORSO) == 17


@pytest.mark.parametrize(
    "reference, score, farthest",
    [
        ("side", "PCK@0.05 of the side", 0.05 * 160),  # the long side of 160 x 120 pixels
        ("torso", "PCK@0.2 of the torso", 0.2 * 50),
        ("head", "PCKh@0.5", 0.5 * 20),
    ],
)
def test_each_pck_counts_joints_up_to_its_fraction_of_its_reference(reference, score, farthest):
    truth = {"nose": Joint(80, 10)}
    truth |= {"torso": {"left shoulder": Joint(60, 30), "right hip": Joint(90, 70), "left hip": Joint(60, 70)}}.get(
        reference, {}
    )
    truth |= {"head": {"upper neck": Joint(80, 30), "head top": Joint(80, 10)}}.get(reference, {})
    task = Keypoints(dict(zip(truth, KEYPOINT_COLORS, strict=False)))
    example = Example(Image.new("RGB", (160, 120)), [task], truth)
    for off, right in (farthest - 0.01, 1), (farthest + 0.01, 0):
        found = truth | {"nose": Joint(80 + off, 10)}
        scores = summarize([measure(example, found, (0, 0, 160, 120))])
        assert scores[score] == pytest.approx((len(truth) - 1 + right) / len(truth))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_ious_agree_with_counted_pixels(seed):
    rng = np.random.default_rng(seed)
    names = rng.choice(["cat", "dog", "sky"], 6)
    truths, founds = rng.random((2, 6, 8, 9)) < rng.random((2, 6, 1, 1))
    truths[0] = False
    overlaps = [Overlap.of(str(name), truth, found) for name, truth, found in zip(names, truths, founds, strict=True)]

    def cumulated(chosen):
        return (truths & founds)[chosen].sum() / max(1, (truths | founds)[chosen].sum())

    single = [1.0 if not (t | f).any() else (t & f).sum() / (t | f).sum() for t, f in zip(truths, founds, strict=True)]
    assert metrics.mean_iou(overlaps) == pytest.approx(np.mean(single))
    assert metrics.cumulated_iou(overlaps) == pytest.approx(cumulated(slice(None)))
    there = [name for name in set(names) if (truths | founds)[names == name].any()]
    assert metrics.mean_class_iou(overlaps) == pytest.approx(np.mean([cumulated(names == name) for name in there]))


def test_scores_of_empty_true_masks():
    nothing, one, spot = np.zeros((3, 100, 100), bool)
    one[0, 0] = True
    spot[:4, :4] = True
    left_alone, stray, painted = (Overlap.of("cat", nothing, found) for found in (nothing, one, spot))
    assert [overlap.iou for overlap in (left_alone, stray, painted)] == [1, 1, 0]
    assert metrics.no_target_accuracy([left_alone, stray, painted]) == pytest.approx(2 / 3)
    assert metrics.no_target_accuracy([Overlap.of("cat", spot, nothing)]) is None
    assert Overlap.of("cat", one, one).iou == 1, "a true object may be small"
    assert metrics.cumulated_iou([left_alone, stray]) is None and metrics.mean_class_iou([left_alone]) is None


def test_masks_of_other_sizes_raise_an_error():
    with pytest.raises(ValueError, match=r"'cat' must be \(4, 5\) .* it is \(5, 4\)"):
        Overlap.of("cat", np.zeros((5, 4), bool), np.zeros((4, 5), bool))


def test_psnr_and_ssim_agree_with_their_formulas():
    truth = data.astronaut()[:90, :120]
    noisy = np.clip(truth + np.random.default_rng(0).normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    pictures = Image.fromarray(truth), Image.fromarray(noisy)
    x, y = truth.astype(float), noisy.astype(float)
    assert metrics.psnr(*pictures) == pytest.approx(10 * np.log10(255**2 / ((x - y) ** 2).mean()))

    def local(plane):
        return gaussian_filter(plane, 1.5, axes=(0, 1), truncate=3.5)

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert metrics.ssim(*pictures) == pytest.approx(ssim[5:-5, 5:-5].mean())


def test_equal_images_have_a_finite_psnr():
    picture = Image.fromarray(data.coffee())
    assert metrics.psnr(picture, picture) == 100 and metrics.ssim(picture, picture) == 1


def test_clip_similarity_is_the_cosine_of_clips_own_embeddings(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config=small | {"image_size": 32, "patch_size": 8}, text_config=small, projection_dim=16
    )
    model = CLIPModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    pictures = [Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())]
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt").pixel_values
        # CLIP compares the `image_embeds` of a whole forward pass with texts.
        first, second = model(input_ids=torch.tensor([[0, 1]]), pixel_values=pixels).image_embeds
    similarity = metrics.ClipSimilarity(tmp_path)
    assert similarity(*pictures) == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-5)
    assert similarity(pictures[0], pictures[0]) == pytest.approx(1, abs=1e-5)

    elsewhere, seen = metrics.ClipSimilarity(tmp_path, device="meta"), []
    elsewhere.model.vision_model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["pixel_values"].device), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="meta"):  # tensors on this device have no values
        elsewhere(*pictures)
    assert {*seen, elsewhere.model.device} == {torch.device("meta")}
