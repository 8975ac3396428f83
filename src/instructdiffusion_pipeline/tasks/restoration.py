"""Restoration: the output is the clean image itself (Geng et al., CVPR 2024, section 3.1)."""

import random
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from PIL import Image

from instructdiffusion_pipeline.pipeline_instruct_diffusion import Box
from instructdiffusion_pipeline.tasks.frames import before_and_after, paste_answer
from instructdiffusion_pipeline.tasks.transfer import (
    transfer_change,
    transfer_denoised,
    transfer_in_box,
    transfer_sharpened,
)

Degradation = Literal["noise", "blur", "watermark"]
TEMPLATES: dict[str, list[str]] = {
    "noise": [
        "remove the noise",
        "take the noise out of this photo",
        "denoise the picture",
        "clean up the grain in this image",
        "make this noisy photo clean",
        "get rid of the grain, please",
        "this was shot in the dark: wipe away the speckle",
        "smooth the sensor noise, keep the details",
        "I want this picture without its noise",
    ],
    "blur": [
        "remove the blur",
        "make this photo sharp",
        "deblur the picture",
        "the camera shook: bring the details back",
        "turn this blurry image into a crisp one",
        "sharpen what is out of focus, please",
        "undo the motion blur",
        "I want this picture in focus",
    ],
    "watermark": [
        "remove the watermark",
        "take the lettering off this photo",
        "erase the text that covers the picture",
        "clear the stamp from this image",
        "give me the picture without its watermark",
        "wipe away the printed mark, please",
        "show what lies under the watermark",
        "get rid of the logo across the photo",
    ],
}
TRANSFERS = {"noise": transfer_denoised, "blur": transfer_sharpened, "watermark": transfer_change}


@dataclass(frozen=True)
class Restoration:
    """Asks to remove a `degradation` from an image. Raises a ValueError for an unknown one."""

    degradation: Degradation

    family: ClassVar[str] = "restoration"
    # Settings of the watermark example of the original code, which has no example for noise or blur.
    settings: ClassVar[dict[str, float]] = {
        "num_inference_steps": 100,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
    }

    def __post_init__(self) -> None:
        if self.degradation not in TEMPLATES:
            raise ValueError(
                f"`degradation` must be one of {', '.join(get_args(Degradation))}; got {self.degradation!r}."
            )

    def instruction(self, rng: random.Random | None = None) -> str:
        """The instruction: a random wording with `rng`, otherwise always the same."""
        templates = TEMPLATES[self.degradation]
        return rng.choice(templates) if rng else templates[0]

    def draw(self, image: Image.Image, clean: Image.Image) -> Image.Image:
        """The clean image."""
        return clean

    def read(self, image: Image.Image, answer: Image.Image, box: Box | None = None) -> Image.Image:
        """The restored image in the size of `image`. Pixels outside the `box` that `answer` shows are unchanged."""
        return paste_answer(image, answer, box)

    def transfer(
        self, image: Image.Image, reconstruction: Image.Image, answer: Image.Image, box: Box | None = None
    ) -> Image.Image:
        """See `PictureTask`."""
        return transfer_in_box(TRANSFERS[self.degradation], image, reconstruction, answer, box)

    def overlay(self, image: Image.Image, restored: Image.Image) -> Image.Image:
        """The left half of the input and the right half of the result."""
        return before_and_after(image, restored)


def add_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add white Gaussian noise of standard deviation `sigma`, in gray levels of 0 to 255, and clip to 8 bits."""
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))
