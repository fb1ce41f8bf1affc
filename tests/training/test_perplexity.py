"""Validation perplexity: same masks whatever the batch, intervals that mean what they say."""
import functools

import jax
import numpy as np
import pytest

from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.training.perplexity import Nats, Perplexity
from tests.helpers import golden_model


def batches(batch_size: int, rows: int = 10):
    tokens = np.random.default_rng(0).integers(0, 97, (rows, 16)).astype(np.int32)
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        yield {"tokens": tokens[index % rows], "index": (index % rows).astype(np.int32), "valid": index < rows}


@functools.cache
def evaluate(variant: str = "topk"):
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    return Perplexity(golden_model.model(variant), Nelbo(SoftMask(variant, 3)), mesh)


def test_every_window_counts_once_and_has_the_same_masks_in_any_batch():
    small, large = (evaluate()(golden_model.params(), batches(size), 10, seed=3) for size in (4, 5))
    assert len(small["one_pass"].windows) == 10
    for name in ("one_pass", "two_pass"):
        np.testing.assert_allclose(small[name].windows, large[name].windows, rtol=1e-5)


@pytest.mark.full
def test_a_windows_time_has_nothing_to_do_with_its_place_among_the_documents(monkeypatch):
    seen = []
    draw = Nelbo.draw

    def spy(*args, **kwargs):
        noisy = draw(*args, **kwargs)
        seen.append(noisy.t)
        return noisy

    monkeypatch.setattr(Nelbo, "draw", spy)
    perplexity, batch = evaluate("none"), next(batches(10))
    given = {name: batch[name] for name in ("tokens", "index", "valid")}
    for seed in range(12):
        perplexity._rows(golden_model.params(), given, 10, jax.random.key(seed))
    times = np.stack(seen)
    np.testing.assert_array_equal(np.sort((np.sort(times, 1) - 1e-3) / 0.999 * 10 // 1, 1), np.tile(np.arange(10.0), (12, 1)))
    assert times[:, 0].max() > 0.5 and times[:, 9].min() < 0.5


def test_two_passes_differ_from_one_only_with_soft_masking():
    found = evaluate()(golden_model.params(), batches(5), 10, seed=3)
    assert np.any(found["one_pass"].windows != found["two_pass"].windows)
    binary = evaluate("none")(golden_model.params(), batches(5), 10, seed=3)
    assert set(binary) == {"one_pass"}
    np.testing.assert_allclose(binary["one_pass"].windows, found["one_pass"].windows, rtol=1e-5)


def test_an_empty_split_is_a_clear_error():
    with pytest.raises(ValueError, match="holds no window"):
        evaluate()(golden_model.params(), [], 10, seed=3)


def test_intervals_cover_the_mean_of_known_noise_at_their_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = Nats(rng.normal(32.0, 8.0, 60), 16).interval()
        covered += low <= 2.0 <= high
    assert 0.92 < covered / 400 < 0.98


def test_paired_intervals_are_tighter_where_windows_share_their_difficulty():
    rng = np.random.default_rng(0)
    hard = rng.normal(32.0, 8.0, 60)
    a, b = Nats(hard, 16), Nats(hard + rng.normal(0.5, 0.1, 60), 16)
    low, high = b.interval(a)
    assert low < 0.5 / 16 < high and high - low < 0.1 * (a.interval()[1] - a.interval()[0])


def test_perplexity_is_the_exponential_of_nats_per_token():
    assert Nats(np.array([16 * np.log(7.0)]), 16).perplexity == pytest.approx(7.0)
    assert Nats(np.array([1.0]), 16).standard_error == 0.0
