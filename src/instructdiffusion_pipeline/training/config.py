"""The settings of a training run, and the three stages of the paper as recipes."""

import math
import operator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from diffusers.optimization import SchedulerType

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Without piecewise_constant, because there is no setting for its steps.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
LEARNING_RATE = 1e-4
LORA_LEARNING_RATE = 1e-3  # at 1e-4, LoRA layers, which start at zero, change too slowly


def setting(default: Any, help: str) -> Any:
    """Dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`. If the paper states a value, it is the default (Geng et al., section 4.1); `batch_size` is
    smaller.

    One update uses `batch_size * gradient_accumulation_steps * num_processes` samples.

    Raises:
        ValueError: if a setting is out of range, or two settings are incompatible.
    """

    max_train_steps: int = setting(None, "total number of updates")
    num_train_epochs: float | None = setting(None, "length of the run in epochs, instead of max_train_steps")
    batch_size: int = setting(64, "batch size per device")
    gradient_accumulation_steps: int = setting(1, "batches per update")
    learning_rate: float = setting(
        None, f"learning rate after the warm-up; if not given: {LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}"
    )
    lr_scheduler: str = setting("constant", f"learning rate scheduler of diffusers: {', '.join(LR_SCHEDULERS)}")
    lr_warmup_steps: int = setting(0, "updates of the warm-up; 0 with constant")
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw8bit needs bitsandbytes and CUDA")
    weight_decay: float = setting(0.01, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "maximum gradient norm")
    ema_decay: float = setting(0.9999, "decay of the EMA weights, which are saved; 0 disables EMA")
    conditioning_dropout_prob: float = setting(0.075, "probability of dropping the text, and of dropping the image")
    min_snr_gamma: float | None = setting(
        None, "gamma of Min-SNR loss weighting (Hang et al., 2023); if not given: off"
    )
    timestep_bias: float = setting(1.0, "values above 1 draw half of the timesteps with density t^(bias - 1)")
    change_weight: float | None = setting(
        None, "loss weight where target and input latents differ, for small models; if not given: off"
    )
    lora_rank: int | None = setting(None, "train LoRA layers of this rank in the UNet instead of all weights")
    train_text_encoder: bool = setting(False, "also train the text encoder; the paper does not")
    text_to_image: bool = setting(False, "train without input images, as in the adaptation stage")
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory; takes more time")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "no, bf16 or fp16; fp16 needs a GPU")
    allow_tf32: bool = setting(False, "multiply matrices in TF32 on Ampere GPUs and later")
    torch_compile: bool = setting(False, "compile the training step; the first update takes minutes")
    num_workers: int | None = setting(
        None,
        "data loader workers per process, which do not change the result; if not given: one less than the cores of"
        " the process, at most 8; 0 without CUDA and for cached samples",
    )
    checkpointing_steps: int = setting(500, "save a checkpoint every N updates")
    checkpoints_total_limit: int = setting(3, "number of newest checkpoints to keep")
    validation_steps: int = setting(500, "validate every N updates")
    logging_steps: int = setting(10, "log every N updates")
    report_to: str | None = setting(None, "tracker of accelerate, such as tensorboard, trackio or wandb")
    seed: int = setting(0, "seed for LoRA initialization, order of samples, noise and dropout")

    def __post_init__(self) -> None:
        self._convert_numbers()
        if (self.max_train_steps is None) == (self.num_train_epochs is None):
            raise ValueError("Either `max_train_steps` or `num_train_epochs` must be given.")
        if self.learning_rate is None:
            rate = LORA_LEARNING_RATE if self.lora_rank else LEARNING_RATE
            object.__setattr__(self, "learning_rate", rate)  # because the dataclass is frozen
        counts = (
            "max_train_steps batch_size gradient_accumulation_steps checkpointing_steps checkpoints_total_limit"
            " validation_steps logging_steps"
        )
        for name in counts.split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        for name in ("lr_warmup_steps", "weight_decay", "num_workers"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0; got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be from 0 to {2**32 - 1}; got {self.seed}.")
        for name in (
            "num_train_epochs",
            "learning_rate",
            "max_grad_norm",
            "min_snr_gamma",
            "timestep_bias",
            "change_weight",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0; got {value}.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError('`lr_warmup_steps` must be 0 with lr_scheduler "constant"; use "constant_with_warmup".')
        if not 0 <= self.conditioning_dropout_prob <= 0.5:
            raise ValueError(
                f"`conditioning_dropout_prob` must be from 0 to 0.5; got {self.conditioning_dropout_prob}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1; got {self.ema_decay}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, or None; got {self.lora_rank}.")
        if self.text_to_image and self.change_weight is not None:
            raise ValueError("`change_weight` must be None with `text_to_image`, which uses no input image.")
        if self.lora_rank and self.train_text_encoder:
            raise ValueError("`train_text_encoder` must be False with `lora_rank`, which trains the UNet only.")
        for name, known in (
            ("optimizer", ("adamw", "adamw8bit")),
            ("mixed_precision", tuple(PRECISIONS)),
            ("lr_scheduler", tuple(LR_SCHEDULERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {getattr(self, name)!r}.")

    def _convert_numbers(self) -> None:
        """Convert numbers of NumPy and PyTorch and texts such as "1e-4", which checkpoints could not store."""
        for entry in fields(self):
            value, kinds = getattr(self, entry.name), get_args(entry.type) or (entry.type,)
            if value is None and entry.default is None:
                continue
            for kind, convert, noun in ((int, operator.index, "an integer"), (float, float, "a number")):
                if kind in kinds:
                    try:
                        object.__setattr__(self, entry.name, convert(value))  # because the dataclass is frozen
                    except (TypeError, ValueError) as error:
                        raise ValueError(f"`{entry.name}` must be {noun}; got {value!r}.") from error

    def for_samples(self, epoch: int, processes: int) -> "TrainingConfig":
        """The same settings with `max_train_steps` instead of `num_train_epochs`, for `epoch` samples per epoch."""
        if self.num_train_epochs is None:
            return self
        per_update = self.batch_size * self.gradient_accumulation_steps * processes
        steps = math.ceil(self.num_train_epochs * epoch / per_update)
        return replace(self, max_train_steps=steps, num_train_epochs=None)


# Each stage's settings that differ from the defaults (sections 3.3, 3.4 and 4.1).
RECIPES: dict[str, dict[str, Any]] = {
    "adaptation": {"text_to_image": True},
    "multitask": {},
    "alignment": {"ema_decay": 0.99},
}
