"""The training loop, on accelerate."""

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

from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.fingerprint import fingerprint
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.training import checkpoints
from instructdiffusion_pipeline.training.config import TrainingConfig
from instructdiffusion_pipeline.training.data import TrainingSamples, check_source_names, dataset_fingerprint, tokenize
from instructdiffusion_pipeline.training.encoding import Batch, FrozenEncoders, NoiseCollator, drop_conditioning
from instructdiffusion_pipeline.training.loss import loss_weights
from instructdiffusion_pipeline.training.metrics import TrainingMetrics, log_images
from instructdiffusion_pipeline.training.model import Denoiser, trainable_parameters
from instructdiffusion_pipeline.training.validation import ValidationExample, validation_grid

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    pipeline: InstructDiffusionPipeline,
    dataset: TrainingSamples,
    config: TrainingConfig,
    output_dir: str | PathLike[str],
    resume: str | Path | None = None,
    validation: Sequence[ValidationExample] = (),
) -> InstructDiffusionPipeline:
    """Train `pipeline` on `dataset`.

    A resumed run gives the weights of an uninterrupted one; on a CPU they are equal bit by bit. accelerate fixes
    `mixed_precision` for the whole process at the first call.

    Args:
        pipeline: trained in place, see `load_for_training`.
        dataset: an `ImageDataset` or a `CachedDataset`.
        config: the settings.
        output_dir: gets checkpoints, validation pictures and logs.
        resume: "latest", or the folder of a checkpoint, to continue a run.
        validation: examples whose pictures are saved every `validation_steps` updates.

    Returns:
        The pipeline with the EMA weights (the last weights if `ema_decay` is 0), or with LoRA layers.

    Raises:
        ValueError: the settings do not fit the machine or the data, two sources have the same name, or the
            checkpoints are those of another run.
        FloatingPointError: a loss is not finite, or, without loss scaling, a gradient. No checkpoint contains the
            failed update.
    """
    # 1. Set up the machine and the modules to train.
    first = dataset[0]
    check_source_names(dataset.sources)
    check_config(config, pipeline, first)
    # With `mixed_precision` DeepSpeed would train the weights in half precision, so it only gets the autocast below.
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
    trained, present = trainable_parameters(denoiser), list(denoiser.parameters())
    accelerator.print(f"Trained parameters: {count_parameters(trained):,} of {count_parameters(present):,}")
    optimizer = make_optimizer(trained, config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )

    # 2. Resume. A sample and its noise depend on its position only, so the data needs no state of its own.
    samples_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    settings = asdict(config) | {
        "samples_per_step": samples_per_step,
        "samples": len(dataset),
        "sources": list(dataset.sources),
        "content": dataset_fingerprint(dataset, len(dataset)),
        "encoders": fingerprint(pipeline.vae, pipeline.text_encoder),
    }
    checkpoint = checkpoints.find(folder, resume, settings)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    if resume:
        accelerator.print(
            f"Resuming from {checkpoint}" if checkpoint else f"No checkpoint in {folder}: starting from the beginning"
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
    parameters = trainable_parameters(denoiser)
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {config.gradient_accumulation_steps}, but it is"
            f" {accelerator.gradient_accumulation_steps} in accelerate's configuration; they must be equal."
        )
    if accelerator.distributed_type == DistributedType.FSDP and validation:
        accelerator.print("Validation pictures are not made with FSDP, as no process has all weights.")
        validation = ()
    ema = make_ema(accelerator, parameters, config.ema_decay)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # counts the batches of an update, whose number may have changed
        if ema:
            ema.to(device)  # checkpoints are loaded to the CPU

    # 3. Train.
    if config.report_to:
        accelerator.init_trackers("instructdiffusion", {k: v for k, v in settings.items() if k != "sources"})
    if validation:
        pipeline.to(device)
    empty_ids = tokenize(pipeline.tokenizer, "").to(device)
    empty_text = empty_ids if config.train_text_encoder else encoders.embed(empty_ids[None])[0]
    metrics, seen = TrainingMetrics(dataset.sources, device), []
    bar = tqdm(initial=step, total=config.max_train_steps, desc="training", disable=not accelerator.is_main_process)
    for batch in loader:
        # a. Target latents are a scaled sample of the posterior, image latents the mode of theirs, not scaled.
        batch, noise = encoders.encode(batch), batch["step_noise"]
        scale = pipeline.vae.config.scaling_factor
        latents = scale * (batch["target_mean"] + batch["target_std"] * noise.posterior_noise)
        weights = None
        if config.change_weight is not None:
            weights = loss_weights(
                scale * batch["target_mean"], scale * batch["image_latents"].float(), config.change_weight
            )
        text, image_latents = drop_conditioning(
            batch["input_ids" if config.train_text_encoder else "prompt_embeds"].to(empty_text.dtype),
            torch.zeros_like(latents) if config.text_to_image else batch["image_latents"].float(),
            empty_text,
            noise.random_p,
        )

        # b. Compute gradients. After the last batch of an update, step the optimizer and the EMA.
        with accelerator.accumulate(denoiser):
            with torch.autocast(device.type, torch.bfloat16, enabled=deepspeed and config.mixed_precision == "bf16"):
                losses = denoiser(
                    scheduler,
                    latents,
                    image_latents,
                    text,
                    noise.noise,
                    noise.timesteps,
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

        # c. Save checkpoints, log, and make validation pictures.
        metrics.add(update["loss"], update["source"], update["skipped"])
        bar.update()
        bar.set_postfix(loss=f"{update['loss'].mean().item():.4f}", skipped=metrics.skipped, refresh=False)
        last = step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or last:
            checkpoints.save(accelerator, folder, step, settings, config.checkpoints_total_limit)
        if step % config.logging_steps == 0 or last:
            accelerator.log(metrics.summarize() | {"learning rate": lr_scheduler.get_last_lr()[0]}, step=step)
        if validation and (step % config.validation_steps == 0 or last):
            with ema_weights(ema, parameters), accelerator.autocast():
                grid = validation_grid(pipeline, validation, config.text_to_image)
            if accelerator.is_main_process:
                (folder / "validation").mkdir(parents=True, exist_ok=True)
                save_image(folder / "validation" / f"step-{step:06d}.png", grid)
                log_images(accelerator.trackers, grid, step)

    # 4. Return the pipeline with the EMA weights.
    bar.close()
    if ema:
        ema.copy_to(parameters)
    if accelerator.distributed_type == DistributedType.FSDP:
        pipeline.unet = gather_unet(accelerator, denoiser, pipeline.unet)
    accelerator.end_training()
    pipeline.unet.eval().requires_grad_(False)
    pipeline.text_encoder.eval().requires_grad_(False)
    return pipeline.to(device)


def check_config(config: TrainingConfig, pipeline: InstructDiffusionPipeline, first: Batch) -> None:
    """Raise a ValueError if `config` does not fit the machine, the pipeline or `first`, a sample of the data."""
    # PartialState finds the device as Accelerator does, but does not fix the precision of the process.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device = state.device.type
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone; on CPUs set ACCELERATE_USE_CPU=true."
        )
    if config.mixed_precision == "fp16" and device == "cpu":
        raise ValueError('`mixed_precision` is "fp16" on a CPU, which does not support it; use "bf16" or "no".')
    if config.mixed_precision == "fp16" and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError('`mixed_precision` must be "bf16" or "no" with DeepSpeed; got "fp16".')
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if (device, config.mixed_precision, compiler) == ("cpu", "bf16", "inductor"):
        # 280 of the 326 gradients of the small UNet are zero then (torch 2.13), and none in float32.
        raise ValueError(
            '`mixed_precision` is "bf16" on a CPU, where most gradients are zero with'
            ' ACCELERATE_DYNAMO_BACKEND=inductor; use "no", or do not compile.'
        )
    if config.optimizer == "adamw8bit" and device != "cuda":
        raise ValueError(f'`optimizer` is "adamw8bit", which needs CUDA; the device is {device}. Use "adamw".')
    expected = 2 * pipeline.vae.config.latent_channels
    if (channels := pipeline.unet.config.in_channels) != expected:
        raise ValueError(
            f"`pipeline` must have a UNet with {expected} input channels; got {channels}. See `load_for_training`."
        )
    prediction_type = pipeline.scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f'`pipeline.scheduler` must have the prediction_type "epsilon" or "v_prediction"; got {prediction_type!r}.'
        )
    if config.train_text_encoder and "prompt_embeds" in first:
        raise ValueError(
            "`train_text_encoder` needs token ids, but `dataset` has embeddings; cache it with embeddings=False."
        )
    if "target" in first:
        height, width = first["target"].shape[1:]
        # Each level of the UNet but the last halves the latents.
        factor = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`dataset` has pictures of {width} x {height} pixels; both must be multiples of {factor}."
            )


