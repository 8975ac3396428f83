"""Convert a checkpoint of the original code to a folder that `from_pretrained` loads.

    python conversion/convert_original_checkpoint.py --checkpoint_path base.ckpt --ema_state state.pth --dump_path out

It reads released weights, base checkpoints with schedule buffers, and training states. A training state has only the
EMA weights of the UNet; the other weights are those of its base checkpoint, which can be Stable Diffusion 1.5.
"""

import argparse
import sys
from pathlib import Path

import torch
from architecture import read_original_config, scheduler_config, text_config, unet_config, vae_config
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from original_checkpoint import OriginalCheckpoint
from original_names import PREFIXES, build_empty, original_shapes
from transformers import CLIPTextConfig, CLIPTokenizer
from weights import Weights, check_names, check_new

from instructdiffusion_pipeline import InstructDiffusionPipeline
from instructdiffusion_pipeline.cli import UsageError, reading, run_script
from instructdiffusion_pipeline.files import atomic_write

SD15_TOKENIZER = "openai/clip-vit-large-patch14"
SD15_VOCABULARY = 49408
MIN_VOCABULARY = 514  # size of the smallest CLIP vocabulary: 256 bytes, 256 bytes with </w>, 2 special tokens


def convert(
    checkpoint_path: str | Path,
    ema_state: str | Path | None = None,
    original_config_file: str | Path | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    half: bool = False,
) -> InstructDiffusionPipeline:
    """Convert a checkpoint to a pipeline. Without `half`, weights keep their type and stay memory-mapped."""
    checkpoint = OriginalCheckpoint(Path(checkpoint_path), None if ema_state is None else Path(ema_state))
    original = None if original_config_file is None else read_original_config(Path(original_config_file))

    # 1. Infer the configurations, and check that the files have exactly the weights of such a model.
    text = text_config(checkpoint.shapes, text_encoder)
    with reading(f"--original_config_file: {original_config_file} does not describe a model of the original code"):
        unet, vae = unet_config(checkpoint.shapes, original), vae_config(checkpoint.shapes, original)
    with reading(f"--text_encoder: {text_encoder} does not describe a text encoder of CLIP"):
        models = build_empty(unet, vae, text)
    scheduler = EulerAncestralDiscreteScheduler(**scheduler_config(original))
    expected = original_shapes(models)
    checkpoint.check(expected, scheduler.betas)
    clip_tokenizer = load_tokenizer(tokenizer, text)

    # 2. Read the weights and rename them.
    weights = checkpoint.read(expected, torch.float16 if half else None)
    for component, model in models.items():
        original_weights = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIXES[component])}
        load_weights(model, rename(component, original_weights, model))
    if checkpoint.unused:
        print(f"Entries that the pipeline does not use: {', '.join(checkpoint.unused)}")
    return InstructDiffusionPipeline(
        **models,
        tokenizer=clip_tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def rename(component: str, weights: Weights, model: torch.nn.Module) -> Weights:
    """Rename weights with diffusers' converters, and check the result, which the converters do not check."""
    if component == "unet":
        converted = convert_ldm_unet_checkpoint(weights, model.config)
    elif component == "vae":
        converted = convert_ldm_vae_checkpoint(weights, model.config)
    else:
        # transformers 5.6 removed the layer `text_model`, which is still in the names from diffusers' converter.
        converted = {
            name.removeprefix("text_model."): tensor for name, tensor in convert_ldm_clip_checkpoint(weights).items()
        }
    check_names(
        {name: tensor.shape for name, tensor in converted.items()},
        {name: tensor.shape for name, tensor in model.state_dict().items()},
        f"{component}, converted by diffusers",
    )
    return converted


def load_weights(model: torch.nn.Module, weights: Weights) -> None:
    """Assign weights to a model on the meta device without copying them."""
    model.load_state_dict(weights, assign=True)
    for name, buffer in dict(model.named_buffers()).items():
        # CLIP's position_ids, the only buffer. It is not in released checkpoints.
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[1])[None], persistent=False)
    model.eval()


def load_tokenizer(source: str | None, text: CLIPTextConfig) -> CLIPTokenizer:
    """Load a tokenizer and check that it fits the text encoder.

    If transformers finds no tokenizer, it may return a nearly empty one instead of failing.
    """
    if source is None and text.vocab_size != SD15_VOCABULARY:
        raise UsageError(
            f"--tokenizer is needed: this text encoder has {text.vocab_size} tokens, Stable Diffusion 1.5's has "
            f"{SD15_VOCABULARY}. Give the folder or Hub id of the tokenizer."
        )
    source = source or SD15_TOKENIZER
    with reading(f"--tokenizer: no CLIP tokenizer could be read from {source}"):
        tokenizer = CLIPTokenizer.from_pretrained(source)
    if len(tokenizer) < MIN_VOCABULARY:
        raise UsageError(
            f"--tokenizer: must be a folder with vocab.json and merges.txt, or a Hub id, but {source} is no such "
            f"folder and could not be loaded from the Hub (transformers returned {len(tokenizer)} tokens)."
        )
    if len(tokenizer) > text.vocab_size:
        raise UsageError(
            f"--tokenizer: {source} has {len(tokenizer)} tokens, but the text encoder has only {text.vocab_size}."
        )
    if len(tokenizer) < text.vocab_size:
        print(
            f"warning: --tokenizer: {source} has {len(tokenizer)} tokens, but the text encoder has {text.vocab_size}.",
            file=sys.stderr,
        )
    if tokenizer.model_max_length != text.max_position_embeddings:
        raise UsageError(
            f"--tokenizer: model_max_length in tokenizer_config.json must be {text.max_position_embeddings}, the "
            f"number of positions of the text encoder, but {source} has {tokenizer.model_max_length}."
        )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint_path", required=True, help=".ckpt or .safetensors: released weights or base checkpoint"
    )
    parser.add_argument(
        "--ema_state", help="training state (state.pth) whose EMA weights replace the UNet of --checkpoint_path"
    )
    parser.add_argument(
        "--original_config_file",
        help="YAML file that the model was trained with; not needed for the sizes of Stable Diffusion 1.5",
    )
    parser.add_argument(
        "--text_encoder",
        help="folder or Hub id with the configuration (config.json) of the CLIP text encoder; not needed for the sizes"
        " of Stable Diffusion 1.5",
    )
    parser.add_argument("--tokenizer", help=f"folder or Hub id of the tokenizer (default: {SD15_TOKENIZER})")
    parser.add_argument("--half", action="store_true", help="save in float16")
    parser.add_argument("--dump_path", required=True, help="output folder; it must not exist yet")
    args = vars(parser.parse_args())
    target = Path(args.pop("dump_path")).resolve()
    check_new(target, "--dump_path")
    pipeline = convert(**args)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as folder:
        pipeline.save_pretrained(folder)
    print(f"Saved {target}")


if __name__ == "__main__":
    run_script(main)
