"""What training starts from, and what of it is trained."""

from os import PathLike

import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.training.config import TrainingConfig
from instructdiffusion_pipeline.training.loss import denoising_loss

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def load_start(model: str | PathLike[str]) -> InstructDiffusionPipeline:
    """A pipeline to train, in float32, from a folder or Hub id: InstructDiffusion's, or Stable Diffusion's widened.

    The scheduler becomes InstructDiffusion's, but predicts what the model's own does (epsilon or velocity); a safety
    checker stays behind. Raises what `widen` raises.
    """
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    pipeline = InstructDiffusionPipeline.from_pretrained(
        model, unet=widen(unet), safety_checker=None, requires_safety_checker=False, dtype=torch.float32
    )
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    return pipeline


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """`unet` with twice the input channels, for the image latents, as in InstructPix2Pix (Brooks et al., 2023, 3.2).

    Their weights are zero, so that its output does not change until it is trained. One that takes twice the channels
    it gives is returned as it is. Raises a ValueError for any other number.
    """
    channels, latent_channels = unet.config.in_channels, unet.config.out_channels
    if channels == 2 * latent_channels:
        return unet
    if channels != latent_channels:
        raise ValueError(
            f"`unet` must take {latent_channels} or {2 * latent_channels} channels, noisy latents or these and image"
            f" latents; got {channels}."
        )
    narrow = unet.conv_in
    wide = nn.Conv2d(
        2 * channels, narrow.out_channels, narrow.kernel_size, padding=narrow.padding, dtype=narrow.weight.dtype
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :channels] = narrow.weight
        wide.bias = narrow.bias
    unet.conv_in = wide
    unet.register_to_config(in_channels=2 * channels)
    return unet


class Denoiser(nn.Module):
    """What is trained, as one module: the UNet, or low-rank additions to it, and the text encoder if it learns too."""

    def __init__(self, pipeline: InstructDiffusionPipeline, config: TrainingConfig):
        super().__init__()
        # Trained in float32 whatever they were stored in; mixed precision casts as it goes.
        self.unet = pipeline.unet.float().train().requires_grad_(config.lora_rank is None)
        if config.lora_rank:
            lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=ATTENTION)
            self.unet.add_adapter(lora)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.text_encoder = pipeline.text_encoder.float().train() if config.train_text_encoder else None
        if self.text_encoder is not None:
            self.text_encoder.requires_grad_(True)

    def forward(
        self,
        scheduler: DDPMScheduler,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        text: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        min_snr_gamma: float | None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each sample, [B]; `text` are token ids where the text encoder is trained, else embeddings."""
        prompt_embeds = text if self.text_encoder is None else self.text_encoder(text).last_hidden_state
        return denoising_loss(
            self.unet, scheduler, latents, image_latents, prompt_embeds, noise, timesteps, min_snr_gamma, weights
        )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that the optimizer moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_lora(pipeline: InstructDiffusionPipeline, folder: str | PathLike[str]) -> None:
    """Write the low-rank additions of a trained UNet as `load_lora_weights` reads them, a few megabytes."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
