"""Compare the speed of training and inference with that of diffusers' InstructPix2Pix.

    python examples/benchmark.py --model small --output benchmark.json
    python examples/benchmark.py --model small --lora_rank 16
    python examples/benchmark.py --model small --measure inference

Training has three rows: diffusers' recipe; `train` on images; `train` on cached latents and embeddings. All use the
same model, images, batch size, precision and optimizer.

Inference has three rows, eager and with the UNet's transformer blocks compiled: diffusers' pipeline; ours with the
three branches of guidance; ours with the two branches that keypoints need. All have the same weights and the same
number of denoising steps. In one more call of each row, the times of UNet, VAE and the rest are measured. The matmul
peak is measured with products of large matrices.

The rows run alternately for several rounds. Each ratio is computed within one round, so that other load on the machine
affects both measurements. On a GPU, wall time is measured, in bfloat16; on a CPU, processor time of this process, in
float32. There is a warm-up before each measurement. The weights of `small` and `full` are random. The plot needs
`pip install ".[eval]"`.
"""

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError, add_data_argument, check_output, integer, run_script
from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.datasets.specs import DATASETS, load_sources
from instructdiffusion_pipeline.files import atomic_write, write_text
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, cache_samples, load_for_training, train
from instructdiffusion_pipeline.training.data import count_workers, tokenize
from instructdiffusion_pipeline.training.encoding import Batch, StepNoise
from instructdiffusion_pipeline.training.metrics import peak_memory
from instructdiffusion_pipeline.training.model import Denoiser
from instructdiffusion_pipeline.types import Edit

TINY_MODEL = Path(__file__).parent / "instructdiffusion-tiny"
PICTURES = 64
DROPOUT = 0.05  # conditioning_dropout_prob in the recipe's documentation
LORA_TARGET_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]  # of the recipe
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense FLOP per second, from NVIDIA's data sheets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["training", "inference"], default="training", help="default: training")
    parser.add_argument(
        "--model",
        default="small",
        help="tiny: examples/instructdiffusion-tiny; small: Stable Diffusion 1.5 with a quarter of the channels"
        " (default); full: Stable Diffusion 1.5; or a folder or Hub id",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="for inference (default: the GPU if there is one)")
    parser.add_argument(
        "--size", type=integer(8), help="side of the images, in pixels (default: 96 for tiny, 128 otherwise)"
    )
    add_data_argument(parser, DATASETS, required=False, help="datasets to train on instead of noise")
    parser.add_argument("--batch_size", type=integer(1), default=8, help="samples per update or call (default: 8)")
    parser.add_argument("--lora_rank", type=integer(1), help="train LoRA layers of this rank (default: all weights)")
    parser.add_argument("--num_workers", type=integer(0), default=0, help="data loader processes (default: 0)")
    parser.add_argument("--rounds", type=integer(1), default=5, help="number of measurements of each row (default: 5)")
    parser.add_argument(
        "--updates",
        type=integer(1),
        default=6,
        help="timed updates per measurement, after a warm-up of a third of that number (default: 6)",
    )
    parser.add_argument("--steps", type=integer(1), default=10, help="denoising steps of inference (default: 10)")
    parser.add_argument(
        "--output", type=Path, help="JSON file for the results; a plot is written next to it, as a PNG file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    args = parser.parse_args()
    if args.output and args.output.suffix != ".json":
        raise UsageError(f"--output: must be a .json file; got {args.output}.")
    if args.output:
        import matplotlib.pyplot  # noqa: F401 - here, as the CUDA acceptance run has none

        for path in (args.output, args.output.with_suffix(".png")):
            check_output("--output", path, args.overwrite)
    # Training uses the device that accelerate chooses.
    without_effect = {"training": ["device", "steps"], "inference": ["data", "lora_rank", "num_workers", "updates"]}
    for name in without_effect[args.measure]:
        if getattr(args, name) != parser.get_default(name):
            raise UsageError(f"--{name}: has no effect with --measure {args.measure}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no GPU.")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.size = args.size or (96 if args.model == "tiny" else 128)
    pipeline = build(args.model)
    if args.measure == "inference":
        settings = args.size, [args.batch_size], args.steps, args.rounds, device
        groups = [*compare_inference(pipeline, *settings), *compare_inference(pipeline, *settings, compiled=True)]
        report = {"rows": sum(groups, [])}
    else:
        config = training_config(args.batch_size, args.lora_rank, args.num_workers)
        samples = training_samples(pipeline, args.size, args.data)
        report = compare_training(pipeline, samples, config, args.rounds, args.updates)
    about = {name: str(value) for name, value in vars(args).items() if name not in ("output", "overwrite")}
    about |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)}
    print(", ".join(f"{name} {value}" for name, value in about.items()), table(report), sep="\n\n")
    if args.output:
        write_text(args.output, json.dumps(about | report, indent=2) + "\n")
        plot(report, f"{args.measure}, model {args.model}, {about['device']}", args.output.with_suffix(".png"))


