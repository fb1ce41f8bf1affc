"""Dream's sampler against recorded histories and a plain loop, and what every row may rely on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.samplers import Draws, DreamSampler, SoftMask, diffusion_generate, soft_mask_from
from softmask_jax.samplers.commit import surest, unmask_shares
from softmask_jax.samplers.dream import ALGORITHMS
from tests.helpers.dense_feedback import feedback_from_logits
from tests.helpers.dream_denoiser import PAD, logits, model, params, recorded, unequal_rows
from tests.helpers.dream_model import MASK, VOCAB
from tests.samplers.test_dream_draw import softmax, sorted_filter

QUICK = (
    "dream_generate/origin_s6.npz",
    "dream_generate/maskgit_plus_s6.npz",
    "dream_generate/topk_margin_s16_leftpad.npz",
    "dream_generate/sm_topk3_entropy_s16_leftpad.npz",
    "dream_generate/sm_temp_entropy_s16_linear_FIXED.npz",
)
MORE = (
    "dream_generate/entropy_s16_leftpad.npz",
    "dream_generate/entropy_s6.npz",
    "dream_generate/maskgit_plus_s16.npz",
    "dream_generate/maskgit_plus_s16_leftpad.npz",
    "dream_generate/origin_s16.npz",
    "dream_generate/sm_temp_maskgit_plus_s16.npz",
    "dream_generate/sm_temp_topk_margin_s6.npz",
    "dream_generate/sm_topk1_entropy_s16.npz",
    "dream_generate/sm_topk1_entropy_s6.npz",
    "dream_generate/sm_topk1_maskgit_plus_s16.npz",
    "dream_generate/sm_topk1_maskgit_plus_s6.npz",
    "dream_generate/sm_topk1_topk_margin_s16.npz",
    "dream_generate/sm_topk1_topk_margin_s6.npz",
    "dream_generate/sm_topk3_entropy_s16.npz",
    "dream_generate/sm_topk3_entropy_s16_linear_FIXED.npz",
    "dream_generate/sm_topk3_entropy_s16_stepwise_FIXED.npz",
    "dream_generate/sm_topk3_entropy_s6.npz",
    "dream_generate/sm_topk3_maskgit_plus_s16.npz",
    "dream_generate/sm_topk3_maskgit_plus_s16_linear_FIXED.npz",
    "dream_generate/sm_topk3_maskgit_plus_s16_stepwise_FIXED.npz",
    "dream_generate/sm_topk3_maskgit_plus_s6.npz",
    "dream_generate/sm_topk3_origin_s16.npz",
    "dream_generate/sm_topk3_topk_margin_s16.npz",
    "dream_generate/sm_topk3_topk_margin_s6.npz",
    "dream_generate/topk_margin_s16.npz",
    "dream_generate/topk_margin_s6.npz",
)
ALONE = ("dream_generate/unequal_masks_row0_alone.npz", "dream_generate/unequal_masks_row1_alone.npz")
# A prediction was the mask, so one row had more masks left than the other: from there on the reference, which counts
# the mean over the batch, decodes too few in one row and turns tokens of the other back into masks.
PARTING = (
    "dream_generate/sm_temp_entropy_s16.npz",
    "dream_generate/sm_temp_entropy_s16_stepwise_FIXED.npz",
    "dream_generate/sm_temp_entropy_s6.npz",
    "dream_generate/sm_temp_maskgit_plus_s6.npz",
    "dream_generate/sm_temp_topk_margin_s16.npz",
)
PARTING_WITHOUT_SOFT_MASKING = (
    "dream_generate/entropy_s16.npz",
    "dream_generate/entropy_s24_more_steps_than_tokens.npz",
    "dream_generate/unequal_masks_entropy_s16.npz",
)
SOFT = SoftMask("topk", 3)


@functools.cache
def replay(name: str):
    z, options, soft_mask = recorded(name)
    return z, diffusion_generate(model(), params(), z["prompt"], soft_mask=soft_mask, **options)


@pytest.mark.parametrize("name", [*QUICK, *ALONE, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_the_history_is_the_recorded_one(name):
    z, out = replay(name)
    np.testing.assert_array_equal(out.history, z["history"])
    np.testing.assert_array_equal(out.tokens, z["final"])
    assert int(out.calls) == len(z["history"])
    assert "n_embeds_forwards" not in z or int(out.calls) == int(z["n_embeds_forwards"]) + 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in PARTING])
def test_the_history_is_the_recorded_one_as_long_as_rows_have_as_many_masks(name):
    z, out = replay(name)
    masks = (np.concatenate([z["x_init"][None], z["history"]]) == MASK).sum(-1)
    parted = int(np.argmax(masks.min(-1) != masks.max(-1)))
    assert parted >= 4
    np.testing.assert_array_equal(out.history[:parted], z["history"][:parted])


@pytest.mark.parametrize("name", PARTING_WITHOUT_SOFT_MASKING)
def test_with_the_references_mean_of_the_masks_every_recorded_step_is_reproduced(name):
    z, options, _ = recorded(name)
    shares, before = unmask_shares(options["steps"], options["eps"]), z["x_init"]
    for share, after in zip(shares, z["history"]):
        y = np.asarray(logits(model().embed(params()["backbone"], jnp.asarray(before))))
        masked, p = before == MASK, softmax(sorted_filter(y, None, 50))
        confidence = (p * np.log(p + 1e-10)).sum(-1)
        count = int(masked.mean(0, dtype=np.float32).sum() * share)
        ranks = np.argsort(np.argsort(np.where(masked, -confidence, np.inf), -1), -1)
        expected = np.where(masked & (ranks < count), y.argmax(-1), before)
        np.testing.assert_array_equal(after[masked], expected[masked])
        before = after


def test_rows_with_unequal_masks_are_each_decoded_as_if_alone():
    z = [recorded(name)[0] for name in ALONE]
    prompts = np.concatenate([one["prompt"] for one in z])
    options = {"max_new_tokens": 16, "pad_token_id": PAD, "steps": 16, "alg": "entropy"}
    out = diffusion_generate(model(), params(), prompts, **options)
    for row, one in enumerate(z):
        np.testing.assert_array_equal(out.history[:, row], one["history"][:, 0])


def test_soft_inputs_match_the_recorded_ones():
    z, _, settings = recorded("dream_generate/sm_topk3_entropy_s16_leftpad.npz")
    spec, scalars = soft_mask_from(settings)
    feedback = feedback_from_logits(jnp.asarray(z["logits_step0"]), k=3)
    weights = {**params(), "soft_mask": scalars}
    x = two_pass.soft_embed(model(), spec, weights, jnp.asarray(z["history"][0]), feedback)
    np.testing.assert_allclose(x, z["inputs_embeds_step1"], atol=2e-6)


def plain_loop(sampler: DreamSampler, tokens: np.ndarray, draws: Draws) -> np.ndarray:
    """The sampler as a loop in NumPy, rows one by one, without soft-masking: history [steps B L]."""
    history, tokens = [], tokens.copy()
    for step, share in enumerate(unmask_shares(sampler.steps, sampler.eps)):
        y = np.array(logits(model().embed(params()["backbone"], jnp.asarray(tokens))))
        if sampler.suppress_mask:
            y[..., MASK] = -np.inf
        y = sorted_filter(y / (sampler.temperature or 1), sampler.top_p, sampler.top_k)
        drawn = (y + np.asarray(draws.gumbel[step]) if sampler.temperature else y).argmax(-1)
        p = softmax(y)
        top = np.sort(p, -1)
        confidence = {
            "origin": lambda: 0 * top[..., 0],
            "maskgit_plus": lambda: np.take_along_axis(p, drawn[..., None], -1)[..., 0],
            "topk_margin": lambda: top[..., -1] - top[..., -2],
            "entropy": lambda: (p * np.log(p + 1e-10)).sum(-1),
        }[sampler.alg]()
        if sampler.alg_temp:
            confidence = confidence / sampler.alg_temp + np.asarray(draws.order[step])
        for row in range(len(tokens)):
            masks = np.flatnonzero(tokens[row] == MASK)
            if sampler.alg == "origin":
                chosen = masks[np.asarray(draws.coins[step])[row, masks] < share]
            else:
                order = np.argsort(-confidence[row, masks], kind="stable")
                chosen = masks[order[: int(np.float32(len(masks)) * share)]]
            tokens[row, chosen] = drawn[row, chosen]
        history.append(tokens.copy())
    return np.stack(history)


@pytest.mark.parametrize("options", [
    {"alg": "origin", "temperature": 0.9, "top_p": 0.7, "top_k": None},
    {"alg": "topk_margin", "temperature": 0.5, "top_p": 0.9, "top_k": 30, "alg_temp": 0.1},
    *(pytest.param(options, marks=pytest.mark.full) for options in (
        {"alg": "maskgit_plus", "temperature": 1.3, "top_k": 20, "suppress_mask": True},
        {"alg": "entropy", "temperature": 0.1, "top_p": 0.95, "alg_temp": 0.4, "eps": 0.05},
    )),
])  # fmt: skip
def test_the_compiled_loop_is_the_plain_loop(options):
    sampler, tokens = DreamSampler(model(), steps=7, **options), unequal_rows()
    rng = np.random.default_rng(5)
    coins = jnp.asarray(rng.random((7, *tokens.shape)), jnp.float32)
    gumbel = jnp.asarray(rng.gumbel(size=(7, *tokens.shape, VOCAB)), jnp.float32)
    draws = Draws(coins, gumbel, jnp.asarray(rng.gumbel(size=coins.shape), jnp.float32))
    out = jax.jit(sampler)(params(), None, jnp.asarray(tokens), None, draws)
    np.testing.assert_array_equal(out.history, plain_loop(sampler, tokens, draws))


def continued(rows, alg="entropy", pad_multiple=1, **options):
    keys = jax.random.split(jax.random.key(8), 3)
    prompts = [[5, 9, 17], [40], [3, 1, 4, 1, 5, 9, 2, 6]]
    options = {"temperature": 0.8, "top_p": 0.9, "alg_temp": 0.5, "soft_mask": SOFT, "steps": 5, **options}
    return diffusion_generate(model(), params(), [prompts[row] for row in rows], keys[np.asarray(rows)], alg=alg,
                              max_new_tokens=9, pad_token_id=PAD, pad_multiple=pad_multiple, **options)


@pytest.mark.parametrize("alg", ("entropy", pytest.param("origin", marks=pytest.mark.full)))
def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(alg):
    whole = np.asarray(continued((0, 1, 2), alg).tokens)
    np.testing.assert_array_equal(np.asarray(continued((2, 0), alg, 16).tokens)[:, -9:], whole[[2, 0], -9:])
    np.testing.assert_array_equal(whole[0, :8], [PAD] * 5 + [5, 9, 17])
    np.testing.assert_array_equal(whole[2, :8], [3, 1, 4, 1, 5, 9, 2, 6])


@pytest.mark.full
def test_every_row_of_one_key_has_its_own_noise():
    out = diffusion_generate(model(), params(), [[5, 9, 17]] * 3, jax.random.key(1), max_new_tokens=9, pad_token_id=PAD,
                             temperature=1.0, steps=5, alg="entropy", soft_mask=SOFT)
    assert len({tuple(row) for row in np.asarray(out.tokens)}) == 3


def test_with_suppression_no_mask_is_left():
    z = recorded("dream_generate/entropy_s16.npz")[0]
    options = {"max_new_tokens": 16, "pad_token_id": PAD, "steps": 16, "alg": "entropy"}
    run = functools.partial(diffusion_generate, model(), params(), z["prompt"], **options)
    assert np.any(np.asarray(run().tokens) == MASK)
    assert not np.any(np.asarray(run(suppress_mask=True).tokens) == MASK)


def test_no_network_call_is_made_once_nothing_is_masked():
    tokens = jnp.asarray([[1, 2, 3, MASK]])
    sampler = DreamSampler(model(), steps=4, suppress_mask=True)
    coins = jnp.asarray([1.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1) * jnp.ones((4, 1, 4))
    out = jax.jit(sampler)(params(), None, tokens, None, Draws(coins=coins))
    assert int(out.calls) == 2
    assert MASK in np.asarray(out.history[0]) and MASK not in np.asarray(out.history[1])
    np.testing.assert_array_equal(out.history[2:], jnp.broadcast_to(out.tokens, (2, 1, 4)))


def test_padding_that_holds_the_mask_token_is_not_filled():
    tokens = jnp.asarray([[MASK, MASK, 3, 4, MASK, MASK]])
    out = jax.jit(DreamSampler(model(), steps=2, alg="entropy", suppress_mask=True))(
        params(), None, tokens, jnp.asarray([[0, 0, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(out.tokens[0, :4], [MASK, MASK, 3, 4])
    assert MASK not in np.asarray(out.tokens[0, 4:])


def test_positions_drawn_by_alg_temp_follow_the_softmax_of_the_confidence():
    n, confidence = 20_000, jnp.asarray([0.9, 0.5, 0.1, 0.3])
    noise = jax.random.gumbel(jax.random.key(0), (n, 4), mode="high")
    first = surest(jnp.ones((n, 4), bool), confidence / 0.4 + noise, jnp.ones(n, jnp.int32))
    assert (first.sum(-1) == 1).all()
    np.testing.assert_allclose(first.mean(0), softmax(np.asarray(confidence) / 0.4), atol=0.015)


def test_step_zero_unmasks_nothing_with_as_many_steps_as_tokens_and_the_last_at_least_two():
    for masks in (16, 768):
        left, counts = masks, []
        for share in unmask_shares(masks):
            counts.append(int(np.float32(left) * share))
            left -= counts[-1]
        assert counts[0] == 0 and counts[-1] >= 2 and left == 0


def test_a_trace_holds_what_the_masks_carried():
    sampler = DreamSampler(model(), SOFT, steps=6, alg="entropy", trace=True)
    out = jax.jit(sampler)(params(), None, jnp.asarray(unequal_rows()))
    trace, masked = out.trace, np.asarray(out.trace.tokens) == MASK
    assert not np.any(trace.weight[0]) and np.all(np.asarray(trace.weight)[1:][masked[1:]] > 0)
    assert not np.any(np.asarray(trace.weight)[~masked])
    dense = softmax(np.asarray(logits(model().embed(params()["backbone"], trace.tokens[0]))))
    top = np.sort(dense, -1)[..., ::-1][..., :3]
    kept = masked[0] & masked[1]
    np.testing.assert_allclose(np.asarray(trace.shares[1])[kept], (top / top.sum(-1, keepdims=True))[kept], rtol=1e-4)
    entropy = (dense * np.log(dense)).sum(-1)
    np.testing.assert_allclose(np.asarray(trace.neg_entropy[0])[masked[0]], entropy[masked[0]], rtol=1e-4)
    lam = soft_masking.mix_weight(jnp.asarray(entropy), soft_masking.effective(params()["soft_mask"]))
    np.testing.assert_allclose(np.asarray(trace.weight[1])[kept], np.asarray(lam)[kept], rtol=1e-4)
    untraced = jax.jit(DreamSampler(model(), SOFT, steps=6, alg="entropy"))(params(), None, jnp.asarray(unequal_rows()))
    np.testing.assert_array_equal(untraced.tokens, out.tokens)


def test_the_second_step_reads_the_projected_state_of_the_first():
    projection = 0.3 * np.random.default_rng(1).standard_normal((model().embedding(params()["backbone"]).shape[1],) * 2)
    weights = params() | {"soft_mask": params()["soft_mask"] | {"projection": jnp.asarray(projection, jnp.float32)}}
    soft_mask, tokens = SoftMask("hidden", 3), jnp.asarray(unequal_rows())
    out = jax.jit(DreamSampler(model(), soft_mask, steps=2, alg="entropy", suppress_mask=True))(weights, None, tokens)
    before, masked = out.history[0], out.history[0] == MASK
    feedback = two_pass.pass_1(model(), soft_mask, weights, tokens)
    x = two_pass.soft_embed(model(), soft_mask, weights, before, feedback)
    soft, plain = (np.array(logits(x)) for x in (x, model().embed(weights["backbone"], before)))
    soft[..., MASK] = plain[..., MASK] = -np.inf
    np.testing.assert_array_equal(out.tokens, np.where(masked, soft.argmax(-1), before))
    assert np.any(soft.argmax(-1)[masked] != plain.argmax(-1)[masked])


@pytest.mark.parametrize("options, says", [
    ({"alg": "margin"}, "alg is 'margin'; choose one of origin"), ({"steps": 0}, "at least 1 step, not 0"),
    ({"eps": 0.0}, "eps"), ({"alg_temp": -1.0}, "alg_temp"), ({"temperature": -1.0}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": 0}, "top_k"), ({"steps": None}, "needs a number of steps"),
    ({"alg": "confidence_threshold", "threshold": 1.5}, "threshold"), ({"stop_at_end": True}, "end_token_ids"),
    ({"alg": "confidence_factor", "factor": 0.0}, "factor"), ({"tokens_per_step": 2}, "leave tokens_per_step out"),
    ({"alg": "entropy", "tokens_per_step": 0}, "at least 1 token"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, says):
    assert list(ALGORITHMS)[:4] == ["origin", "maskgit_plus", "topk_margin", "entropy"]
    with pytest.raises(ValueError, match=says):
        DreamSampler(model(), **options)


def test_inputs_that_do_not_fit_are_refused():
    sampler, tokens = DreamSampler(model(), steps=2, temperature=1.0, alg="entropy"), jnp.full((2, 4), MASK)
    keys = jax.random.split(jax.random.key(0), 2)
    for args, says in [
        ((keys, tokens[0]), r"tokens must be \[B L\]"), ((keys[:1], tokens), "one a row"),
        ((None, tokens), "pass keys"), ((keys, tokens, jnp.ones((2, 3))), "attention_mask must be"),
        ((keys, tokens * 0), "no token is the mask"),
        ((keys, tokens, None, Draws(gumbel=jnp.zeros((2, 2, 4, 7)))), "draws.gumbel must have"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=says):
            sampler(params(), *args)
