"""The readout: its inputs, its outputs, and its use as a component of a pipeline."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from instructdiffusion_pipeline import InstructDiffusionPipeline, Keypoints, Restoration, Segmentation, ask
from instructdiffusion_pipeline.readout import (
    CHANNELS,
    HEATMAP,
    MASK,
    asked_colors,
    heatmap_peak,
    read_with_readout,
    readout_inputs,
)
from instructdiffusion_pipeline.tasks.frames import Frame
from instructdiffusion_pipeline.training.readout import build_readout
from instructdiffusion_pipeline.types import Joint


def network(**changes):
    """A readout of the smallest size."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 64,
        "in_channels": CHANNELS,
        "out_channels": 2,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return UNet2DModel(**settings | changes).eval()


class Copy(UNet2DModel):
    """A readout that returns the decoding by color."""

    def forward(self, sample, timestep):
        share = sample[:, -1:]
        return UNet2DOutput(sample=(20 * (share - 0.5)).repeat(1, 2, 1, 1))


@pytest.fixture
def by_color():
    unet = network()
    unet.__class__ = Copy
    return unet


@pytest.fixture
def scene():
    mask = np.zeros((64, 64), bool)
    mask[10:30, 20:50] = True
    return tiny.picture(64, 64), mask


def test_a_readout_that_copies_decoding_by_color_returns_its_masks(by_color, scene):
    image, mask = scene
    task = Segmentation({"cat": "blue", "dog": "red"})
    answer = task.draw(image, {"cat": mask, "dog": ~mask})
    found = read_with_readout(by_color, task, image, answer)
    assert found.keys() == {"cat", "dog"}
    assert (found["cat"].pixels == mask).mean() > 0.98
    assert (found["dog"].pixels == ~mask).mean() > 0.98


def test_joints_are_decoded_at_the_discs(by_color, scene):
    image, _ = scene
    task = Keypoints({"nose": "red", "left wrist": "green", "right wrist": "blue"})
    joints = {"nose": Joint(20, 31), "left wrist": Joint(50, 12), "right wrist": None}
    found = read_with_readout(by_color, task, image, task.draw(image, joints))
    assert found["right wrist"] is None
    for name in ("nose", "left wrist"):
        assert np.hypot(found[name].x - joints[name].x, found[name].y - joints[name].y) < 1


def test_low_probabilities_give_empty_masks_and_no_joints(by_color, scene):
    image, mask = scene
    cat, nose = Segmentation({"cat": "blue"}), Keypoints({"nose": "red"})
    painted, marked = cat.draw(image, {"cat": mask}), nose.draw(image, {"nose": Joint(20, 31)})
    unsure, sure = (
        read_with_readout(by_color, cat, image, Image.blend(image, painted, share))["cat"] for share in (0.52, 0.65)
    )
    assert not unsure.pixels.any() and (sure.pixels == mask).mean() > 0.95
    unsure, sure = (
        read_with_readout(by_color, nose, image, Image.blend(image, marked, share))["nose"] for share in (0.45, 0.65)
    )
    assert unsure is None and sure is not None


def test_decoded_data_is_in_pixels_of_the_input_inside_the_box(by_color):
    """The output shows the center of an image twice as wide as high, at half its height."""
    image = tiny.picture(256, 128)
    mask = np.zeros((128, 256), bool)
    mask[40:90, 100:160] = True
    task = Segmentation({"cat": "green"})
    box = (64.0, 0.0, 192.0, 128.0)
    answer = task.draw(image, {"cat": mask}).crop(tuple(map(int, box))).resize((64, 64), Image.Resampling.LANCZOS)
    found = read_with_readout(by_color, task, image, answer, box)["cat"].pixels
    assert found.shape == mask.shape
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    assert not found[:, :64].any() and not found[:, 192:].any()


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (300, 200)])
def test_outputs_of_any_size_can_be_decoded(size):
    image = tiny.picture(*size)
    found = read_with_readout(network(), Segmentation({"cat": "blue"}), image, image)
    assert found["cat"].pixels.shape == size[::-1]


def test_its_inputs_are_both_images_the_color_and_the_coverage_by_color(scene):
    image, mask = scene
    task = Segmentation({"cat": "yellow"})
    answer = task.draw(image, {"cat": mask})
    (given,) = readout_inputs(Frame.of(image, answer), *asked_colors(task))
    assert given.shape == (CHANNELS, 64, 64)
    for channels, picture in ((given[:3], image), (given[3:6], answer)):
        np.testing.assert_allclose((channels.permute(1, 2, 0) + 1) * 127.5, np.asarray(picture), atol=1e-3)
    assert torch.equal(given[6:9, 0, 0], torch.tensor([1.0, 1.0, -1.0]))
    assert given[9][torch.from_numpy(mask)].mean() > 0.9 and given[9][torch.from_numpy(~mask)].abs().mean() < 0.1
    assert (MASK, HEATMAP) == (0, 1)


