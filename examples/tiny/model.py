"""Build `instructdiffusion-tiny`: an InstructDiffusion pipeline with small components."""

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from string import Template

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from fetch import MERGES_FILE
from recipes import Recipe
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from instructdiffusion_pipeline import InstructDiffusionPipeline, export
from instructdiffusion_pipeline.files import atomic_write

MERGES = 8_000  # number of merges, of CLIP's 48,894; with fewer merges, rare words are split into more tokens
# Call arguments by task family; they are saved in the pipeline's configuration.
SETTINGS: dict[str, dict[str, float]] = {
    "segmentation": {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "image_guidance_scale": 0.5,
        "ensemble_size": 2,
    },
    "keypoints": {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "image_guidance_scale": 0.5,
        "ensemble_size": 2,
    },
    "restoration": {
        "num_inference_steps": 3,
        "guidance_scale": 0.5,
        "image_guidance_scale": 0.5,
        "ensemble_size": 2,
    },
    "editing": {"num_inference_steps": 2, "guidance_scale": 0.5, "image_guidance_scale": 0.5},
}


def task_settings(recipe: Recipe) -> dict[str, dict[str, float]]:
    """`SETTINGS` with the resolution of keypoints, if it differs from that of the UNet."""
    if recipe.keypoint_side == recipe.side:
        return SETTINGS
    return SETTINGS | {"keypoints": SETTINGS["keypoints"] | {"resolution": recipe.keypoint_side}}


def build_pipeline(recipe: Recipe, vae: AutoencoderKL, world: Path) -> InstructDiffusionPipeline:
    """Build a pipeline from a trained `vae` and the merges in `world`, with a new text encoder and a new UNet."""
    tokenizer = build_tokenizer(world / MERGES_FILE)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=recipe.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=recipe.side // 4,
        in_channels=2 * vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        layers_per_block=1,
        block_out_channels=recipe.unet_widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
    )
    # At high noise levels, the image contributes only 1/15 of epsilon. A small network cannot predict epsilon that
    # precisely, so it predicts velocity.
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="linspace",
    )
    return InstructDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, task_settings=task_settings(recipe)
    )


def export_model(recipe: Recipe, pipeline: InstructDiffusionPipeline, folder: Path, world: Path) -> None:
    """Write a pipeline in half precision, its model card and the credits in `world` to a new folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as partial:
        export(pipeline.to(dtype=torch.float16), partial)
        card = Template((Path(__file__).parent / "MODEL_CARD.md").read_text(encoding="utf-8"))
        held_out = recipe.held_out
        values = {
            "side": recipe.side,
            "keypoint_side": recipe.keypoint_side,
            "names": ", ".join(name for name in recipe.names if name not in held_out),
            "held_out": f"{len(held_out)} of the {len(recipe.names)} object names ({', '.join(held_out)})",
        }
        (partial / "README.md").write_text(card.substitute(values), encoding="utf-8")
        shutil.copy(world / "CREDITS.md", partial)


def use_plain_attention(pipeline: InstructDiffusionPipeline) -> None:
    """Use attention without the fused kernel: in bfloat16 on a CPU, training this UNet is a quarter faster."""
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")


def build_tokenizer(merges_path: Path) -> CLIPTokenizer:
    """Build CLIP's tokenizer with only its `MERGES` most frequent merges."""
    merges = gzip.decompress(merges_path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
