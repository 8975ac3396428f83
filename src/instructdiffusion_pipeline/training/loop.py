"""The training loop, which uses accelerate."""

import math
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.scheduler import AcceleratedScheduler
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from instructdiffusion_pipeline.datasets.mixture import check_source_names
from instructdiffusion_pipeline.files import save_image
from instructdiffusion_pipeline.fingerprint import fingerprint
from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.training import checkpoints
from instructdiffusion_pipeline.training.config import PRECISIONS, TrainingConfig
from instructdiffusion_pipeline.training.data import (
    MultiSizeDataset,
    TrainingSamples,
    count_workers,
    dataset_fingerprint,
    tokenize,
)
from instructdiffusion_pipeline.training.encoding import (
    Batch,
    FrozenEncoders,
    NoiseCollator,
    diffusion_latents,
    drop_conditioning,
)
from instructdiffusion_pipeline.training.loss import loss_weights
from instructdiffusion_pipeline.training.metrics import TrainingMetrics, log_images
from instructdiffusion_pipeline.training.model import Denoiser, save_lora, trainable_parameters
from instructdiffusion_pipeline.training.validation import SEED, ValidationExample, validation_grid, validation_loss

VALIDATION_SAMPLES = 256  # maximum number; they are encoded again each time
SHOWN_LOSSES = 100  # number of updates over which the loss in the progress bar is averaged


