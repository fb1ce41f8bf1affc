"""The law of the draws from a chunked vocabulary, and recorded noise."""
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, kstest

from softmask_jax.diffusion.noise import keyed_noise
from softmask_jax.diffusion.vocab import positions
from softmask_jax.diffusion.vocab.head import Draw, Head, sweep
from tests.diffusion.vocab.test_head import B, HOT, L, MASK, V, VPAD, arrays, assert_close

TOKENS = {3: 0.45, 150: 0.3, 151: 0.2, 20: 0.0495, 299: 4e-4, 140: 1e-4}
RARE = 1000


@cache
def drawn_by(batch, length, temperature=1.0, nucleus_p=1.0, chunk=128):
    """A compiled draw from softmax(bias): keys [B], bias [Vpad] -> drawn, drawn_score."""
    def run(keys, bias):
        head = Head(jnp.zeros((VPAD, 1)), bias, V, MASK, True, chunk=chunk)
        draw = Draw(keys=keys, nucleus_p=nucleus_p, temperature=temperature)
        found = sweep(jnp.zeros((batch, length, 1)), head, k=1, draw=draw)
        return found.drawn, found.drawn_score
    return jax.jit(run)


def token_bias(scale=1.0):
    bias = np.full(VPAD, -60.0, np.float32)
    for token, p in TOKENS.items():
        bias[token] = np.log(p) * scale
    bias[MASK] = 5.0
    return bias


