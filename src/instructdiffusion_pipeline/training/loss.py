"""The training objective: mean squared error on epsilon (Ho et al., 2020, equation 14; Geng et al., section 3.2)."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr


def epsilon_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Loss of each sample, float32, [B].

    `latents` [B, 4, h, w] are the target's, scaled; `image_latents` [B, 4, h, w] the input's, unscaled;
    `prompt_embeds` [B, 77, d]; `noise` like `latents`; `timesteps` [B], integers from 0 to 999.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(torch.cat([noisy_latents, image_latents], dim=1), timesteps, prompt_embeds).sample
    loss = F.mse_loss(prediction.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=min_snr_gamma) / snr
    return loss
