import pytest
import torch
from pairs import Pairs, mixture

from instructdiffusion_pipeline.datasets.mixture import Mixture, Source
from instructdiffusion_pipeline.tasks import EmptyAnnotation
from instructdiffusion_pipeline.tasks.editing import Editing
from instructdiffusion_pipeline.training import CachedDataset, ImageDataset, MultiSizeDataset, cache, cache_samples
from instructdiffusion_pipeline.training.data import count_workers, pixels, tokenize
from instructdiffusion_pipeline.training.encoding import FrozenEncoders, draw_step_noise

SHAPE = torch.Size([4, 16, 16])


@pytest.fixture
def samples(pipe):
    return ImageDataset(mixture(), pipe.tokenizer)


def test_items_are_the_samples_of_the_mixture(pipe, samples):
    for position in range(2 * len(samples)):
        sample, item = samples.mixture[position], samples[position]
        assert torch.equal(item["image"], pixels(sample.image)) and item["image"].shape == (3, 32, 32)
        assert torch.equal(item["target"], pixels(sample.target))
        assert item["input_ids"].tolist() == pipe.tokenizer(sample.instruction, padding="max_length").input_ids
        assert samples.sources[item["source"]] == ("two" if "number 10" in sample.instruction else "many")
        assert item["position"] == position and item["skipped"] == 0


def test_iterating_over_samples_ends_after_an_epoch(pipe, samples, tmp_path):
    for dataset in (samples, cache_samples(samples, 5, pipe, tmp_path), MultiSizeDataset([samples], 2)):
        assert [int(item["position"]) for item in dataset] == list(range(len(dataset)))


def test_images_of_several_sizes_raise_an_error(pipe):
    sources = [
        Source(name, Pairs(2, side=side), Editing.from_annotation) for name, side in (("small", 32), ("large", 64))
    ]
    samples = ImageDataset(Mixture([(source, 1) for source in sources]), pipe.tokenizer)
    with pytest.raises(ValueError, match=r"images of one size; .* an image of (small|large) has \((32|64)"):
        [samples[position] for position in range(4)]


def two_sizes(pipe, batch_size):
    """Nine small and four large images, as instructions "make it number ..." from 0 and from 50."""
    datasets = [
        ImageDataset(Mixture([(Source(name, Pairs(count, first, side), Editing.from_annotation), 1)]), pipe.tokenizer)
        for name, count, first, side in (("small", 9, 0, 32), ("large", 4, 50, 64))
    ]
    return MultiSizeDataset(datasets, batch_size), datasets


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_batch_of_several_sizes_has_one_size_and_an_epoch_all_samples(pipe, batch_size):
    samples, datasets = two_sizes(pipe, batch_size)
    assert samples.sources == ["small", "large"]
    lengths = [batch_size * -(-len(dataset) // batch_size) for dataset in datasets]
    assert len(samples) == sum(lengths)
    orders = []
    for epoch in range(2):
        items = [samples[epoch * len(samples) + offset] for offset in range(len(samples))]
        assert [int(item["position"]) for item in items] == [epoch * len(samples) + i for i in range(len(samples))]
        sides = [item["image"].shape[-1] for item in items]
        batches = [set(sides[start : start + batch_size]) for start in range(0, len(sides), batch_size)]
        assert all(len(batch) == 1 for batch in batches)
        for number, (side, length) in enumerate(zip((32, 64), lengths, strict=True)):
            found = [item for item in items if item["source"] == number]
            assert {item["image"].shape[-1] for item in found} == {side}
            expected = [datasets[number][epoch * length + index] for index in range(length)]
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True))
        orders.append(sides)
    assert batch_size != 1 or orders[0] != orders[1], "each epoch has another order"
    with pytest.raises(ValueError, match="`datasets` must have at least one dataset"):
        MultiSizeDataset([], batch_size)
    other = MultiSizeDataset(datasets, batch_size, seed=1)
    assert batch_size != 1 or [other[i]["image"].shape[-1] for i in range(len(other))] != orders[0]


