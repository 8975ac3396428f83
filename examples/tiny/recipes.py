"""Recipes for small models: that of `instructdiffusion-tiny`, for CPU cores, and that of a larger one, for a GPU."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch import NAMES
from sources import TRAINING_SOURCES, keypoints
from world import World, is_held_out

from instructdiffusion_pipeline.training import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """The settings in which the models differ.

    Attributes:
        side: of the images, in pixels.
        keypoint_side: of the images of keypoints.
        names: names of the objects, including the held-out ones.
        styles: drawing styles in training.
        unet_widths: channels of the UNet's blocks.
        text_width: of the text encoder.
        config: settings for training from random weights.
        tuning: settings for training from the weights of an earlier model.
        vae: folder of the VAE; None: the VAE is also trained.
    """

    side: int
    keypoint_side: int
    names: tuple[str, ...]
    styles: tuple[str, ...]
    unet_widths: tuple[int, int, int]
    text_width: int
    config: TrainingConfig
    tuning: TrainingConfig
    vae: Path | None = None

    @property
    def held_out(self) -> list[str]:
        """The names that are not used in training."""
        return sorted(filter(is_held_out, self.names))

    def frame_of(self, name: str) -> tuple[int, int]:
        """The size of the images of one of `TRAINING_SOURCES`."""
        _, example, _ = TRAINING_SOURCES[name]
        side = self.keypoint_side if example is keypoints else self.side
        return side, side

    def world(self, folder: Path, **options: Any) -> World:
        """Return the world of this recipe. `options` are other arguments of `World`."""
        defaults = {"frame": (self.side, self.side), "names": self.names, "styles": self.styles}
        return World(folder, **defaults | options)


CPU = TrainingConfig(
    max_train_steps=12_000,
    batch_size=64,
    learning_rate=5e-4,  # with 1e-3, the loss decreases more slowly; with 2e-3, it diverges
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    ema_decay=0.999,
    # At high noise levels, the output depends only on image and instruction; at lower levels, it is visible in the
    # noisy latents. With this bias, a third of the timesteps is above 900. The change weight is for small targets: at
    # 64 pixels, a disc covers four of 256 latents.
    timestep_bias=8,
    change_weight=10,
    train_text_encoder=True,
    mixed_precision="bf16",
    checkpointing_steps=250,
)
# With a constant learning rate, a finished run can be continued with more steps. The EMA, which averages the last
# thousand steps, replaces a decay.
GPU = dataclasses.replace(
    CPU,
    batch_size=256,
    learning_rate=8e-4,
    lr_scheduler="constant_with_warmup",
    checkpointing_steps=1_200,  # two and a half minutes at eight updates per second
)
RECIPES = {
    "cpu": Recipe(
        side=96,
        keypoint_side=64,
        # A few objects that look different, because the model is small.
        names=(
            *("airplane", "apple", "banana", "bell", "butterfly", "car", "carrot", "cat", "dog", "donut", "elephant"),
            *("football", "frog", "guitar", "ladybug", "lemon", "mushroom", "owl", "panda", "penguin", "pig", "pizza"),
            *("rocket", "rose", "snail", "strawberry", "sunflower", "tree", "turtle", "umbrella", "violin"),
        ),
        styles=("fluent", "noto"),
        unet_widths=(64, 128, 192),  # 10.9 M parameters
        text_width=128,
        config=CPU,
        # With a change weight w, the model paints an object if the probability that it is there is above 1 / (1 + w).
        tuning=dataclasses.replace(
            CPU, max_train_steps=900, learning_rate=3e-4, lr_warmup_steps=30, ema_decay=0.997, change_weight=1
        ),
    ),
    "gpu": Recipe(
        side=128,
        keypoint_side=128,
        names=tuple(NAMES),
        styles=("fluent", "flat", "noto"),
        unet_widths=(96, 160, 256),  # 19 M parameters
        text_width=192,
        config=GPU,
        tuning=dataclasses.replace(GPU, ema_decay=0.9995, change_weight=1),
        # PSNR on 60 held-out images of 128 pixels: 30.6 dB; of a VAE of 2.6 M parameters after 1,500 steps 27.7 dB.
        vae=Path(__file__).parent.parent / "instructdiffusion-tiny" / "vae",
    ),
}


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option `--recipe`, one of `RECIPES`."""
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="cpu",
        help="cpu: instructdiffusion-tiny, 96 x 96 pixels; gpu: larger, 128 x 128 pixels (default: %(default)s)",
    )
