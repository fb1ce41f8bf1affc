"""Block decoding against recorded histories of Fast-dLLM and a plain loop, and what every row may rely on."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.draws import Draws
from tests.golden import load, meta
from tests.helpers import plain_blocks
from tests.helpers.dream_model import MASK, VOCAB
from tests.helpers.blocks import SCALARS, SOFT, compared, model, params, rows, run, sampler, with_bias

QUICK = ("dream_generate/fastdllm_dual_entropy.npz", "dream_generate/fastdllm_prefix_thr0.25.npz")
MORE = (
    "dream_generate/fastdllm_dual_thr0.25.npz",
    "dream_generate/fastdllm_dual_thr0.9.npz",
    "dream_generate/fastdllm_prefix_entropy.npz",
    "dream_generate/fastdllm_prefix_entropy_s16.npz",
    "dream_generate/fastdllm_prefix_maskgit_IGNORED.npz",
    "dream_generate/fastdllm_prefix_thr0.9.npz",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_the_history_is_the_recorded_one(name):
    z, about = load(name), meta(name)
    options = {"cache": "dual" if about["dual_cache"] else "prefix", "threshold": about.get("threshold", 0.9)}
    this = BlockSampler(model(), prompt_length=8, block_length=8, steps=32 if "s16" not in name else 16,
                        alg=about["alg"], compat="IGNORED" in name, **options)
    out = run(this, np.pad(z["prompt"], ((0, 0), (0, 32)), constant_values=MASK))
    assert int(out.calls) == int(out.steps) == int(out.row_calls[0]) == len(z["history"])
    np.testing.assert_array_equal(out.history[: len(z["history"])], z["history"])
    np.testing.assert_array_equal(out.tokens, z["final"])
    assert int(out.filled[0]) == 32 and np.isclose(out.tokens_per_call[0], 32 / len(z["history"]))
    # Of three blocks left `prefix` computes four; `dual` computes what the reference does.
    more = 0 if about["dual_cache"] else 8 * (z["query_lens"] == 24).sum()
    assert float(out.positions[0]) == z["query_lens"].sum() + more


# The plain loop


@pytest.mark.parametrize("options", [
    {"cache": "dual", "alg": "confidence_threshold", "threshold": 0.2, "soft_mask": SOFT, "temperature": 0.7},
    {"cache": "prefix", "alg": "topk_margin", "soft_mask": SoftMask("topk", 1, "linear"), "full_call": "rule"},
    {"cache": "none", "alg": "entropy", "steps": 9, "soft_mask": SoftMask("topk", 2, "stepwise"), "alg_temp": 0.5},
    *(pytest.param(options, marks=pytest.mark.full) for options in (
        {"cache": "none", "alg": "maskgit_plus", "compat": True, "top_p": 0.8, "top_k": None, "temperature": 1.2},
        {"cache": "none", "alg": "confidence_factor", "factor": 1.7, "full_call": "rule", "soft_mask": SOFT},
        {"cache": "prefix", "alg": "confidence_threshold", "threshold": 0.15, "soft_mask": SOFT},
        {"cache": "prefix", "alg": "entropy", "soft_mask": SoftMask("topk", 3, "linear"), "temperature": 0.5},
        {"cache": "dual", "alg": "maskgit_plus", "tokens_per_step": 2, "temperature": 0.9, "alg_temp": 0.3,
         "suppress_mask": True},
        {"cache": "dual", "alg": "topk_margin", "steps": 12, "full_call": "rule", "soft_mask": SOFT, "compat": True},
    )),
])  # fmt: skip
def test_the_compiled_loop_is_the_plain_loop(options):
    compared(sampler(**options))


@pytest.mark.parametrize("cache", ("dual", pytest.param("none", marks=pytest.mark.full),
                                   pytest.param("prefix", marks=pytest.mark.full)))  # fmt: skip
def test_rows_that_came_to_an_end_token_stop(cache):
    free = sampler(cache=cache, alg="entropy", temperature=1.0)
    first = compared(free)
    # What the rows say in their first and second block ends them, in another order of tokens.
    ends = tuple(sorted({int(first.tokens[0, 5]), int(first.tokens[1, 7])} - {MASK}))
    out = compared(dataclasses.replace(free, stop_at_end=True, constraints=Constraints(end_token_ids=ends)))
    assert int(out.calls) <= int(first.calls) and int(out.row_calls[0]) < int(first.row_calls[0])
    behind = 1 + int(np.argmax(np.isin(out.tokens[0], ends) & (np.arange(14) > 2)))
    assert MASK not in np.asarray(out.tokens[0, behind:])
    assert int(out.filled[0]) < int(first.filled[0])


# Rows


def answered(which, width: int, cache: str):
    """The rows `which`, padded on the left to prompts of `width` tokens."""
    prompts, keys = [[5, 9, 17], [40], [3, 1, 4, 1, 5]], jax.random.split(jax.random.key(8), 3)
    tokens, attended = np.full((len(which), width + 10), MASK), np.ones((len(which), width + 10), np.int32)
    for i, row in enumerate(which):
        start = width - len(prompts[row])
        tokens[i, :start], attended[i, :start], tokens[i, start:width] = 199, 0, prompts[row]
    options = {"temperature": 0.8, "top_p": 0.9, "threshold": 0.1, "alg_temp": 0.5, "soft_mask": SOFT}
    this = sampler(cache=cache, prompt_length=width, **options)
    return run(this, tokens, attended, keys[np.asarray(which)])


@pytest.mark.full
@pytest.mark.parametrize("cache", ("dual", pytest.param("prefix", marks=pytest.mark.full),
                                   pytest.param("none", marks=pytest.mark.full)))  # fmt: skip
def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(cache):
    whole = answered((0, 1, 2), 5, cache)
    for row in range(3):
        alone = answered((row,), 8, cache)
        np.testing.assert_array_equal(alone.tokens[0, -10:], whole.tokens[row, -10:])
        assert int(alone.calls) == int(alone.row_calls[0]) == int(whole.row_calls[row])
    assert len({tuple(row) for row in np.asarray(whole.tokens[:, -10:])}) == 3
    assert int(whole.row_calls.min()) < int(whole.calls)  # a row waited for another
    np.testing.assert_array_equal(whole.tokens[1, :5], [199] * 4 + [40])


def test_given_tokens_where_a_block_begins_do_not_move_it():
    tokens = rows()[:2]
    tokens[0] = tokens[1]  # both rows have a token where the first block begins
    this = sampler(cache="dual", alg="entropy", soft_mask=SOFT)
    plain = plain_blocks.decode(this, SCALARS, tokens[0])
    out = run(this, tokens)
    np.testing.assert_array_equal(out.history[: int(out.calls), 0], plain.history)


def test_rows_and_blocks_without_masks_cost_nothing():
    tokens = rows()
    tokens[0] = 7
    tokens[:2, 7:11] = 9
    this = sampler(cache="dual", alg="maskgit_plus", tokens_per_step=4, suppress_mask=True, full_call="rule")
    out = run(this, tokens)
    np.testing.assert_array_equal(out.tokens[0], tokens[0])
    np.testing.assert_array_equal(out.row_calls, [0, 2, 2])
    assert int(out.calls) == 2  # the block in the middle is passed over
    np.testing.assert_array_equal(out.positions, [0, 28, 28])
    np.testing.assert_array_equal(out.filled, (tokens == MASK)[:, 3:].sum(-1))


def test_one_step_a_block_leaves_no_mask():
    this = sampler(alg="entropy", steps=3, suppress_mask=True)
    out = run(this, rows())
    assert int(out.calls) == 3 and MASK not in np.asarray(out.tokens)[:, 3:]
    assert this.most_calls(14) == 3 and out.history.shape == (3, 3, 14)


# Nothing hangs


@pytest.mark.parametrize("options", [
    {"alg": "confidence_threshold", "cache": "dual"},
    *(pytest.param({"alg": alg, "cache": cache}, marks=pytest.mark.full)
      for alg, cache in (("confidence_factor", "prefix"), ("confidence_threshold", "none"), ("entropy", "dual"))),
])  # fmt: skip
def test_a_model_that_only_predicts_the_mask_comes_to_an_end(options):
    this = sampler(with_bias(1e6), temperature=1.0, **options)
    out = run(this, rows(), keys=jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(out.tokens, rows())
    np.testing.assert_array_equal(out.filled, 0)
    # A full call and one more a block; a grid takes its four.
    assert int(out.calls) == (12 if options["alg"] == "entropy" else 6)


def test_masks_that_are_predicted_take_no_tokens_place():
    # The mask is predicted here and there, and more surely than any token.
    this = sampler(with_bias(2.0), alg="confidence_threshold", threshold=1.0, cache="dual")
    out = compared(this, mask_bias=2.0)
    masks = (np.asarray(out.tokens) == MASK)[:, 3:].sum()
    assert 0 < masks < (rows() == MASK)[:, 3:].sum() - 3, masks


@pytest.mark.parametrize("options", [
    {"alg": "confidence_threshold", "threshold": 1.0, "cache": "dual"},
    pytest.param({"alg": "entropy", "cache": "prefix", "soft_mask": SOFT}, marks=pytest.mark.full),
])  # fmt: skip
def test_nan_is_reported_and_comes_to_an_end(options):
    weights = {**params(), "backbone": {**params()["backbone"], "final_norm": {"scale": jnp.full(64, jnp.nan)}}}
    out = run(sampler(**options), rows(), weights=weights)
    assert not out.finite.any() and int(out.calls) <= sampler(**options).most_calls(14)
    given = rows() != MASK
    np.testing.assert_array_equal(np.asarray(out.tokens)[given], rows()[given])


@pytest.mark.full
def test_a_threshold_that_nobody_reaches_commits_one_token_a_call():
    out = run(sampler(alg="confidence_threshold", threshold=1.0, cache="dual", suppress_mask=True), rows())
    np.testing.assert_array_equal(out.row_calls, (rows() == MASK)[:, 3:].sum(-1))


@pytest.mark.full
def test_forbidden_tokens_are_not_drawn():
    free = run(sampler(cache="dual", alg="entropy"), rows())
    words = tuple(sorted(set(np.asarray(free.tokens)[0, 3:].tolist()) - {MASK}))
    out = run(sampler(cache="dual", alg="entropy", constraints=Constraints(words)), rows())
    assert not np.isin(np.asarray(out.tokens)[rows() == MASK], words).any()


# Bad input


@pytest.mark.parametrize("options, says", [
    ({"block_length": 0}, "block_length cannot be 0"), ({"cache": "all"}, "cache is 'all'; choose one of none, prefix"),
    ({"alg": "origin"}, "alg is 'origin'; choose one of confidence_threshold"),
    ({"full_call": "-"}, "full_call is '-'"),
    ({"steps": 0}, "at least 1 step, not 0"), ({"prompt_length": -1}, "prompt_length"),
    ({"threshold": 1.1}, "threshold"),
    ({"alg": "confidence_factor", "factor": 0.0}, "factor must be above 0"),
    ({"alg": "entropy", "tokens_per_step": 0}, "at least 1 token"),
    ({"alg": "entropy", "eps": 0.0}, "eps"), ({"alg": "entropy", "alg_temp": -1.0}, "alg_temp"),
    ({"tokens_per_step": 1}, "leave tokens_per_step out"), ({"temperature": -1.0}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"top_k": 0}, "top_k"), ({"stop_at_end": True}, "which tokens end a text"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        BlockSampler(model(), **options)


@pytest.mark.parametrize("options, change, says", [
    ({"alg": "entropy", "steps": 2}, {}, "2 steps are too few for 3 blocks"),
    ({}, {"tokens": np.ones((2, 14), int)}, "Nothing to generate"),
    ({}, {"tokens": np.where(np.arange(14) < 3, MASK, 1)[None]}, "Nothing to generate"),
    ({"constraints": Constraints(end_token_ids=(MASK,))}, {}, "cannot be what ends a text"),
    ({"constraints": Constraints(end_token_ids=(VOCAB,))}, {}, "does not exist"),
    ({}, {"tokens": rows()[0]}, r"tokens must be \[B L\]"),
    ({"prompt_length": 14}, {}, "first block begins at 14"),
    ({}, {"attention_mask": np.ones((3, 3))}, "attention_mask must be"),
    ({"temperature": 1.0}, {}, "pass keys"),
    ({"alg": "entropy", "alg_temp": 1.0}, {}, "pass keys"),
    ({"temperature": 1.0}, {"keys": jax.random.split(jax.random.key(0), 2)}, "keys must be"),
    ({"temperature": 1.0}, {"draws": Draws(gumbel=jnp.zeros((4, 3, 14, VOCAB)))}, "draws.gumbel must have the shape"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(options, change, says):
    given = {"keys": None, "tokens": rows(), "attention_mask": None, "draws": None, **change}
    with pytest.raises(ValueError, match=says):
        sampler(**options)(params(), **given)
