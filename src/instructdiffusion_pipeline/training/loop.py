"""One training loop, from top to bottom; accelerate brings precision, processes and devices."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration, parse_flag_from_env, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from instructdiffusion_pipeline.fingerprint import fingerprint
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.training import checkpoints
from instructdiffusion_pipeline.training.conditioning import drop_conditioning
from instructdiffusion_pipeline.training.config import TrainingConfig
from instructdiffusion_pipeline.training.data import TrainingSamples, content, tokenize
from instructdiffusion_pipeline.training.encoding import Batch, FrozenEncoders
from instructdiffusion_pipeline.training.loss import change_weights
from instructdiffusion_pipeline.training.metrics import TrainingMetrics, show
from instructdiffusion_pipeline.training.model import Denoiser, trained_parameters
from instructdiffusion_pipeline.training.noise import NoiseCollator
from instructdiffusion_pipeline.training.validation import ValidationQuestion, validation_sheet

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    pipeline: InstructDiffusionPipeline,
    dataset: TrainingSamples,
    config: TrainingConfig,
    output_dir: str | PathLike[str],
    resume: str | Path | None = None,
    validation: Sequence[ValidationQuestion] = (),
) -> InstructDiffusionPipeline:
    """Train `pipeline` on `dataset` and return it with the averaged weights, or with low-rank additions.

    Checkpoints, validation pictures and logs go to `output_dir`. With `resume` ("latest", or the folder of a
    checkpoint) a run that was killed goes on, and gives, on a CPU, the weights of one that was not. accelerate fixes
    the precision for the whole process with the first call.

    Raises:
        ValueError: settings cannot be had on this machine or with this data, or `output_dir` or `resume` hold
            checkpoints of another run.
        FloatingPointError: the loss, or without loss scaling a gradient, is not finite; no checkpoint is of after it.
    """
    # 1. The machine, and what is trained on it.
    first = dataset[0]
    check_possible(config, pipeline, first)
    # DeepSpeed would train in half precision what accelerate trains in float32; so it only gets the autocast below.
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else config.mixed_precision,
        step_scheduler_with_optimizer=False,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "logs")),
    )
    set_seed(config.seed)
    folder, device = Path(output_dir), accelerator.device
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    encoders = FrozenEncoders.of(
        pipeline, device, PRECISIONS[config.mixed_precision], with_text=not config.train_text_encoder
    )
    denoiser = Denoiser(pipeline, config)
    trained, present = trained_parameters(denoiser), list(denoiser.parameters())
    accelerator.print(f"Trained parameters: {count(trained):,} of {count(present):,}")
    optimizer = make_optimizer(trained, config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )

    # 2. Where it goes on. What a sample is and draws hangs on its position, so resuming needs no state for it.
    samples_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    settings = asdict(config) | {
        "samples_per_step": samples_per_step,
        "samples": len(dataset),
        "sources": list(dataset.sources),
        "content": content(dataset, len(dataset)),
        "encoders": fingerprint(pipeline.vae, pipeline.text_encoder),
    }
    checkpoint = checkpoints.find(folder, resume, settings)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    if resume:
        accelerator.print(
            f"Going on with {checkpoint}" if checkpoint else f"No checkpoint in {folder} yet: from the start"
        )
    folder.mkdir(parents=True, exist_ok=True)
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # a protocol, not torch's class
        config.batch_size,
        sampler=range(step * samples_per_step, config.max_train_steps * samples_per_step),
        num_workers=config.num_workers,
        collate_fn=NoiseCollator(
            config.seed, latent_shape(first, pipeline), scheduler.config.num_train_timesteps, config.timestep_bias
        ),
        pin_memory=device.type == "cuda",
    )
    denoiser, optimizer, lr_scheduler, loader = accelerator.prepare(denoiser, optimizer, lr_scheduler, loader)
    parameters = trained_parameters(denoiser)
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {config.gradient_accumulation_steps}, but"
            f" {accelerator.gradient_accumulation_steps} in accelerate's configuration; they must agree."
        )
    if accelerator.distributed_type == DistributedType.FSDP and validation:
        accelerator.print("No validation pictures with FSDP: no process has all weights.")
        validation = ()
    ema = make_ema(accelerator, parameters, config.ema_decay)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # it counts the batches of an update, of which there may have been another number
        if ema:
            ema.to(device)  # a checkpoint is read to the CPU

    # 3. Train.
    if config.report_to:
        accelerator.init_trackers("instructdiffusion", {k: v for k, v in settings.items() if k != "sources"})
    if validation:
        pipeline.to(device)
    empty_ids = tokenize(pipeline.tokenizer, "").to(device)
    empty_text = empty_ids if config.train_text_encoder else encoders.embed(empty_ids[None])[0]
    watch, seen = TrainingMetrics(dataset.sources, device), []
    bar = tqdm(initial=step, total=config.max_train_steps, desc="training", disable=not accelerator.is_main_process)
    for batch in loader:
        # a. Target latents are a scaled sample of the posterior; image latents its unscaled mode.
        batch, draws = encoders.encode(batch), batch["draws"]
        posterior_sample = batch["target_mean"] + batch["target_std"] * draws.posterior_noise
        latents = pipeline.vae.config.scaling_factor * posterior_sample
        weights = None
        if config.change_weight is not None:
            scale = pipeline.vae.config.scaling_factor
            weights = change_weights(
                scale * batch["target_mean"], scale * batch["image_latents"].float(), config.change_weight
            )
        text, image_latents = drop_conditioning(
            batch["input_ids" if config.train_text_encoder else "prompt_embeds"].to(empty_text.dtype),
            torch.zeros_like(latents) if config.text_to_image else batch["image_latents"].float(),
            empty_text,
            draws.dropout,
        )

        # b. Gradients; after the last batch of an update one step of the optimizer, and of the average.
        with accelerator.accumulate(denoiser):
            with torch.autocast(device.type, torch.bfloat16, enabled=deepspeed and config.mixed_precision == "bf16"):
                losses = denoiser(
                    scheduler,
                    latents,
                    image_latents,
                    text,
                    draws.noise,
                    draws.timesteps,
                    config.min_snr_gamma,
                    weights,
                )
            accelerator.backward(losses.mean())
            seen.append({"loss": losses.detach()} | {name: batch[name] for name in ("position", "source", "skipped")})
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                update = accelerator.gather({name: torch.cat([part[name] for part in seen]) for name in seen[0]})
                seen.clear()
                check_finite(update, None if accelerator.scaler else norm, step, folder, dataset.sources)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        lr_scheduler.step()
        if ema:
            ema.step(parameters)

        # c. What people watch, and what survives a kill.
        watch.add(update["loss"], update["source"], update["skipped"])
        bar.update()
        bar.set_postfix(loss=f"{update['loss'].mean().item():.4f}", skipped=watch.skipped, refresh=False)
        last = step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or last:
            checkpoints.save(accelerator, folder, step, settings, config.checkpoints_total_limit)
        if step % config.logging_steps == 0 or last:
            accelerator.log(watch.line() | {"learning rate": lr_scheduler.get_last_lr()[0]}, step=step)
        if validation and (step % config.validation_steps == 0 or last):
            with averaged(ema, parameters), accelerator.autocast():
                sheet = validation_sheet(pipeline, validation, config.text_to_image)
            if accelerator.is_main_process:
                (folder / "validation").mkdir(parents=True, exist_ok=True)
                save_image(folder / "validation" / f"step-{step:06d}.png", sheet)
                show(accelerator.trackers, sheet, step)

    # 4. Hand over the average.
    bar.close()
    if ema:
        ema.copy_to(parameters)
    if accelerator.distributed_type == DistributedType.FSDP:
        pipeline.unet = whole_unet(accelerator, denoiser, pipeline.unet)
    accelerator.end_training()
    pipeline.unet.eval().requires_grad_(False)
    pipeline.text_encoder.eval().requires_grad_(False)
    return pipeline.to(device)


def check_possible(config: TrainingConfig, pipeline: InstructDiffusionPipeline, first: Batch) -> None:
    """Raise a ValueError for what would fail late, or quietly do something else; `first` is a sample of the data."""
    # As accelerate itself decides; its own Accelerator would fix the precision for the whole process.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device = state.device.type
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone; on CPUs set ACCELERATE_USE_CPU=true."
        )
    if config.mixed_precision == "fp16" and device == "cpu":
        raise ValueError('`mixed_precision` is "fp16" on a CPU, where it would train in float32; use "bf16" or "no".')
    if config.mixed_precision == "fp16" and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError('`mixed_precision` must be "bf16" or "no" with DeepSpeed; got "fp16".')
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if (device, config.mixed_precision, compiler) == ("cpu", "bf16", "inductor"):
        # Then 280 of the 326 gradients of the small UNet are zero (torch 2.13; in float32 none is); no loss shows it.
        raise ValueError(
            '`mixed_precision` is "bf16" on a CPU, where most gradients come out as zero with'
            ' ACCELERATE_DYNAMO_BACKEND=inductor; use "no", or do not compile.'
        )
    if config.optimizer == "adamw8bit" and device != "cuda":
        raise ValueError(f'`optimizer` is "adamw8bit", which needs CUDA; the device is {device}. Use "adamw".')
    wanted = 2 * pipeline.vae.config.latent_channels
    if (channels := pipeline.unet.config.in_channels) != wanted:
        raise ValueError(f"`pipeline` must have a UNet of {wanted} input channels; got {channels}. See `load_start`.")
    predicts = pipeline.scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f'`pipeline` must predict "epsilon" or "v_prediction"; its scheduler says {predicts!r}.')
    if config.train_text_encoder and "prompt_embeds" in first:
        raise ValueError(
            "`train_text_encoder` needs token ids, but `dataset` has embeddings; cache it with embeddings=False."
        )
    if "target" in first:
        height, width = first["target"].shape[1:]
        # The UNet halves at each level but the last, and its way up must meet its way down.
        factor = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`dataset` has pictures of {width} x {height} pixels; both must be multiples of {factor}."
            )


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    """The numbers in all `parameters`."""
    return sum(parameter.numel() for parameter in parameters)


def latent_shape(item: Batch, pipeline: InstructDiffusionPipeline) -> torch.Size:
    """[C, h, w] of the latents of a training sample, encoded or not."""
    if "target_mean" in item:
        return item["target_mean"].shape
    height, width = item["target"].shape[1:]
    factor = pipeline.vae_scale_factor
    return torch.Size([pipeline.vae.config.latent_channels, height // factor, width // factor])


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or the one of bitsandbytes, which keeps its moments in 8 bits."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError('`optimizer` is "adamw8bit", which needs `pip install bitsandbytes`.') from error
    return AdamW8bit(parameters, config.learning_rate, weight_decay=config.weight_decay)


def make_ema(accelerator: Accelerator, parameters: list[torch.nn.Parameter], decay: float) -> EMAModel | None:
    """The running average of `parameters`, saved with every checkpoint."""
    if not decay:
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("`ema_decay` must be 0 with FSDP: checkpoints would have the average of one shard only.")
    ema = EMAModel(parameters, decay=decay, foreach=True)
    accelerator.register_for_checkpointing(ema)
    return ema


def whole_unet(
    accelerator: Accelerator, denoiser: torch.nn.Module, unet: UNet2DConditionModel
) -> UNet2DConditionModel:
    """A UNet of the trained weights, of which `denoiser` holds shards. Only the first process gets their values."""
    weights = accelerator.get_state_dict(denoiser)
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(unet.config)
    if not weights:
        return whole.to_empty(device="cpu")
    whole.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()}, assign=True)
    return whole


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """The average in place of the weights."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema:
        ema.restore(parameters)


def check_finite(
    update: dict[str, torch.Tensor], norm: torch.Tensor | float | None, step: int, folder: Path, sources: Sequence[str]
) -> None:
    """Stop before an update whose losses or gradients are not finite, and say where to look."""
    bad = ~torch.isfinite(update["loss"])
    if not bad.any() and (norm is None or math.isfinite(norm)):
        return
    culprits = [
        f"{sources[source]} at position {position}"
        for source, position in zip(update["source"][bad].tolist(), update["position"][bad].tolist(), strict=True)
    ]
    what = f"the loss is not finite for {', '.join(culprits)}" if culprits else f"the norm of the gradients is {norm}"
    seen = sorted({sources[source] for source in update["source"].tolist()})
    saved = checkpoints.list_checkpoints(folder)
    raise FloatingPointError(
        f"update {step}: {what}. Its samples are from {', '.join(seen)}. The last good checkpoint is"
        f" {saved[-1] if saved else 'none: none was written yet'}."
    )