@pytest.mark.parametrize(("x", "y"), [(20.0, 30.0), (20.4, 30.7), (0.0, 0.0), (1.3, 62.0), (63.0, 40.5)])
def test_a_peak_is_found_with_subpixel_accuracy(x, y):
    rows, columns = np.indices((64, 64))
    found = heatmap_peak(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 4.5))
    assert found[:2] == pytest.approx((x, y), abs=0.35), "half a pixel at the rim, where one side cannot be seen"
    if 3 < x < 60 and 3 < y < 60:
        assert found[:2] == pytest.approx((x, y), abs=0.1)
    assert 0.8 < found[2] <= 1


def test_another_network_raises_an_error(scene):
    image, _ = scene
    with pytest.raises(ValueError, match="must have 10 input channels and 2 output channels; got 3 and 2"):
        read_with_readout(network(in_channels=3), Segmentation({"cat": "blue"}), image, image)


@pytest.mark.parametrize("task", [Segmentation({"cat": "blue"}), Keypoints({"nose": "red"})])
def test_a_readout_with_a_weight_that_is_not_finite_raises_an_error(task):
    readout, image = network(), Image.new("RGB", (64, 64))
    next(readout.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="`readout` returned values that are NaN or infinite"):
        read_with_readout(readout, task, image, image)


def test_a_logit_that_is_not_finite_raises_an_error():
    readout, image = network(), Image.new("RGB", (64, 64))
    readout.conv_out.bias.data[HEATMAP] = float("inf")
    with pytest.raises(ValueError, match="`readout` returned values that are NaN or infinite"):
        read_with_readout(readout, Segmentation({"cat": "blue"}), image, image)


@pytest.mark.parametrize("size", [(61, 47), (130, 70)])
def test_a_readout_of_five_levels_decodes_any_size(size):
    image, readout = tiny.picture(*size), build_readout(256).eval()
    assert len(readout.config.block_out_channels) == 5
    with torch.no_grad():
        readout.conv_out.bias[MASK] = 5.0
    found = read_with_readout(readout, Segmentation({"cat": "blue"}), image, image)
    assert found["cat"].pixels.shape == size[::-1] and found["cat"].pixels.all()


def test_ask_uses_the_readout_of_the_pipeline_by_default(pipe, by_color):
    image, task = tiny.picture(150, 100), Keypoints({"nose": "red"})
    settings = {"resolution": 64, "num_inference_steps": 2}
    pipe.register_modules(readout=by_color)
    answer = ask(pipe, image, task, generator=tiny.generator(), **settings)
    assert answer.data == read_with_readout(by_color, task, image, answer.picture, answer.box)
    plain = ask(pipe, image, task, generator=tiny.generator(), use_readout=False, **settings)
    assert plain.picture == answer.picture and plain.data == task.read(image, answer.picture, answer.box)


def test_images_are_decoded_by_their_task(pipe):
    pipe.register_modules(readout=network())
    answer = ask(pipe, tiny.picture(64, 64), Restoration("noise"), num_inference_steps=2, generator=tiny.generator())
    ((task, output),) = answer.outputs
    assert answer.data == task.transfer(answer.image, answer.reconstruction, output, answer.box)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_has_the_precision_of_its_pipeline(pipe, scene, dtype):
    image, mask = scene
    pipe.register_modules(readout=network())
    task = Segmentation({"cat": "blue"})
    exact = read_with_readout(pipe.readout, task, image, task.draw(image, {"cat": mask}))["cat"]
    pipe.to(dtype)
    assert pipe.readout.dtype == dtype
    half = read_with_readout(pipe.readout, task, image, task.draw(image, {"cat": mask}))["cat"]
    assert half.pixels.shape == exact.pixels.shape and half.score == pytest.approx(exact.score, abs=0.05)


def test_it_is_saved_and_loaded_as_a_component(pipe, tmp_path, scene):
    image, _ = scene
    pipe.register_modules(readout=network())
    pipe.save_pretrained(tmp_path)
    again = InstructDiffusionPipeline.from_pretrained(tmp_path)
    weights = again.readout.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.readout.state_dict().items())
    task = Segmentation({"cat": "blue"})
    first, second = (read_with_readout(each.readout, task, image, image)["cat"] for each in (pipe, again))
    assert np.array_equal(first.pixels, second.pixels) and first.score == pytest.approx(second.score)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_it_works_with_offloading(pipe, scene, offload):
    image, _ = scene
    pipe.register_modules(readout=network())
    task, settings = Segmentation({"cat": "blue"}), {"num_inference_steps": 2}
    before = ask(pipe, image, task, generator=tiny.generator(), **settings)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    for _ in range(2):
        after = ask(pipe, image, task, generator=tiny.generator(), **settings)
        assert np.array_equal(before.data["cat"].pixels, after.data["cat"].pixels)
        assert before.data["cat"].score == pytest.approx(after.data["cat"].score)


def test_it_works_with_sequential_offloading(scene):
    """Its weights are on the device "meta" until they are needed, so the device for its inputs is another one."""
    from accelerate import cpu_offload

    image, _ = scene
    readout, task = network(), Segmentation({"cat": "blue"})
    before = read_with_readout(readout, task, image, image)["cat"]
    cpu_offload(readout, torch.device("cpu"), offload_buffers=True)
    assert readout.device.type == "meta"
    after = read_with_readout(readout, task, image, image)["cat"]
    assert np.array_equal(before.pixels, after.pixels) and before.score == pytest.approx(after.score)