@pytest.mark.parametrize(
    ("given", "device", "cached", "cores", "processes", "expected"),
    [
        (None, "cuda", False, 64, 1, 8),
        (None, "cuda", False, 4, 1, 3),
        (None, "cuda", False, 1, 1, 0),
        (None, "cuda", False, 32, 8, 3),
        (None, "cuda", False, 4, 8, 0),
        (None, "cuda", True, 64, 1, 0),
        (None, "cpu", False, 64, 1, 0),
        (None, "mps", False, 64, 1, 0),
        (5, "cpu", True, 1, 1, 5),
        (0, "cuda", False, 64, 1, 0),
    ],
)
def test_a_gpu_has_workers_by_default(monkeypatch, given, device, cached, cores, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_workers(given, torch.device(device), cached) == expected


def test_skipped_samples_are_counted(pipe):
    def picky(image, edit, rng):
        if "number 1" in edit.instruction:
            raise EmptyAnnotation("odd one")
        return Editing.from_annotation(image, edit, rng)

    samples = ImageDataset(Mixture([(Source("picky", Pairs(3), picky), 1)]), pipe.tokenizer)
    samples.mixture.skipped.clear()
    assert sum(int(samples[position]["skipped"]) for position in range(3)) == 1


class LongWords:
    """Edits with different instructions of many words."""

    def __init__(self, text):
        self.text = text

    def __call__(self, image, edit, rng):
        return Editing(edit.instruction + self.text)


def test_long_instructions_are_truncated_as_in_transformers_with_a_warning(pipe, caplog):
    text = "the cat " * 60
    expected = pipe.tokenizer(text, truncation=True, max_length=77).input_ids
    assert tokenize(pipe.tokenizer, text).tolist() == expected
    samples = ImageDataset(Mixture([(Source("long", Pairs(6), LongWords(text)), 1)]), pipe.tokenizer)
    for _ in range(2):
        assert (
            samples[0]["input_ids"].tolist()
            == pipe.tokenizer(samples.mixture[0].instruction, truncation=True, max_length=77).input_ids
        )
    assert caplog.text.count("77 tokens") == 1 and samples.cut.total() == 2, "said once, and counted"
    for position in range(6):
        samples[position]
    assert caplog.text.count("77 tokens") == 3 and "Others are truncated without a warning" in caplog.text
    assert len(samples.cut) == 6 and samples.cut.total() == 8


def test_noise_depends_only_on_seed_and_position():
    together = draw_step_noise(3, [0, 1, 2, 3], SHAPE, 1000)
    apart = [draw_step_noise(3, [position], SHAPE, 1000) for position in range(4)]
    for number, column in enumerate(together):
        assert torch.equal(column, torch.cat([one[number] for one in apart]))
    other = draw_step_noise(4, [0], SHAPE, 1000)
    assert not torch.equal(other.noise, apart[0].noise) and not torch.equal(apart[0].noise, apart[1].noise)


def test_noise_has_the_expected_distributions():
    draws = draw_step_noise(0, range(2000), torch.Size([1, 4, 4]), 1000)
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((draws.noise * draws.posterior_noise).mean()) < 0.03, "independent"
    for uniform in (draws.random_p, draws.timesteps / 1000):
        assert torch.allclose(
            uniform.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.04
        )
    assert draws.timesteps.min() >= 0 and draws.timesteps.max() <= 999


def test_encoding_matches_the_pipeline(pipe, samples):
    batch = torch.utils.data.default_collate([samples[0], samples[1]])
    encoded = FrozenEncoders(pipe.vae, pipe.text_encoder).encode(batch)
    sample = samples.mixture[1]
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess([sample.image, sample.target])).latent_dist
    torch.testing.assert_close(encoded["image_latents"][1], posterior.mode()[0])
    torch.testing.assert_close(encoded["target_mean"][1], posterior.mean[1])
    torch.testing.assert_close(encoded["target_std"][1], posterior.std[1])
    torch.testing.assert_close(encoded["prompt_embeds"][1:], pipe.encode_prompt(sample.instruction)[0])


