"""Stable Diffusion 1.5 at full size with random weights: added image latents, and two updates at 256 x 256."""

import time

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pairs import mixture
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, expand_conv_in, train
from instructdiffusion_pipeline.training.metrics import peak_memory


@pytest.mark.slow
def test_the_full_size_model_is_expanded_and_trained(tmp_path):
    """Needs 8 GB of memory and 4 GB on disk. It trains LoRA; the optimizer state of all weights has 7 GB more."""
    torch.manual_seed(0)
    levels = (320, 640, 1280, 1280)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=levels, cross_attention_dim=768, attention_head_dim=8
    ).eval()  # the other defaults in diffusers are those of Stable Diffusion 1.5
    noisy, image, text = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
    with torch.no_grad():
        narrow = unet(noisy, 500, text).sample
        wide = expand_conv_in(unet)(torch.cat([noisy, image], dim=1), 500, text).sample
    assert torch.equal(narrow, wide)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964 + 4 * 320 * 9

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )
    # CLIP's vocabulary is not available without a network. The tiny one has valid ids, but fewer of them.
    tokenizer = CLIPTokenizer.from_pretrained(tiny.TOKENIZER)
    pipe = InstructDiffusionPipeline(vae, text_encoder, tokenizer, unet, tiny.scheduler())
    samples = ImageDataset(mixture(side=256), tokenizer)
    config = TrainingConfig(
        max_train_steps=2, batch_size=1, lora_rank=16, mixed_precision="bf16", gradient_checkpointing=True
    )
    started = time.perf_counter()
    train(pipe, samples, config, tmp_path)
    print(f"two updates of one sample at 256 x 256, bf16, low-rank: {time.perf_counter() - started:.0f} s")
    print(f"peak memory {peak_memory(torch.device('cpu')) / 1e9:.1f} GB")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    # LoRA uses the input, although the weights of the first convolution for the image were zero.
    timestep, pair = torch.tensor(500), [torch.cat([noisy, latents], dim=1) for latents in (image, -image)]
    with torch.no_grad():
        first, second = (pipe.unet(latents, timestep, text).sample for latents in pair)
    assert (first - second).abs().max() > 1e-6
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 80e6, "the layers alone"
    changed = [weight for name, weight in pipe.unet.named_parameters() if "lora_B" in name]
    assert changed and all(weight.isfinite().all() and weight.any() for weight in changed)
