"""MDLM's and ReMDM's samplers against recorded traces and a plain loop, and what every row may rely on."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking
from softmask_jax.samplers import Constraints, MDLMSampler, SoftMask, recorded_gumbel, transitions
from tests.golden import load, meta
from tests.helpers import dream_denoiser, golden_model
from tests.helpers.plain_mdlm import dense_loop

QUICK = (
    "mdlm_dit/generate_mdlm.npz",
    "mdlm_dit/generate_remdm_cap.npz",
)
MORE = (
    "mdlm_dit/generate_mdlm_48steps_bs1.npz",
    "mdlm_dit/generate_mdlm_nucleus.npz",
    "mdlm_dit/generate_remdm_loop.npz",
)
LENGTH = 32


def masks(rows: int) -> jax.Array:
    return jnp.full((rows, LENGTH), golden_model.MASK, jnp.int32)


@functools.cache
def sampler(variant: str = "topk", schedule: str = "none", **options):
    soft_mask = SoftMask(variant, k=3, schedule=schedule)
    return jax.jit(MDLMSampler(golden_model.model(variant), soft_mask, history=True, trace=True, **options))


def recorded_transition(sampling: dict):
    if sampling["sampler"] == "remdm-cap":
        return transitions.RemdmCap(sampling["eta"])
    if sampling["sampler"] == "remdm-loop":
        return transitions.RemdmLoop(**{key: sampling[key] for key in ("eta", "t_on", "t_off", "alpha_on")})
    return transitions.Mdlm()


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_tokens_and_network_calls_match_the_recorded_trace(name):
    z, about = load(name), meta(name)
    run = sampler(steps=about["steps"], nucleus_p=about["sampling"]["p_nucleus"], eps=about["eps"], reuse="compat",
                  transition=recorded_transition(about["sampling"]))
    gumbel = jnp.asarray(recorded_gumbel(z["uniform"]), jnp.float32)
    rows = about["bs"]
    out = run(golden_model.params(), jax.random.split(jax.random.key(0), rows), masks(rows), None, gumbel)
    assert int(out.calls) == len(z["x_at_each_forward"])
    assert np.all(out.row_calls == out.calls) and np.all(out.filled == LENGTH)
    np.testing.assert_array_equal(np.asarray(out.trace.tokens)[np.asarray(out.trace.called)], z["x_at_each_forward"])
    np.testing.assert_array_equal(out.trace.tokens[1:], out.history[:-1])
    np.testing.assert_array_equal(out.tokens, z["final"])


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
    seen = np.concatenate([out.trace.tokens, out.tokens[None]])
    for before, after in zip(seen, seen[1:]):
        kept = before != golden_model.MASK
        np.testing.assert_array_equal(before[kept], after[kept])


def test_given_tokens_are_kept():
    keys, _ = free_run()
    tokens = masks(4).at[:, ::3].set(5)
    out = sampler(steps=6)(golden_model.params(), keys, tokens)
    assert np.all(np.asarray(out.tokens)[:, ::3] == 5)


@pytest.mark.full
def test_the_share_of_masks_left_follows_the_time_grid():
    steps, rows = 6, 64
    keys = jax.random.split(jax.random.key(1), rows)
    seen = np.asarray(sampler(steps=steps)(golden_model.params(), keys, masks(rows)).trace.tokens)
    left = (seen == golden_model.MASK).mean((1, 2))
    np.testing.assert_allclose(left, np.linspace(1, 0, steps + 1), atol=0.05)


@pytest.mark.full
def test_exact_reuse_saves_calls_only_without_soft_masking_and_changes_nothing():
    keys = jax.random.split(jax.random.key(7), 1)
    params = golden_model.params()
    exact, never = (sampler("none", steps=60, reuse=reuse)(params, keys, masks(1)) for reuse in ("exact", "never"))
    np.testing.assert_array_equal(exact.tokens, never.tokens)
    assert int(exact.calls) < int(never.calls) == 61
    soft = sampler(steps=60)(params, keys, masks(1))
    unfilled = (np.asarray(soft.trace.tokens) == golden_model.MASK).any((1, 2)).sum()
    assert int(exact.calls) < int(soft.calls) == unfilled


@pytest.mark.full
def test_soft_masking_changes_what_is_sampled():
    keys, soft = free_run()
    binary = sampler("none", steps=6)(golden_model.params(), keys, masks(4))
    assert np.any(soft.tokens != binary.tokens)


def test_calls_are_counted_for_each_row_and_made_only_while_a_mask_is_left():
    tokens = masks(4).at[0, 2:].set(5)
    keys, _ = free_run()
    out = sampler(steps=6)(golden_model.params(), keys, tokens)
    left = (np.asarray(out.trace.tokens) == golden_model.MASK).any(-1)
    np.testing.assert_array_equal(out.row_calls, left.sum(0))
    assert int(out.calls) == left.any(1).sum() and int(out.row_calls[0]) < 7
    np.testing.assert_array_equal(out.filled, [2, LENGTH, LENGTH, LENGTH])
    np.testing.assert_allclose(out.tokens_per_call, np.array([2, LENGTH, LENGTH, LENGTH]) / left.sum(0))
    np.testing.assert_array_equal(out.positions, left.sum(0) * LENGTH)


LOOPS = {
    "mdlm": dict(variant="none"),
    "mdlm, topk, nucleus": dict(nucleus_p=0.9),
    "cap, topk": dict(transition=transitions.RemdmCap(0.4)),
    "rescale, full": dict(transition=transitions.RemdmRescale(0.5), variant="full"),
    "rescale, hidden": dict(transition=transitions.RemdmRescale(0.5), variant="hidden"),
    "conf, topk": dict(transition=transitions.RemdmConf()),
    "conf, none": dict(transition=transitions.RemdmConf(), variant="none", nucleus_p=0.9),
    "loop, full": dict(transition=transitions.RemdmLoop(0.3, 0.7, 0.2, 0.6), variant="full"),
}


QUICK_LOOPS = ("rescale, full", "rescale, hidden", "conf, topk")


@pytest.mark.parametrize("options", [
    pytest.param(options, id=name, marks=() if name in QUICK_LOOPS else pytest.mark.full)
    for name, options in LOOPS.items()
])  # fmt: skip
def test_the_compiled_loop_is_the_plain_loop(options):
    steps, rows = 7, 2
    rng = np.random.default_rng(5)
    gumbel = recorded_gumbel(rng.random((steps, rows, LENGTH, golden_model.VOCAB)))
    run, params = sampler(steps=steps, **options), golden_model.params()
    if options.get("variant") == "hidden":
        projection = 0.5 * rng.standard_normal((64, 64)).astype(np.float32)
        params = params | {"soft_mask": params["soft_mask"] | {"projection": jnp.asarray(projection)}}
    keys = jax.random.split(jax.random.key(0), rows)
    out = run(params, keys, masks(rows), None, jnp.asarray(gumbel, jnp.float32))
    np.testing.assert_array_equal(out.tokens, dense_loop(run.__wrapped__, params, masks(rows), gumbel))
    assert np.all(out.finite)


def test_re_masking_samplers_mask_tokens_again_but_never_given_ones():
    tokens = masks(4).at[:, :8].set(jnp.arange(8))
    keys, _ = free_run()
    out = sampler(steps=7, transition=transitions.RemdmCap(0.4))(golden_model.params(), keys, tokens)
    seen = np.concatenate([out.trace.tokens, out.tokens[None]])
    assert ((seen[:-1] != golden_model.MASK) & (seen[1:] == golden_model.MASK)).any()
    assert np.all(seen[:, :, :8] == np.arange(8)) and not np.any(seen[-1] == golden_model.MASK)


@pytest.mark.full
@pytest.mark.parametrize("options", [
    dict(), pytest.param(dict(transition=transitions.RemdmCap(0.4), variant="full"), marks=pytest.mark.full)
], ids=["mdlm", "cap"])  # fmt: skip
def test_padding_behind_a_row_or_before_it_changes_nothing(options):
    keys, steps = free_run()[0][:2], 7 if options else 6
    run, length = sampler(steps=steps, **options), 20
    short = run(golden_model.params(), keys, masks(2)[:, :length])
    for real in (jnp.arange(LENGTH) < length, jnp.arange(LENGTH) >= LENGTH - length):
        padded = run(golden_model.params(), keys, masks(2), jnp.broadcast_to(real, (2, LENGTH)).astype(jnp.int32))
        np.testing.assert_array_equal(padded.tokens[:, real], short.tokens)
        assert np.all(padded.tokens[:, ~real] == golden_model.MASK)
        np.testing.assert_array_equal(padded.filled, [length] * 2)


@pytest.mark.full
def test_a_network_that_may_predict_the_mask_leaves_none():
    dream, params = dream_denoiser.model(), dream_denoiser.params()

    def head(backbone):
        likely = jnp.zeros(backbone["head"]["weight"].shape[0]).at[dream.mask_token_id].set(8.0)
        return dataclasses.replace(dream.head(backbone), bias=likely)

    tokens = jnp.full((2, 12), dream.mask_token_id)
    part = MDLMSampler(dataclasses.replace(dream, head=head), SoftMask("topk", 3), steps=4)
    out = jax.jit(part)(params, jax.random.split(jax.random.key(0), 2), tokens)
    assert not np.any(out.tokens == dream.mask_token_id) and np.all(out.filled == 12)


@pytest.mark.full
def test_forbidden_tokens_never_appear_and_a_penalty_makes_ends_rare():
    keys = jax.random.split(jax.random.key(3), 16)
    params = golden_model.params()
    plain = np.asarray(sampler(steps=6)(params, keys, masks(16)).tokens)
    common = tuple(int(i) for i in np.bincount(plain.ravel()).argsort()[-40:])
    out = sampler(steps=6, constraints=Constraints(forbidden=common))(params, keys, masks(16))
    assert not np.isin(out.tokens, common).any()
    few = sampler(steps=6, constraints=Constraints(end_token_ids=common[-3:], end_penalty=3.0))(params, keys, masks(16))
    assert np.isin(few.tokens, common[-3:]).sum() < np.isin(plain, common[-3:]).sum() / 3


def test_a_row_of_nan_is_reported_and_leaves_the_others_alone():
    keys, whole = free_run()
    params = golden_model.params()
    tokens = masks(4).at[1, 0].set(98)  # a row of the table that belongs to no token
    table = params["backbone"]["embed"]["table"].at[98].set(jnp.nan)
    broken = {**params, "backbone": {**params["backbone"], "embed": {"table": table}}}
    out = sampler(steps=6)(broken, keys, tokens)
    np.testing.assert_array_equal(out.finite, [True, False, True, True])
    np.testing.assert_array_equal(out.tokens[2:], whole.tokens[2:])


def test_a_trace_holds_what_the_masks_carried():
    _, out = free_run()
    trace = out.trace
    masked = np.asarray(trace.tokens) == golden_model.MASK
    assert not np.any(trace.weight[0]) and np.all(np.asarray(trace.weight)[~masked] == 0)
    assert np.all(np.asarray(trace.weight)[1:][masked[1:]] > 0)
    np.testing.assert_allclose(np.asarray(trace.shares)[1:].sum(-1), 1, atol=1e-6)
    scalars = soft_masking.effective(golden_model.params()["soft_mask"])
    # A mask's lambda is that of the entropy of the step before.
    expected = soft_masking.mix_weight(trace.neg_entropy[:-1], scalars)
    kept = masked[1:] & masked[:-1]
    np.testing.assert_allclose(np.asarray(trace.weight)[1:][kept], np.asarray(expected)[kept], rtol=1e-5)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(reuse="always"), "choose one of exact"),
        (dict(steps=0), "at least 1 step"),
        (dict(nucleus_p=0.0), "nucleus_p"),
        (dict(temperature=0.0), "temperature must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        MDLMSampler(golden_model.model(), **options)


def test_inputs_that_do_not_fit_are_refused():
    part, params, keys = MDLMSampler(golden_model.model(), steps=6), golden_model.params(), free_run()[0]
    with pytest.raises(ValueError, match=r"\[steps B L V\]"):
        part(params, keys[:2], masks(2), None, jnp.zeros((5, 2, 32, 98)))
    with pytest.raises(ValueError, match="Nothing to generate"):
        part(params, keys[:1], jnp.zeros((1, 4), jnp.int32))
    for wrong in (None, keys[:3]):
        with pytest.raises(ValueError, match="one a row"):
            part(params, wrong, masks(2))
    with pytest.raises(ValueError, match="attention_mask must be"):
        part(params, keys[:1], masks(1), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="Token 98 does not exist"):
        MDLMSampler(golden_model.model(), constraints=Constraints(forbidden=(98,)))(params, keys[:1], masks(1))
    with pytest.raises(ValueError, match="Every token is forbidden"):
        MDLMSampler(golden_model.model(), constraints=Constraints(tuple(range(98))))(params, keys[:1], masks(1))
