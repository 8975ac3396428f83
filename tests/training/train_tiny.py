"""A short training run in a separate process: train_tiny.py OUTPUT_DIR SETTINGS [CACHE], with settings in JSON.

If SHARD_SIZE is set in the environment, it is the number of samples in a file of the cache, and each process writes
the names of the files that it encodes to OUTPUT_DIR.process-RANK.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import tiny  # noqa: E402
from accelerate import PartialState  # noqa: E402
from pairs import mixture  # noqa: E402

from instructdiffusion_pipeline import InstructDiffusionPipeline  # noqa: E402
from instructdiffusion_pipeline.training import ImageDataset, TrainingConfig, cache_samples, train  # noqa: E402
from instructdiffusion_pipeline.training import cache as cache_module  # noqa: E402

if __name__ == "__main__":
    output_dir, settings, *cache = sys.argv[1:]
    pipe = InstructDiffusionPipeline(**tiny.components())
    samples = ImageDataset(mixture(), pipe.tokenizer)
    if size := os.environ.get("SHARD_SIZE"):
        encode_shard, cache_module.SHARD_SIZE = cache_module.encode_shard, int(size)

        def encode_and_log(loader, encoders, path):
            with open(f"{output_dir}.process-{os.environ['RANK']}", "a") as log:
                log.write(f"{path.name}\n")
            encode_shard(loader, encoders, path)

        cache_module.encode_shard = encode_and_log
    if cache:
        samples = cache_samples(samples, 7, pipe, cache[0])
    pipe = train(pipe, samples, TrainingConfig(**json.loads(settings)), output_dir, resume="latest")
    if PartialState().is_main_process:
        weights = {f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}
        weights |= {f"text_encoder.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
        torch.save(weights, Path(output_dir) / "weights.pt")
