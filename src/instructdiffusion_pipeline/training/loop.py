"""One training loop, from top to bottom; accelerate brings precision, processes and devices."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from instructdiffusion_pipeline.training.conditioning import drop_conditioning
from instructdiffusion_pipeline.training.config import TrainingConfig
from instructdiffusion_pipeline.training.data import EncodedSamples, EndlessShuffle, tokenize
from instructdiffusion_pipeline.training.loss import epsilon_loss


class Denoiser(nn.Module):
    """What is trained, as one module: the UNet, and the text encoder where the configuration says so."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, train_text_encoder: bool):
        super().__init__()
        # Trained in float32 whatever they were stored in; mixed precision casts as it goes.
        self.unet = unet.float().requires_grad_(True).train()
        self.text_encoder = text_encoder.float().requires_grad_(train_text_encoder).train(train_text_encoder)

    def forward(
        self,
        scheduler: DDPMScheduler,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        input_ids: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        min_snr_gamma: float | None,
    ) -> torch.Tensor:
        """Loss of each sample, [B]; shapes as in `epsilon_loss`."""
        prompt_embeds = self.text_encoder(input_ids).last_hidden_state
        return epsilon_loss(
            self.unet, scheduler, latents, image_latents, prompt_embeds, noise, timesteps, min_snr_gamma
        )


def train(
    pipeline: DiffusionPipeline, dataset: EncodedSamples, config: TrainingConfig, output_dir: Path
) -> DiffusionPipeline:
    """Train `pipeline` on `dataset` and return it with the averaged weights.

    Checkpoints go to `output_dir`; a run that was stopped goes on from its last one and gives, on a CPU, the weights
    of a run that was not. accelerate fixes the precision for the whole process with the first call.

    Raises:
        ValueError: `mixed_precision` is fp16 on a CPU, or `output_dir` holds checkpoints of another run.
        FloatingPointError: the loss is not finite.
    """
    if config.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError('mixed_precision: got "fp16" on a CPU, which would train in float32; use "bf16" or "no"')
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    settings = asdict(config) | {"processes": accelerator.num_processes, "samples": len(dataset)}
    set_seed(config.seed)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    denoiser = Denoiser(pipeline.unet, pipeline.text_encoder, config.train_text_encoder)
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    # accelerate steps the schedule once per process, so its lengths are given in those steps
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    denoiser, optimizer, lr_scheduler = accelerator.prepare(denoiser, optimizer, lr_scheduler)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(ema)
    first_step = restore(accelerator, output_dir, settings)
    ema.to(accelerator.device)  # a checkpoint is read to the CPU

    # The data order is a pure function of the seed and the step, so that resuming needs no state for it.
    world_batch = config.batch_size * accelerator.num_processes
    order = EndlessShuffle(len(dataset), config.seed, start=first_step * world_batch)
    batches = iter(accelerator.prepare(DataLoader(dataset, config.batch_size, sampler=order)))
    empty_ids = tokenize(pipeline.tokenizer, [""])[0].to(accelerator.device)
    scaling_factor = pipeline.vae.config.scaling_factor

    steps = range(first_step, config.max_train_steps)
    bar = tqdm(steps, initial=first_step, total=config.max_train_steps, disable=not accelerator.is_main_process)
    for step in bar:
        batch = next(batches)
        size, shape = len(batch["input_ids"]), batch["target_mean"].shape
        # 1. Draw in the original's order: posterior, dropout, timesteps, noise. All of it hangs on (seed, step, rank).
        entropy = np.random.SeedSequence((config.seed, step, accelerator.process_index))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        posterior_noise = torch.randn(shape, generator=generator).to(accelerator.device)
        draws = torch.rand(size, generator=generator).to(accelerator.device)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), generator=generator)
        timesteps = timesteps.to(accelerator.device)
        noise = torch.randn(shape, generator=generator).to(accelerator.device)

        # 2. Target latents are a scaled sample of the posterior; image latents its unscaled mode.
        latents = scaling_factor * (batch["target_mean"].float() + batch["target_std"].float() * posterior_noise)
        input_ids, image_latents = drop_conditioning(
            batch["input_ids"], batch["image_latents"].float(), empty_ids, draws
        )

        # 3. One step of AdamW, and of the average that is kept in the end.
        loss = denoiser(scheduler, latents, image_latents, input_ids, noise, timesteps, config.min_snr_gamma).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; the last checkpoint is in {output_dir}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(parameters)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

        if (step + 1) % config.checkpointing_steps == 0 or step + 1 == config.max_train_steps:
            save(accelerator, output_dir, step + 1, settings)

    ema.copy_to(parameters)
    pipeline.unet.eval().requires_grad_(False)
    pipeline.text_encoder.eval().requires_grad_(False)
    return pipeline.to(accelerator.device)


def save(accelerator: Accelerator, output_dir: Path, step: int, settings: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` aside, rename it into place, then drop older ones: a kill leaves a whole one."""
    final, partial = output_dir / f"checkpoint-{step}", output_dir / "partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process writes a part
    if accelerator.is_main_process:
        (partial / "settings.json").write_text(json.dumps(settings, indent=2))
        partial.rename(final)
        for older in output_dir.glob("checkpoint-*"):
            if older != final:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, output_dir: Path, settings: dict[str, Any]) -> int:
    """Load the newest checkpoint of `output_dir`, if there is one; returns the number of steps already taken.

    Its optimizer, schedule and data order mean what they say under its own settings only, so others are refused.
    """
    steps = [int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoint-*")]
    if not steps:
        return 0
    newest = output_dir / f"checkpoint-{max(steps)}"
    found = json.loads((newest / "settings.json").read_text())
    wrong = [
        f"{name} was {found[name]!r} and is {value!r}" for name, value in settings.items() if found[name] != value
    ]
    if wrong:
        raise ValueError(f"output_dir: {newest} belongs to another run: {', '.join(wrong)}. Name an empty folder.")
    accelerator.load_state(str(newest))
    return max(steps)
