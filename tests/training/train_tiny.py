"""A short training run in a process of its own: train_tiny.py OUTPUT_DIR STEPS [PRECISION]."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny  # noqa: E402

from instructdiffusion_pipeline import InstructDiffusionPipeline  # noqa: E402
from instructdiffusion_pipeline.sample import Sample  # noqa: E402
from instructdiffusion_pipeline.training import TrainingConfig, encode_samples, train  # noqa: E402

if __name__ == "__main__":
    output_dir, steps, *precision = sys.argv[1:]
    pipe = InstructDiffusionPipeline(**tiny.components())
    samples = [Sample(tiny.picture(seed=i), tiny.picture(seed=50 + i), f"sample {i}") for i in range(5)]
    config = TrainingConfig(
        max_train_steps=int(steps),
        batch_size=2,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        ema_decay=0.9,
        train_text_encoder=True,
        checkpointing_steps=2,
        mixed_precision=precision[0] if precision else "no",
    )
    pipe = train(pipe, encode_samples(samples, pipe.vae, pipe.tokenizer), config, Path(output_dir))
    weights = {f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}
    weights |= {f"text_encoder.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
    torch.save(weights, Path(output_dir) / "weights.pt")
