"""The small model's parts: an ordinary InstructDiffusion pipeline with narrow components."""

import gzip
import json
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from world import SIZE

from instructdiffusion_pipeline import InstructDiffusionPipeline

MERGES = 8_000  # of CLIP's 48,894; rarer words fall into more pieces
TEXT_WIDTH = 128


def build_pipeline(vae: AutoencoderKL, merges_path: Path) -> InstructDiffusionPipeline:
    """A pipeline with a trained `vae`, and a text encoder and a UNet (10.9 M parameters) fresh from initialisation."""
    tokenizer = build_tokenizer(merges_path)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=2 * vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )
    # Velocity, not epsilon: near pure noise, where it is decided what to draw where, epsilon tells the answer as a
    # fifteenth part of itself, which must come out exact; a small network gets no further than the noise.
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="linspace",
    )
    return InstructDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def use_plain_attention(pipeline: InstructDiffusionPipeline) -> None:
    """It trains this UNet a quarter faster than the fused kernel does on a CPU in bfloat16."""
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")


def build_tokenizer(merges_path: Path) -> CLIPTokenizer:
    """CLIP's tokenizer cut down to its first and commonest `MERGES` merges."""
    merges = gzip.decompress(merges_path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
