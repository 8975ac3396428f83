"""One model for all families against one for each, at equal samples, as in the paper's ablation.

    python examples/tiny/ablation.py --work_dir out/tiny --output_dir out/ablation

Each starts from nothing but the autoencoder, and sees as many samples as the others, out of those that the recipe has
cached in the work folder: the one for all some of every family, the others theirs alone, more often. What each makes
goes to a folder of its own, to be scored with examples/evaluate.py; a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
from collections.abc import Set
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from model import build_pipeline
from torch.utils.data import Dataset
from train import CONFIG

from instructdiffusion_pipeline import export
from instructdiffusion_pipeline.training import CachedSamples, train
from instructdiffusion_pipeline.training.encoding import Batch

SOURCES = {
    "segmentation": {"segmentation"},
    "keypoints": {"pose", "keypoints", "few keypoints"},
    "restoration": {"noise", "blur", "watermark"},
    "editing": {"objects", "grades"},
}


class Only(Dataset):
    """The samples of `sources` in a cache, in a new order each epoch."""

    def __init__(self, samples: CachedSamples, sources: Set[str]):
        self.samples, self.sources = samples, samples.sources
        wanted = {samples.sources.index(name) for name in sources}
        self.places = [place for place in range(len(samples)) if int(samples[place]["source"]) in wanted]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> Batch:
        epoch, offset = divmod(position, len(self))
        order = np.random.default_rng((0, epoch)).permutation(len(self))
        return self.samples[self.places[order[offset]]] | {"position": torch.tensor(position)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="of examples/tiny/train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="for a folder of each model")
    parser.add_argument("--steps", type=int, default=2_000, help="updates of each model")
    args = parser.parse_args()
    config = dataclasses.replace(CONFIG, max_train_steps=args.steps)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae")
    samples = CachedSamples(args.work_dir / "samples")
    for name, sources in {"all": set().union(*SOURCES.values()), **SOURCES}.items():
        if (args.output_dir / name).exists():
            continue
        torch.manual_seed(0)
        pipeline = build_pipeline(vae, args.work_dir / "world" / "bpe_simple_vocab_16e6.txt.gz")
        pipeline.unet.set_attn_processor(AttnProcessor())
        pipeline.text_encoder.set_attn_implementation("eager")
        folder = args.output_dir / f"{name}-checkpoints"
        pipeline = train(pipeline, Only(samples, sources), config, folder, resume="latest")
        export(pipeline.to(dtype=torch.float16), args.output_dir / name)


if __name__ == "__main__":
    main()