def train(
    pipeline: InstructDiffusionPipeline,
    dataset: TrainingSamples,
    config: TrainingConfig,
    output_dir: str | PathLike[str],
    resume: str | Path | None = None,
    validation: Sequence[ValidationExample] = (),
    validation_dataset: TrainingSamples | None = None,
    resume_changes: Collection[str] = (),
) -> InstructDiffusionPipeline:
    """Train `pipeline` on `dataset`.

    A resumed run gives the weights of an uninterrupted one, on a CPU bit by bit. accelerate sets `mixed_precision` for
    the whole process at the first call.

    Args:
        pipeline: trained in place, see `load_for_training`.
        dataset: an `ImageDataset`, a `CachedDataset`, or a `MultiSizeDataset` of these.
        config: the settings.
        output_dir: gets checkpoints, validation images and logs.
        resume: "latest" or the folder of a checkpoint, to continue a run.
        validation: examples whose outputs are saved before the first update and every `validation_steps` updates.
        validation_dataset: samples that are not trained on, whose mean loss is logged at the same updates. The
            loss is computed with the EMA weights on the first 256 samples, with fixed noise and without loss weights
            or conditioning dropout.
        resume_changes: names of settings in which the run may differ from its checkpoint: fields of `config`, or
            "samples", "sources" and "content" for changed data.

    Returns:
        The pipeline with the EMA weights (the last weights if `ema_decay` is 0), without `score_calibration`. With
        `lora_rank`, the LoRA layers are not fused, and the other weights of the UNet are rounded to
        `mixed_precision`, see `save_lora`.

    Raises:
        ValueError: if the machine or the data do not support the settings, two sources have the same name, or the
            checkpoints belong to another run.
        FloatingPointError: if a loss is not finite, or, without loss scaling, a gradient is not. No checkpoint
            contains the failed update.
    """
    # 1. Set up the machine and the modules to train.
    first = dataset[0]
    check_source_names(dataset.sources)
    check_config(config, pipeline, dataset)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    # On Hopper GPUs cuDNN's attention, the default since PyTorch 2.11, returns NaN gradients if all attention logits
    # of a query are below -88 (pytorch/pytorch#196678). Flash attention is then used instead.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # With `mixed_precision`, DeepSpeed would train the weights in half precision, so only the autocast below is used.
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else config.mixed_precision,
        step_scheduler_with_optimizer=False,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "logs")),
    )
    config = config.for_samples(len(dataset), accelerator.num_processes)
    set_seed(config.seed)
    folder, device = Path(output_dir), accelerator.device
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    encoders = FrozenEncoders.of(
        pipeline, device, PRECISIONS[config.mixed_precision], with_text=not config.train_text_encoder
    )
    # Checkpoints of LoRA do not contain the frozen weights, so these are hashed, before `Denoiser` rounds them.
    frozen_unet = fingerprint(pipeline.unet) if config.lora_rank else None

    # 2. Find the checkpoint to resume from, before the pipeline is changed. A sample and its noise depend only on its
    # position, so the state of the data need not be saved.
    samples_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    settings = asdict(config) | {
        "samples_per_step": samples_per_step,
        "samples": len(dataset),
        "sources": list(dataset.sources),
        "content": dataset_fingerprint(dataset, len(dataset)),
        "encoders": fingerprint(pipeline.vae, pipeline.text_encoder),
        "frozen_unet": frozen_unet,
        "scheduler": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
    }
    checkpoint = checkpoints.find(folder, resume, settings, resume_changes)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    if resume:
        accelerator.print(
            f"Resuming from {checkpoint}" if checkpoint else f"No checkpoint in {folder}: starting from the beginning"
        )
    model = Denoiser(pipeline, config)
    pipeline.register_to_config(score_calibration={})  # it is for the weights before training
    if config.torch_compile:
        model.compile()
    optimizer = make_optimizer(list(trainable_parameters(model).values()), config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.print(describe_size(pipeline, model, config, folder))
    collator = partial(
        NoiseCollator,
        latent_channels=pipeline.vae.config.latent_channels,
        vae_scale_factor=pipeline.vae_scale_factor,
        num_train_timesteps=scheduler.config.num_train_timesteps,
    )
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # a protocol, not torch's class
        config.batch_size,
        sampler=range(step * samples_per_step, config.max_train_steps * samples_per_step),
        num_workers=count_workers(config.num_workers, device, cached="target_mean" in first),
        collate_fn=collator(config.seed, timestep_bias=config.timestep_bias),
        pin_memory=device.type == "cuda",
    )
    denoiser, optimizer, lr_scheduler, loader = accelerator.prepare(model, optimizer, lr_scheduler, loader)
    trained = trainable_parameters(model)
    parameters = list(trained.values())
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` must be {accelerator.gradient_accumulation_steps}, as in accelerate's"
            f" configuration; got {config.gradient_accumulation_steps}."
        )
    # The trained weights are saved by name, without the frozen ones. With FSDP, accelerate saves shards.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    saved = {} if sharded else trained
    accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    if sharded and (validation or validation_dataset):
        accelerator.print("There is no validation with FSDP, because no process has all weights.")
        validation, validation_dataset = (), None
    ema = make_ema(accelerator, parameters, config.ema_decay)
    if checkpoint:
        checkpoints.load(accelerator, checkpoint, saved, ema)
        if accelerator.is_main_process:  # if the run was killed after writing a checkpoint
            checkpoints.delete_older(folder, config.checkpoints_total_limit)
        accelerator.step = 0  # counts the batches of an update; their number may have changed
        if resume_changes:
            apply_settings(optimizer, lr_scheduler, config)

    def save_model(path: Path) -> None:
        """Write the current model to a new folder, as it would be returned at the end of the run."""
        with ema_weights(ema, parameters):
            if config.lora_rank:
                save_lora(pipeline, path)
            elif sharded:
                path.mkdir()
            else:
                pipeline.save_pretrained(path)

    # 3. Train.
    if config.report_to:
        scalars = {name: value for name, value in settings.items() if not isinstance(value, dict | list)}
        accelerator.init_trackers("instructdiffusion", scalars)
    if validation:
        pipeline.to(device)
    empty_ids = tokenize(pipeline.tokenizer, "").to(device)
    empty_text = empty_ids if config.train_text_encoder else encoders.embed(empty_ids[None])[0]
    scale = pipeline.vae.config.scaling_factor
    validation_batches: Iterable[Batch] = ()
    if validation_dataset is not None:
        count = min(len(validation_dataset), VALIDATION_SAMPLES)
        validation_batches = DataLoader(
            validation_dataset,  # type: ignore[arg-type]
            config.batch_size,
            sampler=range(count),
            collate_fn=collator(SEED),
        )

    def validate(step: int) -> None:
        due = step % config.validation_steps == 0 or step == config.max_train_steps
        if not due or not accelerator.is_main_process:
            return
        path = validation_path(folder, step)
        with ema_weights(ema, parameters), accelerator.autocast():
            if validation_dataset is not None:
                loss = validation_loss(model, encoders, scheduler, validation_batches, scale, config.text_to_image)
                tqdm.write(f"Validation loss after {step} updates: {loss:.4f}")
                accelerator.log({"validation loss": loss}, step=step)
            if validation:
                path.parent.mkdir(exist_ok=True)
                grid = validation_grid(pipeline, validation, config.text_to_image)
                save_image(path, grid)
                log_images(accelerator.trackers, grid, step)

    # If the run was killed between a checkpoint and its validation, the validation is done now.
    if checkpoint is None or not validation_path(folder, step).exists():
        validate(step)
    metrics, seen = TrainingMetrics(dataset.sources, device), []
    recent: deque[float] = deque(maxlen=SHOWN_LOSSES)
    bar = tqdm(initial=step, total=config.max_train_steps, desc="training", disable=not accelerator.is_main_process)
    for batch in loader:
        # a. Target latents: a scaled sample of the posterior. Image latents: the mode of the posterior, not scaled.
        batch, noise = encoders.encode(batch), batch["step_noise"]
        latents, image_latents = diffusion_latents(batch, noise, scale, config.text_to_image)
        weights = None
        if config.change_weight is not None:
            weights = loss_weights(
                scale * batch["target_mean"], scale * batch["image_latents"].float(), config.change_weight
            )
        text, image_latents = drop_conditioning(
            batch["input_ids" if config.train_text_encoder else "prompt_embeds"].to(empty_text.dtype),
            image_latents,
            empty_text,
            noise.random_p,
            config.conditioning_dropout_prob,
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
                # The host waits only for these values of an update.
                unscaled = torch.as_tensor(0.0 if accelerator.scaler or norm is None else norm, device=device)
                loss, norm, skipped = torch.stack(
                    [update["loss"].mean(), unscaled.float(), update["skipped"].sum().float()]
                ).tolist()
                if not math.isfinite(loss + norm):
                    raise not_finite(update, norm, step, folder, dataset.sources)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        lr_scheduler.step()
        if ema:
            ema.step(parameters)

        # c. Save checkpoints, log, and make validation images.
        metrics.add(update["loss"], update["source"], int(skipped))
        recent.append(loss)
        bar.update()
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", skipped=metrics.skipped, refresh=False)
        last = step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or last:
            limit = config.checkpoints_total_limit
            checkpoints.save(accelerator, folder, step, settings, limit, saved, ema, save_model)
        if step % config.logging_steps == 0 or last:
            accelerator.log(metrics.summarize() | {"learning rate": lr_scheduler.get_last_lr()[0]}, step=step)
        validate(step)

    # 4. Return the pipeline with the EMA weights.
    bar.close()
    if ema:
        ema.copy_to(parameters)
    if accelerator.distributed_type == DistributedType.FSDP:
        pipeline.unet = gather_unet(accelerator, denoiser, pipeline.unet)
    accelerator.end_training()
    pipeline.unet.float().eval().requires_grad_(False)
    pipeline.text_encoder.eval().requires_grad_(False)
    return pipeline.to(device)


def validation_path(folder: Path, step: int) -> Path:
    """The file of the validation images after `step` updates."""
    return folder / "validation" / f"step-{step:06d}.png"


def check_tracker(name: str | None) -> None:
    """Raise a ValueError if a tracker is not installed, because accelerate would train without it."""
    trackers = [kind.value for kind in get_available_trackers()]
    if name not in (None, "all", *trackers):
        raise ValueError(
            f"`report_to` must be all or an installed tracker of accelerate ({', '.join(trackers) or 'none'}); "
            f"got {name!r}."
        )


def check_config(config: TrainingConfig, pipeline: InstructDiffusionPipeline, dataset: TrainingSamples) -> None:
    """Raise a ValueError if `config` does not fit the machine, the pipeline or the data."""
    # PartialState selects the device like Accelerator, but does not set the precision of the process.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device = state.device.type
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone; on CPUs set ACCELERATE_USE_CPU=true."
        )
    if config.mixed_precision == "fp16" and device == "cpu":
        raise ValueError('`mixed_precision` must be "bf16" or "no" on a CPU; got "fp16".')
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if config.mixed_precision == "fp16":
            raise ValueError('`mixed_precision` must be "bf16" or "no" with DeepSpeed; got "fp16".')
        # DeepSpeed clips gradients itself, as its configuration says. accelerate replaces "auto" by 1.
        clipping = DeepSpeedPlugin().deepspeed_config.get("gradient_clipping", 0)
        if config.max_grad_norm != (1 if clipping == "auto" else clipping):
            raise ValueError(
                f"`max_grad_norm` must be the gradient_clipping of the DeepSpeed configuration, {clipping}; got"
                f" {config.max_grad_norm:g}."
            )
    compiled = config.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() == "inductor"
    if (device, config.mixed_precision, compiled) == ("cpu", "bf16", True):
        # With inductor and bfloat16 on a CPU, 280 of 326 gradients are zero (torch 2.13).
        raise ValueError(
            '`mixed_precision` must be "no" on a CPU with `torch_compile` or ACCELERATE_DYNAMO_BACKEND=inductor,'
            ' because most gradients would be zero; got "bf16".'
        )
    if config.optimizer == "adamw8bit" and device != "cuda":
        raise ValueError(f'`optimizer` must be "adamw" on {device}, because "adamw8bit" needs CUDA.')
    check_tracker(config.report_to)
    pipeline.check_no_adapters()
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
    parts: Sequence[TrainingSamples] = [dataset]
    if isinstance(dataset, MultiSizeDataset):
        parts = dataset.datasets
        if dataset.batch_size != config.batch_size:
            raise ValueError(
                f"`batch_size` must be {dataset.batch_size}, as in `dataset`, so that the images of a batch have one"
                f" size; got {config.batch_size}."
            )
    for first in (part[0] for part in parts):
        if config.train_text_encoder and "prompt_embeds" in first:
            raise ValueError(
                "`train_text_encoder` needs token ids, but `dataset` has embeddings; cache it with embeddings=False."
            )
        if "target" in first:
            height, width = first["target"].shape[1:]
            factor = pipeline.size_multiple
            if height % factor or width % factor:
                raise ValueError(
                    f"`dataset` has images of {width} x {height} pixels; both must be multiples of {factor}."
                )


def describe_size(pipeline: InstructDiffusionPipeline, model: Denoiser, config: TrainingConfig, folder: Path) -> str:
    """The number of trained parameters, and the memory and disk space that training needs."""
    trained = count(trainable_parameters(model).values())
    state = 8 if config.optimizer == "adamw" else 2  # bytes per parameter in the optimizer
    average = 4 if config.ema_decay else 0
    modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    whole = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    written = trained * (4 + state + average) + (4 * trained if config.lora_rank else whole)
    # A new checkpoint is written before the oldest one is removed; the model is written at the end.
    saves = min(config.checkpoints_total_limit + 1, math.ceil(config.max_train_steps / config.checkpointing_steps))
    room = saves * written + whole
    free = shutil.disk_usage(folder).free
    lines = [
        f"Trained parameters: {trained:,} of {count(model.parameters()):,}",
        f"Memory without activations: {(whole + trained * (4 + state + average)) / 1e9:.2f} GB",
        f"Disk space: {written / 1e9:.2f} GB per checkpoint, {room / 1e9:.2f} GB in all, of {free / 1e9:.2f} GB free",
    ]
    if room > free:
        lines.append("Warning: the disk space may not suffice; a lower checkpoints_total_limit needs less.")
    return "\n".join(lines)


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """The number of values in `parameters`."""
    return sum(parameter.numel() for parameter in parameters)


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
    """The moving average (EMA) of `parameters`; None if `decay` is 0."""
    if not decay:
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "`ema_decay` must be 0 with FSDP, because a checkpoint would have the average of one shard only."
        )
    return EMAModel(parameters, decay=decay, foreach=True)


def apply_settings(
    optimizer: torch.optim.Optimizer, lr_scheduler: AcceleratedScheduler, config: TrainingConfig
) -> None:
    """Replace learning rate and weight decay, which a checkpoint has restored, with those of `config`."""
    schedule = lr_scheduler.scheduler  # a LambdaLR, like all of diffusers' schedulers
    schedule.base_lrs = [config.learning_rate] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        rate = config.learning_rate * factor(schedule.last_epoch)
        group |= {"lr": rate, "initial_lr": config.learning_rate, "weight_decay": config.weight_decay}


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
    """Replace the weights with their average inside the block."""
    if not ema:
        yield
        return
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


def not_finite(
    update: Mapping[str, torch.Tensor], norm: float, step: int, folder: Path, sources: Sequence[str]
) -> FloatingPointError:
    """The error for losses or gradients of an update that are not finite. It lists the samples of the update."""
    bad = ~torch.isfinite(update["loss"])
    samples = [
        f"{sources[source]} at position {position}"
        for source, position in zip(update["source"][bad].tolist(), update["position"][bad].tolist(), strict=True)
    ]
    problem = f"the loss is not finite for {', '.join(samples)}" if samples else f"the norm of the gradients is {norm}"
    seen = sorted({sources[source] for source in update["source"].tolist()})
    saved = checkpoints.list_checkpoints(folder)
    return FloatingPointError(
        f"update {step}: {problem}. Its samples are from {', '.join(seen)}. The last good checkpoint is"
        f" {saved[-1] if saved else 'not written yet'}."
    )
