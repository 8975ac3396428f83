"""Push a model to the Hugging Face Hub, together with its code and its model card (or a new one, if it has none).

    python examples/push_to_hub.py --model path/to/model --repo_id you/your-model

Log in first (`hf auth login`), or set HF_TOKEN. The model can then be loaded with diffusers alone:

    DiffusionPipeline.from_pretrained("you/your-model", trust_remote_code=True)
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from instructdiffusion_pipeline import InstructDiffusionPipeline, push
from instructdiffusion_pipeline.cli import UsageError, check_model_folder, reading, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the model to push")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME", help="repository; created if it is missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="license of the weights as the Hub spells it, for example cc-by-4.0")
    parser.add_argument("--half", action="store_true", help="push the weights in float16 (default: float32)")
    args = parser.parse_args()

    check_model_folder(Path(args.model))
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise UsageError(f"--repo_id: {error}") from error

    dtype = torch.float16 if args.half else torch.float32
    with reading(f"--model: no pipeline could be loaded from {args.model}"):
        pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=dtype)
    card_folder = args.model if Path(args.model, "README.md").exists() else None
    print(push(pipeline, args.repo_id, private=args.private or None, license=args.license, card_folder=card_folder))


if __name__ == "__main__":
    run_script(main)
