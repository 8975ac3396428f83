"""Conditioning dropout, which teaches the one UNet the three predictions that guidance combines."""

import torch

# Both shares are the original's; a sample never loses its text and its image together.
EMPTY_TEXT_SHARE = 0.075
ZERO_IMAGE_SHARE = 0.075


def drop_conditioning(
    text: torch.Tensor, image_latents: torch.Tensor, empty_text: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty the text or zero the image of some samples.

    `text` [B, 77] are token ids or [B, 77, d] their embeddings, `empty_text` [77] or [77, d] those of the empty text,
    `image_latents` [B, C, h, w], and `draws` [B] uniform in [0, 1): below 0.075 the text is emptied, from there to
    0.15 the image latents are zeroed.
    """
    empties_text = draws < EMPTY_TEXT_SHARE
    zeroes_image = (draws >= EMPTY_TEXT_SHARE) & (draws < EMPTY_TEXT_SHARE + ZERO_IMAGE_SHARE)
    text = torch.where(empties_text.view(-1, *[1] * empty_text.dim()), empty_text, text)
    image_latents = torch.where(zeroes_image[:, None, None, None], 0.0, image_latents)
    return text, image_latents
