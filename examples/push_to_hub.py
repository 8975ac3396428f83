"""Push a model to the Hugging Face Hub together with its code and a model card.

Log in first (`hf auth login`) or set HF_TOKEN. Afterwards anyone who has diffusers can load the model:

    DiffusionPipeline.from_pretrained("you/your-model", trust_remote_code=True)
"""

import argparse

import torch

from instructdiffusion_pipeline import InstructDiffusionPipeline, push

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, metavar="DIR", help="folder of the pipeline to push")
parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME", help="repository; created if it is missing")
parser.add_argument("--private", action="store_true", help="only you see the repository, if it is created now")
parser.add_argument("--license", help="licence of the weights as the Hub spells it, such as cc-by-4.0")
parser.add_argument("--half", action="store_true", help="push the weights in 16 bits instead of 32")
args = parser.parse_args()

# FixedTask named, because files in half precision would otherwise be widened, and only some of them.
dtype = torch.float16 if args.half else torch.float32
pipeline = InstructDiffusionPipeline.from_pretrained(args.model, dtype=dtype)
print(push(pipeline, args.repo_id, private=args.private or None, license=args.license))