@pytest.mark.parametrize("embeddings", [True, False])
def test_a_cache_contains_the_encoded_samples(pipe, samples, tmp_path, embeddings, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    cached = cache_samples(samples, 10, pipe, tmp_path, embeddings=embeddings, batch_size=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and len(cached) == 10 and cached.sources == samples.sources
    encoders = FrozenEncoders(pipe.vae, pipe.text_encoder if embeddings else None)
    order = cached[0] and cached._order[1]
    for position in range(10):
        expected = encoders.encode(torch.utils.data.default_collate([samples[int(order[position])]]))
        item = cached[position]
        assert item.keys() == expected.keys() and item["position"] == position
        for name in expected.keys() - {"position"}:
            torch.testing.assert_close(item[name].float(), expected[name][0].float(), atol=1e-2, rtol=1e-2)


def test_each_epoch_of_a_cache_has_all_samples_in_another_order(pipe, samples, tmp_path):
    cached = cache_samples(samples, 6, pipe, tmp_path)
    again = CachedDataset(tmp_path)

    def epoch(data, number):
        return [data[position]["target_mean"].sum().item() for position in range(6 * number, 6 * number + 6)]

    assert sorted(epoch(cached, 0)) == sorted(epoch(cached, 1)) and len(set(epoch(cached, 0))) == 6
    assert epoch(cached, 0) != epoch(cached, 1)
    assert epoch(again, 1) == epoch(cached, 1), "without the epoch before it"


def test_a_cache_can_be_restricted_to_some_sources(pipe, samples, tmp_path):
    cached = cache_samples(samples, 12, pipe, tmp_path)

    def shown(data, positions):
        return [(int(item["source"]), item["target_mean"].sum().item()) for item in map(data.__getitem__, positions)]

    wanted = sorted(pair for pair in shown(cached, range(12)) if cached.sources[pair[0]] == "many")
    many = CachedDataset(tmp_path, only={"many"})
    assert 0 < len(many) == len(wanted) < 12
    for epoch in range(2):
        assert sorted(shown(many, range(epoch * len(many), (epoch + 1) * len(many)))) == wanted
    assert int(many[len(many)]["position"]) == len(many)
    assert shown(CachedDataset(tmp_path, only={"many", "two"}), range(12)) == shown(cached, range(12))
    with pytest.raises(ValueError, match=r"`only` must be names of .*; got few"):
        CachedDataset(tmp_path, only={"few"})


def test_an_interrupted_cache_is_completed_and_another_raises_an_error(pipe, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_SIZE", 2)
    cache_samples(samples, 5, pipe, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    files[2].rename(files[2].with_suffix(".partial"))
    before = files[0].stat().st_mtime_ns
    cache_samples(samples, 5, pipe, tmp_path)
    assert [file.read_bytes() for file in files] == whole and files[0].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="samples was 5 and is 6"):
        cache_samples(samples, 6, pipe, tmp_path)
    pipe.vae.quant_conv.bias.data += 1
    with pytest.raises(ValueError, match="encoders was"):
        cache_samples(samples, 5, pipe, tmp_path)
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        cache_samples(samples, 0, pipe, tmp_path / "other")


def test_the_embedding_of_a_text_is_stored_once(pipe, tmp_path):
    samples = ImageDataset(Mixture([(Source("same", Pairs(6), lambda *_: Editing("same words")), 1)]), pipe.tokenizer)
    cached = cache_samples(samples, 6, pipe, tmp_path)
    assert cached._shards[0]["prompt_embeds"].shape == (1, 77, 32)
    torch.testing.assert_close(
        cached[3]["prompt_embeds"].float()[None], pipe.encode_prompt("same words")[0], atol=1e-2, rtol=1e-2
    )


def test_a_cache_of_other_images_raises_an_error(pipe, tmp_path):
    def samples(first):
        return ImageDataset(
            Mixture([(Source("same name", Pairs(3, first), Editing.from_annotation), 1)]), pipe.tokenizer
        )

    cache_samples(samples(0), 3, pipe, tmp_path)
    with pytest.raises(ValueError, match="content was"):
        cache_samples(samples(3), 3, pipe, tmp_path)


def test_one_changed_caption_of_a_small_dataset_is_noticed(pipe, tmp_path, caplog, monkeypatch):
    captions = [f"make it number {number}" for number in range(40)]

    def samples():
        source = Source("captions", Pairs(40), lambda image, edit, rng: Editing(captions[int(edit.instruction[15:])]))
        return ImageDataset(Mixture([(source, 1)]), pipe.tokenizer)

    cache_samples(samples(), 40, pipe, tmp_path)
    cache_samples(samples(), 40, pipe, tmp_path)
    assert "is used again" not in caplog.text
    monkeypatch.setattr(cache, "FINGERPRINT_SAMPLES", 39)
    cache_samples(samples(), 40, pipe, tmp_path)
    assert "39 of its 40 samples were compared with the data. Delete the cache if" in caplog.text
    captions[23] = "something else"
    with pytest.raises(ValueError, match="content was"):
        cache_samples(samples(), 40, pipe, tmp_path)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_a_timestep_bias_changes_only_the_distribution_of_timesteps(power):
    biased, plain = (draw_step_noise(0, range(4000), torch.Size([1, 1, 1]), 1000, bias) for bias in (power, 1.0))
    assert biased.timesteps.min() >= 0 and biased.timesteps.max() <= 999
    for share in (0.25, 0.5, 0.75, 0.9):
        assert (biased.timesteps < 1000 * share).float().mean() == pytest.approx((share + share**power) / 2, abs=0.03)
    assert len(biased.timesteps[biased.timesteps < 300].unique()) > 200, "none is skipped"
    for name in ("posterior_noise", "random_p", "noise"):
        assert torch.equal(getattr(biased, name), getattr(plain, name))