def assert_frequencies(drawn, probabilities):
    counts = np.bincount(np.ravel(drawn), minlength=VPAD)
    tokens = list(probabilities)
    assert counts[tokens].sum() == drawn.size
    expected = np.array([probabilities[t] for t in tokens]) * drawn.size
    statistic = ((counts[tokens] - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(0.999, len(tokens) - 1), (counts[tokens], expected)


@pytest.mark.parametrize("chunk", [None, 128], ids=["dense", "chunked"])
def test_draws_follow_the_distribution_down_to_rare_tokens(chunk):
    keys = jax.random.split(jax.random.key(5), 16)
    drawn, score = drawn_by(16, 6_000, temperature=2.0, chunk=chunk)(keys, token_bias(scale=2.0))
    assert_frequencies(drawn, TOKENS)
    # The score is a standard Gumbel variable whatever was drawn.
    for token in (3, 20):
        assert kstest(np.asarray(score)[np.asarray(drawn) == token][:5000], "gumbel_r").pvalue > 1e-3


def test_nucleus_draws_follow_the_filtered_distribution():
    keys = jax.random.split(jax.random.key(6), 4)
    drawn, score = drawn_by(4, 3000, nucleus_p=0.9)(keys, token_bias())
    assert_frequencies(drawn, {3: 0.6, 150: 0.4})
    assert kstest(np.ravel(score)[:5000], "gumbel_r").pvalue > 1e-3
    drawn, _ = drawn_by(4, 3000, nucleus_p=0.3)(keys, token_bias())
    assert np.all(drawn == 3)


@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
def test_a_row_draws_the_same_in_any_batch_at_any_length_and_chunk(nucleus_p):
    bias = np.random.default_rng(1).normal(size=VPAD).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 5)
    drawn, score = drawn_by(5, 9, nucleus_p=nucleus_p)(keys, bias)
    assert len(np.unique(drawn)) > 20
    alone = drawn_by(1, 4, nucleus_p=nucleus_p, chunk=None)(keys[3:4], bias)
    np.testing.assert_array_equal(alone[0][0], drawn[3, :4])
    np.testing.assert_allclose(alone[1][0], score[3, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
@pytest.mark.parametrize("chunk", [None, 128], ids=["dense", "chunked"])
def test_recorded_noise_is_replayed_exactly(chunk, nucleus_p):
    inputs, _, _ = arrays()
    gumbel = np.random.default_rng(3).gumbel(size=(B, L, V))
    exists = np.arange(V) != MASK
    with jax.enable_x64(True):
        head = Head(inputs["weight"], inputs["bias"], V, MASK, True, chunk=chunk)
        draw = Draw(gumbel=jnp.asarray(gumbel), nucleus_p=nucleus_p, temperature=0.5)
        found = jax.jit(partial(sweep, k=1, temperature=HOT))(inputs["hidden"], head, draw=draw)
    z = np.where(exists, (inputs["hidden"] @ inputs["weight"][:V].T + inputs["bias"][:V]) / (HOT * 0.5), -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")
    below = np.cumsum(np.take_along_axis(p, order, -1), -1) <= nucleus_p if nucleus_p < 1 else np.ones_like(order, bool)
    below[..., 0] = True
    keep = np.zeros(p.shape, bool)
    np.put_along_axis(keep, order, below, -1)
    p = np.where(keep & exists, p, 0) / np.where(keep & exists, p, 0).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        score = np.log(p) + gumbel
    np.testing.assert_array_equal(found.drawn, score.argmax(-1))
    np.testing.assert_allclose(found.drawn_score, score.max(-1), rtol=1e-10)
    log_p = np.log(np.take_along_axis(p, score.argmax(-1)[..., None], -1)[..., 0])
    np.testing.assert_allclose(found.drawn_log_p, log_p, rtol=1e-9, atol=1e-12)


@pytest.mark.soak
def test_a_thousand_tokens_of_probability_1e_6_are_each_drawn_about_as_often_as_they_should():
    """Four million draws; noise from plain float32 uniforms would miss the rare tokens by several per cent."""
    vocab_size, rows, length = RARE + 24, 64, 65536
    p = np.full(vocab_size, 1e-6)
    p[RARE:] = (1 - RARE * 1e-6) / 24
    head = Head(jnp.zeros((vocab_size, 1)), jnp.asarray(np.log(p), jnp.float32), vocab_size, -1, False)

    @jax.jit
    def counts(key):
        found = sweep(jnp.zeros((1, length, 1)), head, k=1, draw=Draw(keys=key[None]))
        return jnp.zeros(vocab_size, jnp.int32).at[found.drawn.reshape(-1)].add(1)

    total = sum(np.asarray(counts(key)) for key in jax.random.split(jax.random.key(11), rows))
    expected = rows * length * 1e-6
    rare = total[:RARE]
    assert abs(rare.sum() - RARE * expected) < 4 * np.sqrt(RARE * expected)
    # Counts of single tokens are Poisson: their variance is their mean, within four standard errors.
    assert abs(rare.var() / expected - 1) < 4 * np.sqrt((2 + 1 / expected) / RARE)


@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
def test_log_p_of_what_is_drawn_is_its_log_probability(nucleus_p):
    bias = np.random.default_rng(1).normal(size=VPAD).astype(np.float32)
    head = Head(jnp.zeros((VPAD, 1)), jnp.asarray(bias), V, MASK, True, chunk=128)
    draw = Draw(keys=jax.random.split(jax.random.key(2), 5), nucleus_p=nucleus_p)
    found = jax.jit(partial(sweep, k=1))(jnp.zeros((5, 40, 1)), head, draw=draw)
    p = np.where(np.arange(V) == MASK, 0, np.exp(bias[:V].astype(np.float64)))
    p /= p.sum()
    kept = np.sort(p)[::-1]
    kept = kept[np.cumsum(kept) <= nucleus_p].sum() if nucleus_p < 1 else 1.0
    np.testing.assert_allclose(found.drawn_log_p, np.log(p[found.drawn] / kept), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
def test_a_bias_changes_what_is_drawn_and_nothing_else(nucleus_p):
    own, tilt = token_bias(), np.zeros(VPAD, np.float32)
    tilt[3], tilt[151] = -1e9, -0.5
    keys = jax.random.split(jax.random.key(6), 4)

    @jax.jit
    def run(bias, tilt):
        head = Head(jnp.zeros((VPAD, 1)), bias, V, MASK, True, chunk=128)
        return sweep(jnp.zeros((4, 3000, 1)), head, k=3, draw=Draw(keys=keys, nucleus_p=nucleus_p, bias=tilt))

    tilted, plain = run(own, tilt), run(own, jnp.zeros(VPAD))
    weights = {token: p * np.exp(tilt[token]) for token, p in TOKENS.items() if token != 3}
    if nucleus_p < 1:
        weights = {token: weights[token] for token in (150, 151)}  # together 0.894
    total = sum(weights.values())
    assert_frequencies(tilted.drawn, {token: w / total for token, w in weights.items()})
    for name in ("token_ids", "top_logits", "neg_entropy", "logsumexp"):
        np.testing.assert_array_equal(getattr(tilted, name), getattr(plain, name))


def test_keyed_noise_is_a_function_of_row_key_stream_and_position():
    keys, places = jax.random.split(jax.random.key(3), 2), jnp.asarray([[4, 0, 7], [7, 7, 1]])
    for stream in (None, np.uint32(0xFFFFFFFE)):
        noise = keyed_noise(jax.random.uniform, keys, places, stream=stream)
        for (row, i), position in np.ndenumerate(places):
            key = keys[row] if stream is None else jax.random.fold_in(keys[row], stream)
            assert noise[row, i] == jax.random.uniform(jax.random.fold_in(key, position))
        first = keyed_noise(jax.random.uniform, keys, places[:, 0], stream=stream)
        np.testing.assert_array_equal(first, noise[:, 0])


@pytest.mark.full
@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wanted_positions_get_what_a_whole_sweep_gives_them(nucleus_p, share, monkeypatch):
    monkeypatch.setattr(positions, "MIN_BLOCK", 2)
    inputs, _, _ = arrays()
    head = Head(jnp.asarray(inputs["weight"], jnp.float32), None, V, MASK, True, chunk=128)
    hidden = jnp.asarray(inputs["hidden"], jnp.float32)
    draw = Draw(keys=jax.random.split(jax.random.key(6), B), nucleus_p=nucleus_p)
    wanted = np.random.default_rng(4).random((B, L)) < share
    whole, part = sweep(hidden, head, k=3, draw=draw), sweep(hidden, head, k=3, draw=draw, where=jnp.asarray(wanted))
    assert_close(*(jax.tree.map(lambda x: x[wanted], swept) for swept in (part, whole)), 1e-5)
    assert share or not any(map(np.any, jax.tree.leaves(part)))
