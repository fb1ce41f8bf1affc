"""Spherical mixtures of embeddings: their norm, their mean, their gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.embedding_mixtures import slerp_weights
from tests.diffusion.test_soft_masking import EMBEDDING, GOLDEN, MASK, RAW, RAW_KEYS, TOKENS, feedback_of, run


def test_slerp_keeps_the_norm_and_walks_the_great_circle():
    logits = GOLDEN["logits/normal3"]
    masked = TOKENS == MASK
    mask = EMBEDDING[MASK]
    _, end = slerp_at(logits, 1.0)
    for amount in (0.1, 0.5, 0.9, 1.0):
        _, x = slerp_at(logits, amount)
        np.testing.assert_allclose(jnp.linalg.norm(x[masked], axis=-1), jnp.linalg.norm(mask), rtol=1e-5)
        walked, whole = angle(x[masked], mask), angle(end[masked], mask)
        np.testing.assert_allclose(walked, amount * whole, atol=2e-3)


def slerp_at(logits, amount):
    raw = soft_masking.raw_from_effective(1.0, -100.0, 1.0)
    return run(raw, EMBEDDING, logits, amount, variant="slerp")[0]


def angle(a, b):
    cosine = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
    return jnp.arccos(jnp.clip(cosine, -1, 1))


def test_slerp_ends_in_the_weighted_karcher_mean():
    _, end = slerp_at(GOLDEN["logits/flat"], 1.0)
    feedback = feedback_of(jnp.asarray(GOLDEN["logits/flat"]), 3)
    shares = np.asarray(jax.nn.softmax(feedback.top_logits))
    for b, i in np.argwhere(GOLDEN["input_ids"] == MASK):
        units = np.asarray(EMBEDDING[feedback.token_ids[b, i]], np.float64)
        units /= np.linalg.norm(units, axis=-1, keepdims=True)
        mean = shares[b, i] @ units
        for _ in range(200):
            mean /= np.linalg.norm(mean)
            cosine = units @ mean
            away = units - cosine[:, None] * mean
            log = np.arccos(cosine)[:, None] * away / np.linalg.norm(away, axis=-1, keepdims=True)
            tangent = shares[b, i] @ log
            length = np.linalg.norm(tangent)
            mean = np.cos(length) * mean + np.sinc(length / np.pi) * tangent
        got = np.asarray(end[b, i]) / np.linalg.norm(end[b, i])
        np.testing.assert_allclose(got, mean, atol=2e-3)


def test_slerp_gradients_match_finite_differences():
    logits = jnp.asarray(GOLDEN["logits/flat"])
    raw, step = RAW["learnB"], 1e-2
    _, (d_raw, d_embedding) = run(raw, EMBEDDING, logits, variant="slerp")
    direction = jax.random.normal(jax.random.key(0), EMBEDDING.shape) / 10

    def difference(at):
        up, down = (run(*at(sign * step), logits, variant="slerp")[0][0] for sign in (1, -1))
        return (up - down) / (2 * step)

    np.testing.assert_allclose(
        jnp.sum(d_embedding * direction), difference(lambda s: (raw, EMBEDDING + s * direction)), rtol=1e-2
    )
    for name in RAW_KEYS:
        moved = difference(lambda s, name=name: ({**raw, name: raw[name] + s}, EMBEDDING))
        np.testing.assert_allclose(d_raw[name], moved, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("degenerate", ["coincident", "antipodal", "opposite the mask", "zero rows", "a zero mask"])
def test_slerp_and_its_gradients_are_finite_for_degenerate_embeddings(degenerate):
    e = EMBEDDING[MASK]
    embedding = {
        "coincident": jnp.broadcast_to(e, (64, 8)),
        "antipodal": jnp.where(jnp.arange(64)[:, None] % 2, e, -e),
        "opposite the mask": jnp.broadcast_to(-e, (64, 8)).at[MASK].set(e),
        "zero rows": jnp.zeros((64, 8)).at[MASK].set(e),
        "a zero mask": EMBEDDING.at[MASK].set(0.0),
    }[degenerate]
    logits = jnp.zeros((2, 16, 64))
    for k in (1, 3):
        for amount in (0.0, 1e-6, 0.5, 1.0):
            raw = soft_masking.raw_from_effective(1.0, -100.0, 1.0)
            (_, x), gradients = run(raw, embedding, logits, amount, variant="slerp", k=k)
            assert np.isfinite(x).all()
            assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
            norm = jnp.linalg.norm(embedding[MASK])
            np.testing.assert_allclose(jnp.linalg.norm(x[TOKENS == MASK], axis=-1), norm, rtol=1e-4, atol=1e-6)


def test_slerp_weights_of_orthogonal_rows_are_sine_and_cosine():
    weights = jax.jit(slerp_weights)(jnp.eye(2) * 4.0, jnp.ones(1), jnp.asarray(1 / 3))
    np.testing.assert_allclose(weights, [np.cos(np.pi / 6), np.sin(np.pi / 6)], rtol=1e-6)
