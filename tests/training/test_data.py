from itertools import islice

import pytest
import tiny
import torch

from instructdiffusion_pipeline.sample import Sample
from instructdiffusion_pipeline.training import encode_samples
from instructdiffusion_pipeline.training.data import EndlessShuffle


def test_encoded_samples_hold_the_posteriors_and_the_tokens(pipe):
    samples = [Sample(tiny.picture(seed=i), tiny.picture(seed=10 + i), f"paint the cat {i}") for i in range(5)]
    dataset = encode_samples(samples, pipe.vae, pipe.tokenizer, batch_size=2)
    assert len(dataset) == 5
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess([samples[3].image, samples[3].target])
        posterior = pipe.vae.encode(pixels).latent_dist
    assert all(tensor.is_contiguous() for tensor in dataset.tensors.values()), "safetensors stores no other"
    item = dataset[3]
    tolerance = {"atol": 1e-2, "rtol": 1e-2}  # kept in half precision
    torch.testing.assert_close(item["image_latents"].float(), posterior.mean[0], **tolerance)
    torch.testing.assert_close(item["target_mean"].float(), posterior.mean[1], **tolerance)
    torch.testing.assert_close(item["target_std"].float(), posterior.std[1], **tolerance)
    assert item["input_ids"].shape == (77,)
    assert item["input_ids"].tolist() == pipe.tokenizer("paint the cat 3", padding="max_length").input_ids


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pictures_of_several_sizes_are_refused(pipe, batch_size):
    samples = [Sample(tiny.picture(), tiny.picture(), "same")] * 3
    samples += [Sample(tiny.picture(), tiny.picture(48, 32), "other")]
    with pytest.raises(ValueError, match=r"samples: number 3 .* target of \(48, 32\)"):
        encode_samples(samples, pipe.vae, pipe.tokenizer, batch_size=batch_size)


def test_no_samples_is_an_error(pipe):
    with pytest.raises(ValueError, match="samples: got none"):
        encode_samples([], pipe.vae, pipe.tokenizer)


@pytest.mark.parametrize("start", [0, 3, 7, 20])
def test_endless_shuffle_goes_on_where_it_was(start):
    whole = list(islice(EndlessShuffle(7, seed=1), 30))
    assert list(islice(EndlessShuffle(7, seed=1, start=start), 30 - start)) == whole[start:]
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14, 21))
    assert whole[:7] != whole[7:14]
