"""The training objective: mean squared error of the UNet's prediction.

InstructDiffusion predicts epsilon (Ho et al., 2020, equation 14; Geng et al., section 3.2). With `prediction_type`
"v_prediction" the UNet predicts velocity, alpha * epsilon - sigma * latents (Salimans and Ho, 2022, appendix D).
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr

# Root mean square over channels of the difference of two scaled latents; it is 0 for equal images.
CHANGE_THRESHOLD = 0.1


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

    Args:
        latents: of the target, scaled, [B, C, h, w].
        image_latents: of the input, not scaled, [B, C, h, w].
        prompt_embeds: [B, 77, d].
        noise: [B, C, h, w].
        timesteps: integers from 0 to 999, [B].
        min_snr_gamma: gamma of Min-SNR weighting (Hang et al., 2023).
        weights: of the squared errors, [B, 1, h, w].
    """
    predicts_velocity = scheduler.config.prediction_type == "v_prediction"
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity else noise
    prediction = unet(torch.cat([noisy_latents, image_latents], dim=1), timesteps, prompt_embeds).sample
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    loss = (errors if weights is None else weights * errors).mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        # The squared error of the latents is weighted by min(snr, gamma). The squared error of epsilon is snr times
        # that of the latents, the squared error of velocity is snr + 1 times that.
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1 if predicts_velocity else snr)
    return loss


def loss_weights(target: torch.Tensor, image: torch.Tensor, change_weight: float) -> torch.Tensor:
    """Loss weights [B, 1, h, w] from scaled latents [B, C, h, w], with mean 1 for each image.

    Before the normalization, they are `change_weight` where target and input latents differ, and 1 elsewhere.
    """
    changed = (target - image).square().mean(1, keepdim=True).sqrt() > CHANGE_THRESHOLD
    weights = torch.where(changed, change_weight, 1.0)
    return weights / weights.mean(dim=(2, 3), keepdim=True)
