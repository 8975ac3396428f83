"""The settings of a training run, and the three stages of the paper as recipes."""

from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and its `--help` in examples/train.py."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`. The defaults are the paper's where it states one (Geng et al., CVPR 2024, section 4.1).

    One update uses `batch_size` x `gradient_accumulation_steps` x number of processes samples.

    Raises:
        ValueError: a setting is out of range, or two settings exclude each other.
    """

    max_train_steps: int = field(metadata={"help": "total number of updates"})
    batch_size: int = setting(64, "samples per process and forward pass")
    gradient_accumulation_steps: int = setting(1, "batches per update")
    learning_rate: float = setting(1e-4, "learning rate after the warm-up")
    lr_scheduler: str = setting("constant", "of diffusers: constant, constant_with_warmup, cosine, linear ...")
    lr_warmup_steps: int = setting(0, "updates of the warm-up; 0 with constant")
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw8bit needs bitsandbytes and CUDA")
    weight_decay: float = setting(0.01, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "norm to which gradients are clipped")
    ema_decay: float = setting(0.9999, "decay of the EMA weights, which are saved; 0 disables EMA")
    min_snr_gamma: float | None = setting(None, "gamma of Min-SNR loss weighting (Hang et al., 2023)")
    timestep_bias: float = setting(1.0, "above 1: half of the timesteps are drawn with a density of t^(bias - 1)")
    change_weight: float | None = setting(None, "loss weight of the latents in which target and input differ")
    lora_rank: int | None = setting(None, "train LoRA layers of this rank in the UNet's attention, not all weights")
    train_text_encoder: bool = setting(False, "also train the text encoder; the paper does not")
    text_to_image: bool = setting(False, "train without input pictures, as in the adaptation stage")
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory; takes more time")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "no, bf16 or fp16; fp16 needs an accelerator")
    num_workers: int = setting(0, "data loader workers per process; the result does not depend on them")
    checkpointing_steps: int = setting(500, "updates between two checkpoints")
    checkpoints_total_limit: int = setting(1, "number of checkpoints to keep")
    validation_steps: int = setting(500, "updates between two grids of validation pictures")
    logging_steps: int = setting(10, "updates between two log entries")
    report_to: str | None = setting(None, "tracker of accelerate: tensorboard, trackio, wandb ...")
    seed: int = setting(0, "seed of LoRA initialization, order of samples, noise and dropout")

    def __post_init__(self) -> None:
        counts = (
            "max_train_steps batch_size gradient_accumulation_steps checkpointing_steps checkpoints_total_limit"
            " validation_steps logging_steps"
        )
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more; got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "min_snr_gamma", "timestep_bias", "change_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0; got {value}.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError('`lr_warmup_steps` must be 0 with lr_scheduler "constant"; use "constant_with_warmup".')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1; got {self.ema_decay}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be 1 or more, or None; got {self.lora_rank}.")
        if self.text_to_image and self.change_weight is not None:
            raise ValueError("`change_weight` must be None with `text_to_image`, which uses no input picture.")
        if self.lora_rank and self.train_text_encoder:
            raise ValueError("`train_text_encoder` must be False with `lora_rank`, which trains the UNet only.")
        for name, known in (("optimizer", ("adamw", "adamw8bit")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {getattr(self, name)!r}.")


# Each stage's settings that differ from the defaults (sections 3.3, 3.4 and 4.1).
RECIPES: dict[str, dict[str, Any]] = {
    "adaptation": {"text_to_image": True},
    "multitask": {},
    "alignment": {"ema_decay": 0.99},
}