def training_config(batch_size: int, lora_rank: int | None, num_workers: int) -> TrainingConfig:
    """Settings of a run that saves nothing and is stopped by `timed`."""
    return TrainingConfig(
        max_train_steps=10**6,
        checkpointing_steps=10**6,
        batch_size=batch_size,
        lora_rank=lora_rank,
        num_workers=num_workers,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
    )


def training_samples(pipeline: InstructDiffusionPipeline, size: int, data: list[str] | None) -> ImageDataset:
    """Samples of `size` x `size` pixels: of the datasets "NAME=FOLDER", or pairs of noise."""
    if data:
        try:
            sources = load_sources(data, size)
        except ValueError as error:
            raise UsageError(error) from error
    else:
        sources = [(Source("noise", Pictures(size), Editing.from_annotation), 1)]
    return ImageDataset(Mixture(sources), pipeline.tokenizer)


def compare_training(
    pipeline: InstructDiffusionPipeline, samples: ImageDataset, config: TrainingConfig, rounds: int, updates: int
) -> dict[str, Any]:
    """Time the three rows of training. Ratios refer to the first row."""
    device = Accelerator(mixed_precision=config.mixed_precision).device
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached = cache_samples(samples, PICTURES, copy_of(pipeline).to(device), Path(folder) / "cache")
        filling = time.perf_counter() - start
        turns: dict[str, Callable[[], Any]] = {
            "diffusers' recipe": lambda: train_recipe(copy_of(pipeline), samples, config),
            "train": lambda: train(copy_of(pipeline), samples, config, folder),
            "train, cached": lambda: train(copy_of(pipeline), cached, config, folder),
        }
        rows: list[dict[str, Any]] = [{"name": name, "samples_per_second": [], "peak_memory_gb": 0} for name in turns]
        for _ in range(rounds):
            for row in rows:
                seconds, peak = timed(turns[row["name"]], updates, device)
                row["samples_per_second"].append(updates * config.batch_size / seconds)
                row["peak_memory_gb"] = max(row["peak_memory_gb"], peak / 1e9)
    unet = Denoiser(copy_of(pipeline), config).unet.to(device)
    flop = training_flop(unet, samples.size[0] // pipeline.vae_scale_factor)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else ""
    limit = next((peak for name, peak in BF16_PEAK.items() if name in chip), None)
    for row in rows:
        row["ratios"] = ratios(row, rows[0])
        row["share_of_bf16_peak"] = limit and median(row["samples_per_second"]) * flop / limit
    return {"unet_flop_per_sample": flop, "cached_samples": PICTURES, "caching_seconds": filling, "rows": rows}


def compare_inference(
    pipeline: InstructDiffusionPipeline,
    size: int,
    batch_sizes: Sequence[int],
    steps: int,
    rounds: int,
    device: torch.device,
    compiled: bool = False,
    backend: str = "inductor",
) -> Iterator[list[dict[str, Any]]]:
    """Time calls with images of `size` x `size` pixels. Yields the three rows for each batch size.

    Ratios refer to diffusers' pipeline with the same batch size.

    Args:
        compiled: compile the transformer blocks of the UNet by `backend` of `torch.compile`. This takes much less time
            than compiling the whole UNet.
    """
    pipeline.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    parts = {name: part for name, part in pipeline.components.items() if name not in ("readout", "image_encoder")}
    peer = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    for each in (pipeline, peer):
        each.set_progress_bar_config(disable=True)
    ours = partial(pipeline, resolution=0, ensemble_size=1)
    turns: dict[str, Callable[..., Any]] = {
        "diffusers' InstructPix2Pix": partial(peer, guidance_scale=7.5, image_guidance_scale=1.5),
        "InstructDiffusion": partial(ours, guidance_scale=7.5, image_guidance_scale=1.5),
        "InstructDiffusion, keypoints": partial(ours, guidance_scale=6.0, image_guidance_scale=0.5),
    }
    pictures = [image for image, _ in Pictures(size)]
    flop, peak_rate = (
        prediction_flop(pipeline.unet, size // pipeline.vae_scale_factor),
        matmul_peak(device, pipeline.dtype),
    )
    if compiled:
        # Blocks of the same width have one compilation for all batch sizes.
        pipeline.unet.compile_repeated_blocks(backend=backend, dynamic=True)
    for count in batch_sizes:
        about = {"batch_size": count, "compiled": compiled, "samples_per_second": [], "peak_memory_gb": 0.0}
        rows = [{"name": name} | copy.deepcopy(about) for name in turns]
        calls = [
            partial(turn, ["make it winter"] * count, pictures[:count], num_inference_steps=steps)
            for turn in turns.values()
        ]
        for call in calls:  # warm-up
            call()
        turn_about = list(zip(rows, calls, strict=True))
        for _ in range(rounds):
            for row, call in turn_about:
                seconds, peak = timed_call(call, pipeline.device)
                row["samples_per_second"].append(count / seconds)
                row["peak_memory_gb"] = max(row["peak_memory_gb"], peak / 1e9)
            turn_about.reverse()  # so that no row is always the first
        for row, call in zip(rows, calls, strict=True):
            row["ratios"] = ratios(row, rows[0])
            row |= component_seconds(pipeline, call)
            row["matmul_peak"] = peak_rate
            row["share_of_matmul_peak"] = flop * row.pop("predictions") / row["unet_seconds"] / peak_rate
        yield rows


def component_seconds(pipeline: InstructDiffusionPipeline, call: Callable[[], Any]) -> dict[str, Any]:
    """Run `call`, and measure the seconds of all its UNet calls, of one of them, and of all but UNet and VAE.

    "predictions" is the number of samples that the UNet has processed, summed over its calls.
    """
    unet, device = pipeline.unet, pipeline.device
    spent = dict.fromkeys((unet, pipeline.vae.encoder, pipeline.vae.decoder), 0.0)
    batches = []

    def start(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        spent[module] -= clock(device)
        if module is unet:
            batches.append(len(inputs[0]))

    def stop(module: torch.nn.Module, *_: Any) -> None:
        spent[module] += clock(device)

    hooks = [
        hook for part in spent for hook in (part.register_forward_pre_hook(start), part.register_forward_hook(stop))
    ]
    try:
        total, _ = timed_call(call, device)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "unet_seconds": spent[unet],
        "unet_call_seconds": spent[unet] / len(batches),
        "other_seconds": total - sum(spent.values()),
        "predictions": sum(batches),
    }


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of ten products of two large square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = min(timed_call(partial(torch.matmul, matrix, matrix), device)[0] for _ in range(10))
    return 2 * side**3 / seconds


def ratios(row: dict[str, Any], peer: dict[str, Any]) -> list[float]:
    """The speed of `row` relative to that of `peer`, round by round."""
    pairs = zip(row["samples_per_second"], peer["samples_per_second"], strict=True)
    return [ours / theirs for ours, theirs in pairs]


def table(report: dict[str, Any]) -> str:
    """The report of `compare_training`, or the rows of `compare_inference`, as a Markdown table."""
    columns = ["", "samples per second", "ratio to diffusers", "peak memory, GB"]
    inference = "unet_call_seconds" in report["rows"][0]
    columns += (
        ["seconds per UNet call", "seconds outside UNet and VAE", "fraction of matmul peak"]
        if inference
        else ["fraction of bf16 peak"]
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report["rows"]:
        rate, speed = row["samples_per_second"], row["ratios"]
        share = row["share_of_matmul_peak" if inference else "share_of_bf16_peak"]
        times = [f"{row['unet_call_seconds']:.4f}", f"{row['other_seconds']:.3f}"] if inference else []
        cells = [
            label(row),
            f"{median(rate):.2f}",
            f"{median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})",
            f"{row['peak_memory_gb']:.2f}",
            *times,
            f"{share:.1%}" if share else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "cached_samples" in report:
        cached, seconds = report["cached_samples"], report["caching_seconds"]
        lines += ["", f"Caching {cached} samples took {seconds:.1f} s, {cached / seconds:.2f} per second."]
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    """The name of a row in the table and the plot."""
    if "batch_size" not in row:
        return row["name"]
    return f"{row['name']}, batch {row['batch_size']}, {'compiled' if row['compiled'] else 'eager'}"


def plot(report: dict[str, Any], title: str, path: Path) -> None:
    """Draw the median speed of each row as a bar, with the speed and memory of all rounds."""
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    for position, row in enumerate(rows):
        rates = row["samples_per_second"]
        color = "tab:gray" if row["name"].startswith("diffusers") else "tab:blue"
        axes.barh(position, median(rates), color=color)
        axes.plot(rates, [position] * len(rates), "k|")
        memory = f"{row['peak_memory_gb']:.2f} GB peak memory"
        axes.annotate(memory, (0, position), (4, 0), textcoords="offset points", va="center", color="white")
    axes.set(title=title, xlabel="samples per second: median and rounds")
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.invert_yaxis()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def train_recipe(pipeline: InstructDiffusionPipeline, samples: ImageDataset, config: TrainingConfig) -> None:
    """The training loop of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py with --use_ema.

    With `config.lora_rank` the UNet is frozen and gets LoRA layers, without EMA, as in
    examples/text_to_image/train_text_to_image_lora.py.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device, dtype = accelerator.device, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    unet = pipeline.unet.train()
    pipeline.vae.to(device, dtype).requires_grad_(False)
    pipeline.text_encoder.to(device, dtype).requires_grad_(False)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if rank := config.lora_rank:
        unet.requires_grad_(False).to(device, dtype)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGET_MODULES)
        )
        cast_training_params(unet, torch.float32)
        ema = None
    else:
        unet.requires_grad_(True)
        ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
        ema.to(device)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    lr_scheduler = get_scheduler(config.lr_scheduler, optimizer)
    endless = range(config.max_train_steps * config.batch_size)  # without pauses between epochs, as in `train`
    loader = DataLoader(
        samples,
        config.batch_size,
        sampler=endless,
        num_workers=count_workers(config.num_workers, device),
        collate_fn=collate,
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    bar = tqdm(total=config.max_train_steps, desc="the recipe")
    for batch in loader:
        with accelerator.accumulate(unet):
            loss = recipe_loss(unet, pipeline, batch, draw_on(device, pipeline, batch))
            mean = accelerator.gather(loss.repeat(config.batch_size)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if ema:
                ema.step(unet.parameters())
            bar.update()
            accelerator.log({"train_loss": mean})
        bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])


def collate(items: list[Batch]) -> Batch:
    """Batch items of `ImageDataset` as the recipe does: images [B, 3, H, W] from -1 to 1."""
    batch = default_collate([{name: item[name] for name in ("image", "target", "input_ids")} for item in items])
    return batch | {name: 2 * (batch[name] / 255) - 1 for name in ("image", "target")}


def draw_on(device: torch.device, pipeline: InstructDiffusionPipeline, batch: Batch) -> StepNoise:
    """Draw the noise of a batch on `device`, as the recipe does."""
    count, _, height, width = batch["target"].shape
    shape = (
        count,
        pipeline.vae.config.latent_channels,
        height // pipeline.vae_scale_factor,
        width // pipeline.vae_scale_factor,
    )
    return StepNoise(
        posterior_noise=torch.randn(shape, device=device, dtype=pipeline.vae.dtype),
        random_p=torch.rand(count, device=device),
        timesteps=torch.randint(0, pipeline.scheduler.config.num_train_timesteps, (count,), device=device),
        noise=torch.randn(shape, device=device, dtype=pipeline.vae.dtype),
    )


def recipe_loss(
    unet: torch.nn.Module, pipeline: InstructDiffusionPipeline, batch: Batch, draws: StepNoise
) -> torch.Tensor:
    """The recipe's loss for a `batch` from `collate`, a scalar."""
    vae, text_encoder = pipeline.vae, pipeline.text_encoder
    posterior = vae.encode(batch["target"].to(vae.dtype)).latent_dist
    latents = vae.config.scaling_factor * (posterior.mean + posterior.std * draws.posterior_noise)
    noisy_latents = pipeline.scheduler.add_noise(latents, draws.noise, draws.timesteps)
    embeds = text_encoder(batch["input_ids"])[0]
    image_latents = vae.encode(batch["image"].to(vae.dtype)).latent_dist.mode()

    empties_text = draws.random_p < 2 * DROPOUT
    empty_text = text_encoder(tokenize(pipeline.tokenizer, "")[None].to(vae.device))[
        0
    ]  # in every step, as the recipe does
    embeds = torch.where(empties_text[:, None, None], empty_text, embeds)
    zeroes_image = (draws.random_p >= DROPOUT) & (draws.random_p < 3 * DROPOUT)
    image_latents = image_latents * ~zeroes_image[:, None, None, None]

    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = pipeline.scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    else:
        target = draws.noise
    prediction = unet(torch.cat([noisy_latents, image_latents], dim=1), draws.timesteps, embeds).sample
    return F.mse_loss(prediction.float(), target.float())


class Timed(Exception):
    """Stops a measurement after its last timed update."""


def timed(turn: Callable[[], Any], updates: int, device: torch.device) -> tuple[float, int]:
    """Seconds of `updates` updates of `turn` after a warm-up, and the peak memory in bytes.

    On a GPU, memory that was allocated before, such as that of the model that `turn` copies, is not counted.
    """
    first, made, stamps = 1 + updates // 3, 0, []

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made in (first, first + updates):
            stamps.append(clock(device))
        if len(stamps) == 2:
            raise Timed

    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    reset_peak_memory(device)
    hook = register_optimizer_step_post_hook(count)
    try:
        turn()
    except Timed:
        return stamps[1] - stamps[0], peak_memory(device) - before
    finally:
        hook.remove()
    raise RuntimeError(f"Training ended after {made} updates, before the measurement was complete.")


def timed_call(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds that `call` takes, and its peak memory in bytes."""
    reset_peak_memory(device)
    start = clock(device)
    call()
    return clock(device) - start, peak_memory(device)


def clock(device: torch.device) -> float:
    """Seconds: wall time after a GPU has finished its work, or without a GPU processor time of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the counter that `peak_memory` reads."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def training_flop(unet: UNet2DConditionModel, side: int) -> int:
    """Floating-point operations of forward and backward pass for one sample with latents of `side` x `side`.

    Only gradients that the parameters of `unet` require are counted, so LoRA takes about two thirds of full training.
    """
    with FlopCounterMode(display=False) as counter:
        predict(unet, side).sum().backward()
    return counter.get_total_flops()


@torch.no_grad()
def prediction_flop(unet: UNet2DConditionModel, side: int) -> int:
    """Floating-point operations of the UNet for one sample with latents of `side` x `side`."""
    with FlopCounterMode(display=False) as counter:
        predict(unet, side)
    return counter.get_total_flops()


def predict(unet: UNet2DConditionModel, side: int) -> torch.Tensor:
    """The UNet's output for random latents of `side` x `side`."""
    latents = torch.randn(1, unet.config.in_channels, side, side, device=unet.device)
    timestep = torch.zeros(1, device=unet.device)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, device=unet.device)
    with torch.autocast(unet.device.type, torch.bfloat16):
        return unet(latents, timestep, text).sample


class Pictures(list):
    """Editing pairs of noise images, `size` x `size` pixels."""

    skipped: list[tuple[str, str]] = []

    def __init__(self, size: int):
        noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 2, size, size, 3), dtype=np.uint8)
        pairs = [[Image.fromarray(pixels) for pixels in pair] for pair in noise]
        super().__init__((image, Edit(f"number {index}", edited)) for index, (image, edited) in enumerate(pairs))

    def name(self, index: int) -> str:
        return f"picture {index}"


def build(model: str) -> InstructDiffusionPipeline:
    """Load a model, or make Stable Diffusion 1.5 with random weights; "small" has a quarter of its channels.

    Random weights are drawn on the GPU if there is one.
    """
    sizes = {"small": (4, 16, 6), "full": (1, 32, 12)}
    if model not in sizes:
        return load_for_training(TINY_MODEL if model == "tiny" else model)
    torch.manual_seed(0)
    part, groups, heads = sizes[model]
    tokenizer = CLIPTokenizer.from_pretrained(TINY_MODEL, subfolder="tokenizer")
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(TINY_MODEL, subfolder="scheduler")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=8,
            block_out_channels=[width // part for width in (320, 640, 1280, 1280)],
            cross_attention_dim=768 // part,
            norm_num_groups=groups,
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[width // part for width in (128, 256, 512, 512)],
            layers_per_block=2,
            norm_num_groups=groups,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768 // part,
                intermediate_size=3072 // part,
                num_attention_heads=heads,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    return InstructDiffusionPipeline(vae.eval(), text_encoder.eval(), tokenizer, unet.eval(), scheduler)


def copy_of(pipeline: InstructDiffusionPipeline) -> InstructDiffusionPipeline:
    """A copy of the model for a measurement that trains, moves and casts it."""
    return type(pipeline)(**copy.deepcopy(pipeline.components))


if __name__ == "__main__":
    run_script(main)
