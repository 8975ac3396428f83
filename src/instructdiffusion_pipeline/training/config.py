"""Every number of a training run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's settings where it names one (Geng et al., CVPR 2024, section 4.1), per process.

    `batch_size` counts samples per process and step. `min_snr_gamma` clips the weight of nearly clean timesteps (Hang
    et al., 2023, equation 5); None is the paper's plain loss. `train_text_encoder` is for small models that start from
    nothing; the paper freezes CLIP. `mixed_precision` is "no", "bf16" or "fp16" (fp16 needs an accelerator).
    """

    max_train_steps: int
    batch_size: int = 64
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    min_snr_gamma: float | None = None
    train_text_encoder: bool = False
    mixed_precision: str = "no"
    checkpointing_steps: int = 500
    seed: int = 0
