"""MDLM's ancestral sampler against recorded traces, and what every row may rely on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import objective, vocab_head
from softmask_jax.samplers import Ancestral, ancestral_step, recorded_gumbel
from tests import golden_model
from tests.golden import load, meta

TRACES = (
    "mdlm_dit/generate_mdlm.npz",
    "mdlm_dit/generate_mdlm_48steps_bs1.npz",
    "mdlm_dit/generate_mdlm_nucleus.npz",
)
LENGTH = 32


def masks(rows: int) -> jax.Array:
    return jnp.full((rows, LENGTH), golden_model.MASK, jnp.int32)


@functools.cache
def sampler(variant: str = "topk", **options):
    model = golden_model.model(variant)
    return jax.jit(Ancestral(model, objective.Nelbo(variant=variant, k=3), trajectory=True, **options))


@pytest.mark.parametrize("name", TRACES)
def test_tokens_and_network_calls_match_the_recorded_trace(name):
    z, about = load(name), meta(name)
    run = sampler(steps=about["steps"], nucleus_p=about["sampling"]["p_nucleus"], eps=about["eps"], reuse="reference")
    gumbel = jnp.asarray(recorded_gumbel(z["uniform"]), jnp.float32)
    out = run(golden_model.params(), jax.random.split(jax.random.key(0), about["bs"]), masks(about["bs"]), gumbel)
    assert int(out.calls) == len(z["x_at_each_forward"])
    np.testing.assert_array_equal(np.asarray(out.trajectory)[np.asarray(out.called)], z["x_at_each_forward"])
    np.testing.assert_array_equal(out.tokens, z["final"])


STEPS = [case for case in meta("samplers.npz")["cases"] if case["sampler"] == "mdlm"]


@functools.cache
def one_step(nucleus_p: float):
    """x_s from recorded log-probabilities: with an identity head the hidden states are the logits."""
    about = meta("samplers.npz")
    log_p = jnp.asarray(load("samplers.npz")["log_p_x0"])
    vocab_size = log_p.shape[-1]
    head = vocab_head.Head(jnp.eye(128, vocab_size), None, vocab_size, about["mask_index"], True)

    def step(tokens, gumbel, t, s):
        sweep = vocab_head.sweep(log_p, head, k=3, draw=vocab_head.Draw(gumbel=gumbel, nucleus_p=nucleus_p))
        mask_noise = gumbel[..., about["mask_index"]]
        return ancestral_step(tokens, sweep, t, s, mask_noise, mask_token_id=about["mask_index"])

    return jax.jit(step)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case["name"])
def test_one_step_from_recorded_predictions_matches(case):
    z, name = load("samplers.npz"), case["name"]
    gumbel = jnp.asarray(recorded_gumbel(z[f"{name}/u"]), jnp.float32)
    tokens, t = jnp.asarray(z["x"], jnp.int32), case["t"]
    out = one_step(case["p_nucleus"])(tokens, gumbel, t, t - case["dt"])
    np.testing.assert_array_equal(out, z[f"{name}/xs"])


@functools.cache
def free_run():
    keys = jax.random.split(jax.random.key(7), 4)
    return keys, sampler(steps=6)(golden_model.params(), keys, masks(4))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    keys, whole = free_run()
    part = sampler(steps=6)(golden_model.params(), keys[2:], masks(2))
    np.testing.assert_array_equal(whole.tokens[2:], part.tokens)


def test_no_mask_is_left_and_what_was_unmasked_stays():
    _, out = free_run()
    assert not np.any(out.tokens == golden_model.MASK)
    seen = np.concatenate([out.trajectory, out.tokens[None]])
    for before, after in zip(seen, seen[1:]):
        kept = before != golden_model.MASK
        np.testing.assert_array_equal(before[kept], after[kept])


def test_given_tokens_are_kept():
    keys, _ = free_run()
    tokens = masks(4).at[:, ::3].set(5)
    out = sampler(steps=6)(golden_model.params(), keys, tokens)
    assert np.all(np.asarray(out.tokens)[:, ::3] == 5)


def test_the_share_of_masks_left_follows_the_time_grid():
    steps, rows = 6, 64
    keys = jax.random.split(jax.random.key(1), rows)
    seen = np.asarray(sampler(steps=steps)(golden_model.params(), keys, masks(rows)).trajectory)
    left = (seen == golden_model.MASK).mean((1, 2))
    np.testing.assert_allclose(left, np.linspace(1, 0, steps + 1), atol=0.05)


def test_exact_reuse_saves_calls_only_without_soft_masking_and_changes_nothing():
    keys = jax.random.split(jax.random.key(7), 1)
    params = golden_model.params()
    exact, never = (sampler("none", steps=60, reuse=reuse)(params, keys, masks(1)) for reuse in ("exact", "never"))
    np.testing.assert_array_equal(exact.tokens, never.tokens)
    assert int(exact.calls) < int(never.calls) == 61
    assert int(sampler(steps=60)(params, keys, masks(1)).calls) == 61


def test_soft_masking_changes_what_is_sampled():
    keys, soft = free_run()
    binary = sampler("none", steps=6)(golden_model.params(), keys, masks(4))
    assert np.any(soft.tokens != binary.tokens)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="choose one of exact"):
        Ancestral(golden_model.model(), objective.Nelbo(), reuse="always")
    with pytest.raises(ValueError, match="at least 1 step"):
        Ancestral(golden_model.model(), objective.Nelbo(), steps=0)
    with pytest.raises(ValueError, match="nucleus_p"):
        Ancestral(golden_model.model(), objective.Nelbo(), nucleus_p=0.0)
    with pytest.raises(ValueError, match=r"\[steps B L V\]"):
        sampler(steps=6)(golden_model.params(), jax.random.split(jax.random.key(0), 2), masks(2), jnp.zeros((5, 2, 32, 98)))
