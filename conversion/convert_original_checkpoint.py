"""Turns a checkpoint of the original InstructDiffusion into a folder that `from_pretrained` loads.

    python conversion/convert_original_checkpoint.py --checkpoint_path v1-5.ckpt --ema_state state.pth --dump_path out

Three kinds are read: the released weights; a base checkpoint with its schedule buffers; and a training state, which
holds averaged weights of the UNet only and is laid over a base (Stable Diffusion 1.5 itself will do).
"""

import argparse
import sys
from pathlib import Path

import torch
from architecture import read_original_config, scheduler_config, text_config, unet_config, vae_config
from components import build_empty, fill, original_shapes
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from original_checkpoint import OriginalCheckpoint
from original_names import PREFIXES
from transformers import CLIPTextConfig, CLIPTokenizer
from weights import Weights, check_names, check_new, written_whole

from instructdiffusion_pipeline import InstructDiffusionPipeline

SD15_TOKENIZER = "openai/clip-vit-large-patch14"
SD15_VOCABULARY = 49408
SMALLEST_VOCABULARY = 514  # every byte, alone and at the end of a word, and the two special tokens


def convert(
    checkpoint_path: str | Path,
    ema_state: str | Path | None = None,
    original_config_file: str | Path | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    half: bool = False,
) -> InstructDiffusionPipeline:
    """The pipeline a checkpoint holds. Unless `half`, its weights keep their type and stay in the file, mapped."""
    checkpoint = OriginalCheckpoint(Path(checkpoint_path), None if ema_state is None else Path(ema_state))
    original = None if original_config_file is None else read_original_config(Path(original_config_file))

    # 1. What model it is, which weights that model must have, and whether the files have just these.
    text = text_config(checkpoint.shapes, text_encoder)
    models = build_empty(unet_config(checkpoint.shapes, original), vae_config(checkpoint.shapes, original), text)
    scheduler = EulerAncestralDiscreteScheduler(**scheduler_config(original))
    expected = original_shapes(models)
    checkpoint.check(expected, scheduler.betas)
    words = load_tokenizer(tokenizer, text)

    # 2. The values, under diffusers' names.
    weights = checkpoint.read(expected, torch.float16 if half else None)
    for component, model in models.items():
        part = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIXES[component])}
        fill(model, renamed(component, part, model))
    if checkpoint.left_out:
        print(f"Left out, for a pipeline has no use for them: {', '.join(checkpoint.left_out)}")
    return InstructDiffusionPipeline(
        **models,
        tokenizer=words,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def renamed(component: str, weights: Weights, model: torch.nn.Module) -> Weights:
    """diffusers' own converters, which check nothing: what comes out is compared with what the model has."""
    if component == "unet":
        converted = convert_ldm_unet_checkpoint(weights, model.config)
    elif component == "vae":
        converted = convert_ldm_vae_checkpoint(weights, model.config)
    else:
        converted = convert_ldm_clip_checkpoint(weights)
        if not hasattr(model, "text_model"):  # transformers 5.6 took this layer away
            converted = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    check_names(
        {name: tensor.shape for name, tensor in converted.items()},
        {name: tensor.shape for name, tensor in model.state_dict().items()},
        f"{component}, as diffusers converted it",
    )
    return converted


def load_tokenizer(source: str | None, text: CLIPTextConfig) -> CLIPTokenizer:
    """Transformers hands out a nearly empty tokenizer where it finds none, so what it gives is looked at."""
    if source is None and text.vocab_size != SD15_VOCABULARY:
        raise ValueError(
            f"--tokenizer is needed: this text encoder knows {text.vocab_size} tokens, Stable Diffusion 1.5's "
            f"{SD15_VOCABULARY}. Name the folder or Hub id of its tokenizer."
        )
    source = source or SD15_TOKENIZER
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--tokenizer: no CLIP tokenizer could be read from {source} ({error}).") from error
    if len(tokenizer) < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--tokenizer: {source} gave {len(tokenizer)} tokens, which is an empty tokenizer: it is neither a folder "
            "with a vocabulary nor to be had from the Hub at the moment. Name a folder with vocab.json and merges.txt."
        )
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"--tokenizer: {source} has {len(tokenizer)} tokens, the text encoder only {text.vocab_size}."
        )
    if len(tokenizer) < text.vocab_size:
        print(
            f"--tokenizer: {source} has {len(tokenizer)} tokens, the text encoder {text.vocab_size}.", file=sys.stderr
        )
    if tokenizer.model_max_length != text.max_position_embeddings:
        raise ValueError(
            f"--tokenizer: {source} has a model_max_length of {tokenizer.model_max_length}, the text encoder "
            f"{text.max_position_embeddings} positions. Its tokenizer_config.json should say so."
        )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", required=True, help=".ckpt or .safetensors: released weights, or a base")
    parser.add_argument("--ema_state", help="training state (state.pth) whose UNet replaces that of the base")
    parser.add_argument("--original_config_file", help="YAML it was trained with; not needed at SD 1.5's sizes")
    parser.add_argument("--text_encoder", help="folder or Hub id of its configuration; not needed at SD 1.5's sizes")
    parser.add_argument("--tokenizer", help=f"folder or Hub id (default: {SD15_TOKENIZER})")
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("--dump_path", required=True, help="folder to write")
    args = vars(parser.parse_args())
    target = Path(args.pop("dump_path")).resolve()
    try:
        check_new(target, "--dump_path")
        pipeline = convert(**args)
        with written_whole(target) as folder:
            pipeline.save_pretrained(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
