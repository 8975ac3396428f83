import json

import torch
from safetensors.torch import load_file

from instructdiffusion_pipeline.training.encoding import draw_step_noise, drop_conditioning


def dropped(draws):
    """Which samples lost their text, and which lost their image."""
    size = len(draws)
    ids, image_latents = drop_conditioning(
        torch.ones(size, 3, dtype=torch.long), torch.ones(size, 4, 1, 1), torch.zeros(3, dtype=torch.long), draws
    )
    return (ids == 0).all(1), (image_latents == 0).all(dim=(1, 2, 3))


def test_fractions_of_dropped_conditions_over_a_hundred_thousand_samples():
    no_text, no_image = dropped(draw_step_noise(0, range(100_000), torch.Size([1, 1, 1]), 1000).random_p)
    # five standard deviations of a binomial fraction of 0.075 are 0.0042
    assert abs(no_text.float().mean() - 0.075) < 0.0042
    assert abs(no_image.float().mean() - 0.075) < 0.0042
    assert not (no_text & no_image).any()


def test_random_numbers_near_the_limits():
    no_text, no_image = dropped(torch.tensor([0.0, 0.0749, 0.075, 0.1499, 0.15, 0.999]))
    assert no_text.tolist() == [True, True, False, False, False, False]
    assert no_image.tolist() == [False, False, True, True, False, False]


def test_the_dropout_probability_can_be_set():
    _, image = drop_conditioning(torch.ones(4, 3), torch.ones(4, 4, 1, 1), torch.zeros(3), torch.arange(4) / 4, 0.25)
    text, _ = drop_conditioning(torch.ones(4, 3), torch.ones(4, 4, 1, 1), torch.zeros(3), torch.arange(4) / 4, 0.25)
    assert (text == 0).all(1).tolist() == [True, False, False, False]
    assert (image == 0).all(dim=(1, 2, 3)).tolist() == [False, True, False, False]
    text, image = drop_conditioning(torch.ones(1, 3), torch.ones(1, 4, 1, 1), torch.zeros(3), torch.zeros(1), 0.0)
    assert text.all() and image.all(), "0 drops nothing"


def test_random_numbers_of_the_original_code_drop_the_same_conditions(golden):
    for step in ("step_a", "step_b"):
        draws = load_file(golden / "training" / f"{step}.safetensors")["dropout_random"]
        modes = json.loads((golden / "training" / f"{step}.json").read_text())["modes"]
        no_text, no_image = dropped(draws)
        assert no_text.tolist() == [mode == "null_text" for mode in modes]
        assert no_image.tolist() == [mode == "zero_image" for mode in modes]


def test_embeddings_are_emptied_like_token_ids():
    text, empty = torch.ones(3, 2, 5), torch.full((2, 5), 7.0)
    emptied, _ = drop_conditioning(text, torch.ones(3, 4, 1, 1), empty, torch.tensor([0.01, 0.1, 0.5]))
    assert torch.equal(emptied[0], empty) and torch.equal(emptied[1:], text[1:])
