"""The training objective: mean squared error on what the UNet predicts.

Epsilon in InstructDiffusion (Ho et al., 2020, equation 14; Geng et al., section 3.2). Where the scheduler's
`prediction_type` says so it is velocity, alpha times epsilon less sigma times the latents (Salimans and Ho, 2022,
appendix D).
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr

CHANGED = 0.1  # root mean square over channels of the difference of two scaled latents; of equal pictures it is 0


def denoising_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    min_snr_gamma: float | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each sample, float32, [B].

    `latents` [B, C, h, w] are the target's, scaled; `image_latents` [B, C, h, w] the input's, unscaled;
    `prompt_embeds` [B, 77, d]; `noise` like `latents`; `timesteps` [B], integers from 0 to 999; `weights`, of the
    places in latents, [B, 1, h, w].
    """
    by_velocity = scheduler.config.prediction_type == "v_prediction"
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    wanted = scheduler.get_velocity(latents, noise, timesteps) if by_velocity else noise
    prediction = unet(torch.cat([noisy_latents, image_latents], dim=1), timesteps, prompt_embeds).sample
    errors = F.mse_loss(prediction.float(), wanted.float(), reduction="none")
    loss = (errors if weights is None else weights * errors).mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        # Either way the error of the latents themselves counts min(snr, gamma) times: of it, errors of epsilon are
        # snr times as large, those of velocity snr + 1 times.
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if by_velocity else snr)
    return loss


def change_weights(target: torch.Tensor, image: torch.Tensor, change_weight: float) -> torch.Tensor:
    """Weights [B, 1, h, w] of the places in scaled latents [B, C, h, w]: where the answer differs from the input.

    They count `change_weight` times as much as the others, and the mean over a picture is 1: so a disc on a joint,
    three places in two hundred, is not lost in the rest, and pictures that change everywhere are weighed as before.
    """
    changed = (target - image).square().mean(1, keepdim=True).sqrt() > CHANGED
    weights = torch.where(changed, change_weight, 1.0)
    return weights / weights.mean(dim=(2, 3), keepdim=True)
