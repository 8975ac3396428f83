"""One model for all families against one for each, at equal samples, as in the paper's ablation.

    python examples/tiny/ablation.py --work_dir out/tiny --output_dir out/ablation

Each starts from nothing but the autoencoder, and sees as many samples as the others, out of those that the recipe has
cached in the work folder: the one for all some of every family, the others theirs alone, more often. What each makes
goes to a folder of its own, to be scored with examples/evaluate.py; a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from model import build_pipeline, use_plain_attention
from train import CONFIG

from instructdiffusion_pipeline import export
from instructdiffusion_pipeline.training import CachedSamples, train

SOURCES = {
    "segmentation": {"segmentation", "left or right", "absent"},
    "keypoints": {"pose", "keypoints", "few keypoints"},
    "restoration": {"noise", "blur", "watermark"},
    "editing": {"objects", "grades"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="of examples/tiny/train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="for a folder of each model")
    parser.add_argument("--steps", type=int, default=2_000, help="updates of each model")
    args = parser.parse_args()
    config = dataclasses.replace(CONFIG, max_train_steps=args.steps)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae")
    for name, sources in {"all": None, **SOURCES}.items():
        if (args.output_dir / name).exists():
            continue
        torch.manual_seed(0)
        pipeline = build_pipeline(vae, args.work_dir / "world" / "bpe_simple_vocab_16e6.txt.gz")
        use_plain_attention(pipeline)
        folder = args.output_dir / f"{name}-checkpoints"
        samples = CachedSamples(args.work_dir / "samples", only=sources)
        pipeline = train(pipeline, samples, config, folder, resume="latest")
        export(pipeline.to(dtype=torch.float16), args.output_dir / name)


if __name__ == "__main__":
    main()
