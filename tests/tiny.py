"""Components with random weights and inputs for them, for tests that need a pipeline but not a trained one."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
HIDDEN = (".",)
TOKENIZER = ROOT / "tests" / "fixtures" / "golden" / "model" / "tokenizer"


def scheduler() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )


def components(seed: int = 0) -> dict[str, Any]:
    """A UNet of two levels, a VAE of factor 2 and a text encoder of two layers."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=998,
            eos_token_id=999,
        )
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER),
        "unet": unet.eval(),
        "scheduler": scheduler(),
    }


def safety_checker(threshold: float) -> dict[str, Any]:
    """A safety checker that flags every image if `threshold` is -1 and none if it is 1, with its extractor.

    Both are arguments of the pipeline.
    """
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(projection_dim=8, vision_config=vision | {"image_size": 32, "patch_size": 16})
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.constant_(checker.concept_embeds_weights, threshold)
    torch.nn.init.constant_(checker.special_care_embeds_weights, 1.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return {"safety_checker": checker, "feature_extractor": extractor}


def picture(width: int = 32, height: int = 32, seed: int = 0) -> PIL.Image.Image:
    """Noise, so that all regions differ."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def contents(folder: Path, left_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """All files by their relative path, except those with a part of the path that starts with a prefix in `left_out`.

    A process that is killed may leave hidden folders of `atomic_write`: `left_out=HIDDEN` leaves them out.
    """
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(left_out) for part in name.parts)
    }


def earlier_names(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights with the names of earlier versions: of diffusers' attention, and with transformers' prefix."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, weight in weights.items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[prefix + name] = weight
    assert renamed.keys() != weights.keys()
    return renamed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def inputs(**changes: Any) -> dict[str, Any]:
    """The arguments of a call of two steps with array output, with `changes` by the test."""
    call = {
        "prompt": "tint the cat blue",
        "image": picture(),
        "resolution": 0,  # the image's own 32 x 32 pixels
        "num_inference_steps": 2,
        "generator": generator(),
        "output_type": "np",
    }
    return call | changes
