"""Train the VAE of `instructdiffusion-tiny`: downsampling by 4, eight latent channels, MSE and a small KL term."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from sources import mixture
from torch import nn
from tqdm import tqdm
from world import World

from instructdiffusion_pipeline.files import atomic_write

POOL = 24_000  # number of images; they are generated once and used repeatedly
BATCH = 16
STEPS = 6_000
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-4
SAVE_EVERY = 500


def build(side: int) -> AutoencoderKL:
    """Build the VAE (0.65 M parameters) for images of `side` x `side` pixels.

    Its scaling factor is 1, because `standardize_latents` follows training.
    """
    widths = (16, 32, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=side,
        scaling_factor=1.0,
    )


def train(world: World, folder: Path) -> AutoencoderKL:
    """Train a VAE, or continue an interrupted run in `folder`.

    Args:
        world: the source of the images.
        folder: for checkpoints and the trained VAE.

    Returns:
        The VAE with EMA weights and standardized latents.
    """
    finished, state_path = folder / "vae", folder / "vae-state.pt"
    if finished.exists():
        return AutoencoderKL.from_pretrained(finished)
    torch.manual_seed(0)
    vae = build(min(world.frame))
    ema = EMAModel(vae.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    first = 0
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]

    pool = draw_pool(world)
    bar = tqdm(range(first, STEPS), initial=first, total=STEPS, desc="VAE", mininterval=5)
    for step in bar:
        indices = np.random.default_rng(step).integers(len(pool), size=BATCH)
        pictures = torch.from_numpy(pool[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = F.mse_loss(decoded.float(), pictures)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        (error + KL_WEIGHT * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(vae.parameters())
        bar.set_postfix_str(f"{10 * np.log10(4 / error.item()):.1f} dB")
        if (step + 1) % SAVE_EVERY == 0:
            state = {"vae": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step + 1}
            with atomic_write(state_path) as partial:
                torch.save(state, partial)

    ema.copy_to(vae.parameters())
    standardize_latents(vae, pool[:2_000])
    with atomic_write(finished) as partial:
        vae.save_pretrained(partial)
    return vae


def draw_pool(world: World) -> np.ndarray:
    """Generate inputs and targets of all families, uint8 [POOL, height, width, 3].

    There are no noisy inputs, because such small latents cannot represent noise.
    """
    samples = mixture(world, POOL)
    pictures: list[np.ndarray] = []
    for position in tqdm(range(POOL), desc="pictures"):
        sample = samples[position]
        noisy = samples.source_of(position).name == "noise"
        pictures += [np.asarray(picture) for picture in (sample.target, sample.image)[: 1 if noisy else 2]]
        if len(pictures) >= POOL:
            break
    return np.stack(pictures[:POOL])


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Fold the mean and deviation of each latent channel into the 1 x 1 convolutions before and after the latents.

    Decoded images do not change. The latents have unit variance without a scaling factor. So the image latents, which
    the pipeline does not scale, have the same range as the denoised latents.
    """
    tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in tensors.split(100)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()  # the second half of the channels is the log variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[:, None, None]
