"""Conditioning dropout, which teaches the one UNet the three predictions that guidance combines."""

import torch

# Both shares are the original's; a sample never loses its text and its image together.
EMPTY_TEXT_SHARE = 0.075
ZERO_IMAGE_SHARE = 0.075


def drop_conditioning(
    input_ids: torch.Tensor, image_latents: torch.Tensor, empty_ids: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty the text or zero the image of some samples.

    `input_ids` [B, 77], `image_latents` [B, 4, h, w], `empty_ids` [77] (the tokens of the empty text) and `draws` [B],
    uniform in [0, 1): below 0.075 the text is emptied, from there to 0.15 the image latents are zeroed.
    """
    empties_text = draws < EMPTY_TEXT_SHARE
    zeroes_image = (draws >= EMPTY_TEXT_SHARE) & (draws < EMPTY_TEXT_SHARE + ZERO_IMAGE_SHARE)
    input_ids = torch.where(empties_text[:, None], empty_ids, input_ids)
    image_latents = torch.where(zeroes_image[:, None, None, None], 0.0, image_latents)
    return input_ids, image_latents