def count_parameters(parameters: Sequence[torch.nn.Parameter]) -> int:
    """The number of values in `parameters`."""
    return sum(parameter.numel() for parameter in parameters)


def latent_shape(item: Batch, pipeline: InstructDiffusionPipeline) -> torch.Size:
    """The shape [C, h, w] of the latents of a training sample, encoded or not."""
    if "target_mean" in item:
        return item["target_mean"].shape
    height, width = item["target"].shape[1:]
    factor = pipeline.vae_scale_factor
    return torch.Size([pipeline.vae.config.latent_channels, height // factor, width // factor])


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or the 8-bit AdamW of bitsandbytes."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError('`optimizer` is "adamw8bit", which needs `pip install bitsandbytes`.') from error
    return AdamW8bit(parameters, config.learning_rate, weight_decay=config.weight_decay)


def make_ema(accelerator: Accelerator, parameters: list[torch.nn.Parameter], decay: float) -> EMAModel | None:
    """The moving average (EMA) of `parameters`, saved with every checkpoint; None if `decay` is 0."""
    if not decay:
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("`ema_decay` must be 0 with FSDP, as a checkpoint would have the average of one shard only.")
    ema = EMAModel(parameters, decay=decay, foreach=True)
    accelerator.register_for_checkpointing(ema)
    return ema


def gather_unet(
    accelerator: Accelerator, denoiser: torch.nn.Module, unet: UNet2DConditionModel
) -> UNet2DConditionModel:
    """A UNet with the trained weights, gathered from the shards of `denoiser`, in the main process only."""
    weights = accelerator.get_state_dict(denoiser)
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(unet.config)
    if not weights:
        return whole.to_empty(device="cpu")
    whole.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()}, assign=True)
    return whole


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Replace the weights by their average inside the block."""
    if not ema:
        yield
        return
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


def check_finite(
    update: dict[str, torch.Tensor], norm: torch.Tensor | float | None, step: int, folder: Path, sources: Sequence[str]
) -> None:
    """Raise a FloatingPointError if losses or gradients of an update are not finite, and name its samples."""
    bad = ~torch.isfinite(update["loss"])
    if not bad.any() and (norm is None or math.isfinite(norm)):
        return
    samples = [
        f"{sources[source]} at position {position}"
        for source, position in zip(update["source"][bad].tolist(), update["position"][bad].tolist(), strict=True)
    ]
    problem = f"the loss is not finite for {', '.join(samples)}" if samples else f"the norm of the gradients is {norm}"
    seen = sorted({sources[source] for source in update["source"].tolist()})
    saved = checkpoints.list_checkpoints(folder)
    raise FloatingPointError(
        f"update {step}: {problem}. Its samples are from {', '.join(seen)}. The last good checkpoint is"
        f" {saved[-1] if saved else 'not written yet'}."
    )
