"""Every number of a training run, and the three stages of the paper as recipes."""

from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, help: str) -> Any:
    """A field with its default and the words that `--help` of examples/train.py shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's settings where it names one (Geng et al., CVPR 2024, section 4.1).

    An update sees `batch_size` samples times `gradient_accumulation_steps` times the number of processes.

    Raises a ValueError for settings that are out of range or exclude each other.
    """

    max_train_steps: int = field(metadata={"help": "updates of the weights, in all"})
    batch_size: int = setting(64, "samples of a process at a time")
    gradient_accumulation_steps: int = setting(1, "batches whose gradients one update sums up")
    learning_rate: float = setting(1e-4, "after the warm-up")
    lr_scheduler: str = setting("constant", "of diffusers: constant, constant_with_warmup, cosine, linear ...")
    lr_warmup_steps: int = setting(0, "updates until the learning rate is reached; not with constant")
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw8bit needs bitsandbytes and CUDA")
    weight_decay: float = setting(0.01, "of AdamW")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    ema_decay: float = setting(0.9999, "of the average of the weights, which is what is kept; 0: the last weights are")
    min_snr_gamma: float | None = setting(None, "caps the weight of nearly clean timesteps (Hang et al., 2023, eq. 5)")
    timestep_bias: float = setting(1.0, "above 1: half of the timesteps lean to pure noise, as t^(bias - 1)")
    change_weight: float | None = setting(None, "how much more the parts count that an answer changes; none: no more")
    lora_rank: int | None = setting(None, "train low-rank additions to the UNet's attention; none: all its weights")
    train_text_encoder: bool = setting(False, "for small models that start from nothing; the paper freezes CLIP")
    text_to_image: bool = setting(False, "the input picture is never shown, as in the adaptation stage")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "fp16 needs an accelerator")
    num_workers: int = setting(0, "processes of each process that read and draw; they do not change the result")
    checkpointing_steps: int = setting(500, "updates from one checkpoint to the next")
    checkpoints_total_limit: int = setting(1, "newest checkpoints that are kept")
    validation_steps: int = setting(500, "updates from one sheet of validation pictures to the next")
    logging_steps: int = setting(10, "updates from one line in the trackers to the next")
    report_to: str | None = setting(None, "a tracker of accelerate: tensorboard, trackio, wandb ...")
    seed: int = setting(0, "fixes first weights of LoRA, order, noise and dropout")

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
            raise ValueError('`lr_warmup_steps` has no meaning with "constant"; use "constant_with_warmup".')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be from 0 to below 1; got {self.ema_decay}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be 1 or more, or None; got {self.lora_rank}.")
        if self.text_to_image and self.change_weight is not None:
            raise ValueError("`change_weight` must be None with `text_to_image`, which shows no input to change.")
        if self.lora_rank and self.train_text_encoder:
            raise ValueError("`lora_rank` is for the UNet alone: `train_text_encoder` must be False with it.")
        for name, known in (("optimizer", ("adamw", "adamw8bit")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {getattr(self, name)!r}.")


# What each stage changes of the defaults (sections 3.3, 3.4 and 4.1).
RECIPES: dict[str, dict[str, Any]] = {
    "adaptation": {"text_to_image": True},
    "multitask": {},
    "alignment": {"ema_decay": 0.99},
}
