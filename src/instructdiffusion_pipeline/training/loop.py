"""One training loop, from top to bottom; accelerate brings precision, processes and devices."""

import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
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
        self.unet = unet.requires_grad_(True)
        self.text_encoder = text_encoder.requires_grad_(train_text_encoder)

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
    of a run that was not. Raises FloatingPointError at a loss that is not finite and ValueError for fp16 on a CPU.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError('mixed_precision: got "fp16" on a CPU, which would train in float32; use "bf16" or "no"')
    set_seed(config.seed)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    denoiser = Denoiser(pipeline.unet, pipeline.text_encoder, config.train_text_encoder).train()
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
    first_step = restore(accelerator, output_dir)
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
        with accelerator.autocast():
            loss = denoiser(
                scheduler, latents, image_latents, input_ids, noise, timesteps, config.min_snr_gamma
            ).mean()
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
            save(accelerator, output_dir, step + 1)

    ema.copy_to(parameters)
    denoiser = accelerator.unwrap_model(denoiser).eval().requires_grad_(False)
    pipeline.unet, pipeline.text_encoder = denoiser.unet, denoiser.text_encoder
    return pipeline


def save(accelerator: Accelerator, output_dir: Path, step: int) -> None:
    """Write `checkpoint-<step>` aside, rename it into place, then drop older ones: a kill leaves a whole one."""
    final, partial = output_dir / f"checkpoint-{step}", output_dir / "partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # each process writes a part
    if accelerator.is_main_process:
        partial.rename(final)
        for older in output_dir.glob("checkpoint-*"):
            if older != final:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def restore(accelerator: Accelerator, output_dir: Path) -> int:
    """Load the newest checkpoint of `output_dir`, if there is one; returns the number of steps already taken."""
    steps = [int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoint-*")]
    if not steps:
        return 0
    accelerator.load_state(str(output_dir / f"checkpoint-{max(steps)}"))
    return max(steps)
