"""The model at the start of training, and its trainable parameters."""

from os import PathLike

import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from instructdiffusion_pipeline.pipeline_instruct_diffusion import InstructDiffusionPipeline
from instructdiffusion_pipeline.training.config import PRECISIONS, TrainingConfig
from instructdiffusion_pipeline.training.loss import denoising_loss

# Also conv_in, because its weights for the image latents are zero in a UNet that was not trained with image latents.
LORA_TARGET_MODULES = ["conv_in", "to_q", "to_k", "to_v", "to_out.0"]


def load_for_training(model: str | PathLike[str]) -> InstructDiffusionPipeline:
    """Load a pipeline to train, in float32, from a folder or Hub id of InstructDiffusion or Stable Diffusion.

    If the UNet has no input channels for image latents, they are added (see `expand_conv_in`). The scheduler is
    replaced by that of InstructDiffusion with the model's `prediction_type`, unless the model has `task_settings`,
    which were chosen for its own scheduler. A safety checker is not loaded. The `score_calibration` is removed,
    because it is for the weights before training.

    Raises:
        ValueError: if the number of UNet input channels is neither C nor 2 * C.
    """
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    pipeline = InstructDiffusionPipeline.from_pretrained(
        model, unet=expand_conv_in(unet), safety_checker=None, requires_safety_checker=False, dtype=torch.float32
    )
    if not pipeline.config.task_settings:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="linspace"
        )
    pipeline.register_to_config(score_calibration={})
    return pipeline


def expand_conv_in(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Add input channels for the image latents, as InstructPix2Pix does (Brooks et al., 2023, section 3.2).

    The new weights are zero, so the output is unchanged until the UNet is trained. A UNet that already has these
    channels is returned unchanged.

    Raises:
        ValueError: if the UNet has another number of input channels.
    """
    channels, latent_channels = unet.config.in_channels, unet.config.out_channels
    if channels == 2 * latent_channels:
        return unet
    if channels != latent_channels:
        raise ValueError(
            f"`unet` must have {latent_channels} input channels (noisy latents) or {2 * latent_channels} (noisy and"
            f" image latents); got {channels}."
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
    """The trained modules as one module: the UNet or its LoRA layers, and the text encoder if it is trained."""

    def __init__(self, pipeline: InstructDiffusionPipeline, config: TrainingConfig):
        super().__init__()
        # Weights are trained in float32; other modules are cast, and autocast computes in mixed precision.
        self.unet = pipeline.unet.float().train().requires_grad_(config.lora_rank is None)
        if config.lora_rank:
            lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_TARGET_MODULES)
            self.unet.add_adapter(lora)
            for parameter in self.unet.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(PRECISIONS[config.mixed_precision])
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
        """Loss of each sample, [B]. `text`: token ids if the text encoder is trained, otherwise embeddings."""
        prompt_embeds = text if self.text_encoder is None else self.text_encoder(text).last_hidden_state
        return denoising_loss(
            self.unet, scheduler, latents, image_latents, prompt_embeds, noise, timesteps, min_snr_gamma, weights
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_lora(pipeline: InstructDiffusionPipeline, folder: str | PathLike[str]) -> None:
    """Write the LoRA layers of a trained UNet in the format of `load_lora_weights`.

    The other weights of `pipeline` may have been rounded in training. To fuse the layers, load them into the original
    pipeline: `load_for_training(start)`, `load_lora_weights(folder)`, `fuse_lora()`, `unload_lora_weights()`.
    """
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
