"""A small run of the benchmark: recipe and `train` agree, and the report is complete. Speeds are not checked."""

import dataclasses
import json
import sys

import benchmark
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import run_script
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, train
from instructdiffusion_pipeline.training.encoding import draw_step_noise

BATCH = 8
OPTIONS = "--model tiny --size 32 --batch_size 2 --rounds 2 --updates 1"
CONFIG = TrainingConfig(max_train_steps=2, batch_size=BATCH, ema_decay=0)


@pytest.fixture(autouse=True)
def _any_precision():
    """Allows each test to set a precision, which accelerate otherwise sets once in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipe(request):
    """A model like Stable Diffusion 1.5, and one like `instructdiffusion-tiny`: velocity and eight latent channels."""
    parts = tiny.components()
    if request.param == "v_prediction":
        parts["scheduler"] = type(parts["scheduler"]).from_config(
            parts["scheduler"].config, prediction_type=request.param
        )
        for part, channels in (
            ("vae", {"latent_channels": 8}),
            ("unet", {"in_channels": 16, "out_channels": 8}),
        ):
            torch.manual_seed(0)
            parts[part] = type(parts[part]).from_config(parts[part].config, **channels).eval()
    return InstructDiffusionPipeline(**parts)


@pytest.fixture
def samples(pipe):
    return ImageDataset(
        Mixture([(Source("noise", benchmark.Pictures(32), Editing.from_annotation), 1)]), pipe.tokenizer
    )


def drawn(pipe, seed, positions):
    """The random numbers that `train` draws for a model of tests/tiny.py."""
    return draw_step_noise(seed, positions, torch.Size([pipe.vae.config.latent_channels, 16, 16]), 1000)


@pytest.fixture
def seed(pipe):
    """A seed whose batch drops each condition, and drops none for which recipe and `train` differ.

    From 0.05 to 0.1 the recipe drops both conditions, while `train`, like the original code, drops one.
    """
    for seed in range(1000):
        first, dropout = (drawn(pipe, seed, range(count)).random_p for count in (BATCH, 2 * BATCH))
        agrees = not ((dropout >= 0.05) & (dropout < 0.1)).any()
        if agrees and (first < 0.05).any() and ((first >= 0.1) & (first < 0.15)).any():
            return seed
    raise AssertionError("no such seed")


def test_recipe_and_train_have_the_same_loss_for_the_same_random_numbers(pipe, samples, tmp_path, seed):
    batch = benchmark.collate([samples[position] for position in range(BATCH)])
    peer = benchmark.copy_of(pipe)
    peer.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        recipe = benchmark.recipe_loss(peer.unet, peer, batch, drawn(pipe, seed, range(BATCH))).item()
    config = dataclasses.replace(CONFIG, max_train_steps=1, seed=seed, report_to="tensorboard")
    train(pipe, samples, config, tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "instructdiffusion"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([recipe], abs=1e-5)


def test_recipe_and_train_make_the_same_updates_for_the_same_random_numbers(
    pipe, samples, tmp_path, seed, monkeypatch
):
    batches = iter([range(BATCH), range(BATCH, 2 * BATCH)])
    monkeypatch.setattr(benchmark, "draw_on", lambda *_: drawn(pipe, seed, next(batches)))
    start, peer = benchmark.copy_of(pipe).unet.state_dict(), benchmark.copy_of(pipe)
    benchmark.train_recipe(peer, samples, CONFIG)
    train(pipe, samples, dataclasses.replace(CONFIG, seed=seed), tmp_path)
    for name, tensor in pipe.unet.state_dict().items():
        step = (tensor - start[name]).abs().mean()
        # Adam amplifies rounding errors of gradients that are nearly zero, so the mean is compared.
        assert step > 0 and (tensor - peer.unet.state_dict()[name]).abs().mean() < 0.02 * step, name


def test_the_report_has_three_rows_and_parses(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PICTURES", 4)
    monkeypatch.setattr(benchmark, "build", lambda model: pipe)
    monkeypatch.setattr(sys, "argv", f"benchmark.py {OPTIONS} --output {tmp_path}/figures.json".split())
    benchmark.main()
    names = ["diffusers' recipe", "train", "train, cached"]
    table = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert table[2:] == names
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in report["rows"]] == names and report["rows"][0]["ratios"] == [1, 1]
    assert all(len(row["samples_per_second"]) == 2 and min(row["samples_per_second"]) > 0 for row in report["rows"])
    assert report["unet_flop_per_sample"] > 0
    with Image.open(tmp_path / "figures.png") as drawn:
        assert drawn.format == "PNG" and len(drawn.convert("RGB").getcolors(2**24)) > 2


def test_the_report_of_instructdiffusion_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PICTURES", 2)
    output = tmp_path / "figures.json"
    options = "--model tiny --size 64 --batch_size 1 --rounds 1 --updates 1"
    monkeypatch.setattr(sys, "argv", f"benchmark.py {options} --output {output}".split())
    benchmark.main()
    assert len(json.loads(output.read_text())["rows"]) == 3


def test_with_lora_the_recipe_trains_only_the_lora_layers(samples, pipe):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    benchmark.train_recipe(pipe, samples, dataclasses.replace(CONFIG, batch_size=2, lora_rank=4))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in pipe.unet.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = {name: tensor for name, tensor in after.items() if "lora_B" in name}  # zero before the first update
    assert added and all(tensor.count_nonzero() for tensor in added.values())


def test_inference_is_compared_with_instructpix2pix_and_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    pipe = InstructDiffusionPipeline(**tiny.components())
    settings = {"size": 32, "batch_sizes": [1, 2], "steps": 2, "rounds": 1, "device": torch.device("cpu")}
    eager = sum(benchmark.compare_inference(pipe, **settings), [])
    compiled = sum(benchmark.compare_inference(pipe, compiled=True, backend=backend, **settings), [])
    names = ["diffusers' InstructPix2Pix", "InstructDiffusion", "InstructDiffusion, keypoints"]
    for rows, is_compiled in ((eager, False), (compiled, True)):
        assert [(row["name"], row["batch_size"], row["compiled"]) for row in rows] == [
            (name, count, is_compiled) for count in (1, 2) for name in names
        ]
        assert all(min(row["samples_per_second"]) > 0 for row in rows)
        assert [row["ratios"] for row in rows[::3]] == [[1]] * 2
        assert benchmark.table({"rows": rows}).count("\n") == 1 + len(rows)
        assert all(row["unet_seconds"] == pytest.approx(2 * row["unet_call_seconds"]) for row in rows)
        assert all(row["other_seconds"] > 0 and 0 < row["share_of_matmul_peak"] < 1 for row in rows)
    # One graph for blocks of one width with batches of 3, 2, 6 and 4; torch 2.6 makes one for each.
    assert len(graphs) == (4 if torch.__version__.startswith("2.6.") else 1)


def test_the_parts_of_a_call_are_counted(pipe):
    """Three branches of two samples, in two steps; a copy of each image goes through the VAE."""
    pipe.set_progress_bar_config(disable=True)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    pictures = [image for image, _ in benchmark.Pictures(32)[:2]]
    found = benchmark.component_seconds(
        pipe, lambda: pipe(["a", "b"], pictures, 2, guidance_scale=7.5, image_guidance_scale=1.5, resolution=0)
    )
    hook.remove()
    assert found["predictions"] == sum(calls) == 12
    assert not pipe.unet._forward_hooks and not pipe.vae.encoder._forward_pre_hooks


def test_operations_of_a_prediction_are_those_of_its_matrix_products():
    layer = torch.nn.Linear(8, 4)

    class Unet(torch.nn.Module):
        config = type("Config", (), {"in_channels": 2, "cross_attention_dim": 8})
        device = torch.device("cpu")

        def forward(self, latents, timestep, text):
            return type("Output", (), {"sample": layer(text)})

    assert benchmark.prediction_flop(Unet(), 4) == 2 * 77 * 8 * 4
    assert benchmark.training_flop(Unet(), 4) == 2 * 2 * 77 * 8 * 4  # the text needs no gradient


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cpu"], "--device: has no effect with --measure training"),
        (["--steps", "4"], "--steps: has no effect with --measure training"),
        (["--measure", "inference", "--lora_rank", "4"], "--lora_rank: has no effect with --measure inference"),
        (["--measure", "inference", "--data", "table=x"], "--data: has no effect with --measure inference"),
        (["--data", "coco=nowhere", "--data", "table=x"], "--data coco: there is no folder nowhere"),
        (["--device", "gpu", "--measure", "inference"], "argument --device: invalid choice: 'gpu'"),
        (["--output", "figures.png"], "--output: must be a .json file; got figures.png."),
    ],
)
def test_bad_arguments_have_status_2(options, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    with pytest.raises(SystemExit) as exit:
        run_script(benchmark.main)
    assert exit.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("existing", ["figures.json", "figures.png"])
def test_an_existing_report_is_kept_without_overwrite(existing, tmp_path, monkeypatch, capsys):
    (tmp_path / existing).write_text("old")
    monkeypatch.setattr(sys, "argv", f"benchmark.py --output {tmp_path / 'figures.json'}".split())
    with pytest.raises(SystemExit) as exit:
        run_script(benchmark.main)
    assert exit.value.code == 2 and f"{existing} exists" in capsys.readouterr().err
    assert (tmp_path / existing).read_text() == "old"


def test_a_measurement_starts_after_the_warm_up_and_ends(pipe, samples):
    made = []

    def turn():
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter])
        while True:
            optimizer.step()
            made.append(1)

    seconds, peak = benchmark.timed(turn, 6, Accelerator().device)
    assert len(made) == 8 and seconds > 0 and peak > 1e6, (
        "two and the first stamp, then six; the last one is cut short"
    )
    with pytest.raises(RuntimeError, match="after 2 updates"):
        benchmark.timed(lambda: benchmark.train_recipe(pipe, samples, CONFIG), 6, Accelerator().device)


def test_the_small_benchmark_model_has_a_sixteenth_of_the_weights_of_stable_diffusion():
    count = sum(parameter.numel() for parameter in benchmark.build("small").unet.parameters())
    assert count == pytest.approx(859_520_964 / 16, rel=0.01)
