"""Block decoding against recorded histories of Fast-dLLM and a plain loop, and what every row may rely on."""
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.config.sections import Model
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.samplers.blocks import BlockSampler, slice_sizes
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.decoding import Draws
from tests.golden import load, meta
from tests.helpers import dream_model, golden_model, plain_blocks
from tests.helpers.dream_model import MASK, VOCAB
from tests.models.nn import test_splash

QUICK = ("dream_generate/fastdllm_dual_entropy.npz", "dream_generate/fastdllm_prefix_thr0.25.npz")
MORE = (
    "dream_generate/fastdllm_dual_thr0.25.npz",
    "dream_generate/fastdllm_dual_thr0.9.npz",
    "dream_generate/fastdllm_prefix_entropy.npz",
    "dream_generate/fastdllm_prefix_entropy_s16.npz",
    "dream_generate/fastdllm_prefix_maskgit_IGNORED.npz",
    "dream_generate/fastdllm_prefix_thr0.9.npz",
)
SOFT = SoftMask("topk", 3)
SCALARS = soft_masking.init_scalars(scale=0.9, centre=-3, steepness=1.5)


@functools.cache
def model(mesh=None):
    sizes = Model(kind="dream", base="-", compute_dtype="float32", param_dtype="float32", remat="none")
    return dream_denoiser.build(sizes, config.SoftMask(k=1), dream_model.config_json(), mesh=mesh)


@functools.cache
def params() -> dict:
    return {"backbone": dream_model.params(), "soft_mask": SCALARS}


def sampler(denoiser=None, **options) -> BlockSampler:
    return BlockSampler(denoiser or model(), **{"block_length": 4, "steps": 12, "prompt_length": 3, **options})


@functools.cache
def compiled(sampler: BlockSampler):
    return jax.jit(sampler)


def run(sampler, tokens, attention_mask=None, keys=None, draws=None, weights=None):
    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    return compiled(sampler)(weights or params(), keys, jnp.asarray(tokens), mask, draws)


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


def rows(length: int = 14) -> np.ndarray:
    """Three rows that continue 3 tokens: all masked, some given inside blocks, and a whole block given."""
    tokens = np.random.default_rng(4).integers(0, 190, (3, length))
    tokens[0, 3:] = tokens[1, 3:] = tokens[2, 3:] = MASK
    tokens[1, [3, 6, 9]] = [7, 8, 9]
    tokens[2, 7:11], tokens[0, 1] = [4, 5, 6, 7], MASK
    return tokens


def compared(this: BlockSampler, seed: int = 0, mask_bias: float = 0.0):
    """Runs the three rows in one batch with recorded noise, and each alone in the plain loop."""
    tokens = rows()
    shape, rng = (this.most_calls(tokens.shape[1]), *tokens.shape), np.random.default_rng(seed)
    gumbel = rng.gumbel(size=(*shape, VOCAB)).astype(np.float32) if this.temperature else None
    order = rng.gumbel(size=shape).astype(np.float32) if this.alg_temp else None
    out = run(this, tokens, draws=Draws(gumbel=gumbel, order=order))
    for row in range(len(tokens)):
        own = (None if x is None else x[:, row] for x in (gumbel, order))
        plain = plain_blocks.decode(this, SCALARS, tokens[row], 0, *own, mask_bias)
        np.testing.assert_array_equal(out.tokens[row], plain.tokens)
        assert int(out.row_calls[row]) == len(plain.history)
        assert int(out.filled[row]) == plain.filled
        assert float(out.positions[row]) == plain.positions or this.cache == "prefix"
        steps = [after.tolist() for after in np.asarray(out.history[: int(out.steps), row])]
        at = -1
        for after in plain.history:  # others' steps lie between a row's own
            at = steps.index(after.tolist(), max(at, 0))
    assert bool(out.finite.all())
    return out


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


def with_bias(at_mask: float):
    def head(backbone):
        bias = jnp.zeros(backbone["head"]["weight"].shape[0]).at[MASK].set(at_mask)
        return Head(backbone["head"]["weight"], bias, VOCAB, MASK, False)

    return dataclasses.replace(model(), head=head)


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


# The cache


def test_the_first_position_of_a_slice_is_predicted_from_the_state_before_it():
    # Only where the full call predicts the mask for a block's first token does a slice predict it again.
    @jax.jit
    def margins(tokens):
        hidden = model().trunk(params()["backbone"], model().embed(params()["backbone"], tokens))[0]
        y = dream_model.logits(params()["backbone"], hidden)[0, 3:5]
        return y[:, MASK] - y.at[:, MASK].set(-jnp.inf).max(-1)

    for seed in range(20):
        prompt = np.random.default_rng(seed).integers(0, 190, 3)
        tokens = np.asarray([[*prompt, *[MASK] * 4]])
        first, second = map(float, margins(tokens))
        if first > second + 0.05:
            break
    denoiser = with_bias(-(first + second) / 2)
    options = {"cache": "dual", "alg": "confidence_threshold", "threshold": 0.0}
    right, compat = (run(sampler(denoiser, compat=compat, **options), tokens) for compat in (False, True))
    # The state before the slice is that of the full call, so the prediction is the mask again.
    assert int(right.tokens[0, 3]) == MASK and int(right.tokens[0, 4]) != MASK
    assert int(compat.tokens[0, 3]) == int(compat.tokens[0, 4]) != MASK


def test_the_program_does_not_grow_with_the_number_of_blocks():
    def size(blocks: int, **options) -> int:
        this = BlockSampler(model(), block_length=2, soft_mask=SOFT, history=False, **options)
        tokens = jax.ShapeDtypeStruct((1, 2 * blocks), jnp.int32)
        return len(jax.jit(this).lower(params(), None, tokens).as_text().splitlines())

    assert abs(size(16, cache="dual") - size(2, cache="dual")) <= 40
    two, four, sixteen = (size(blocks, cache="prefix") for blocks in (2, 4, 16))
    assert 0 < four - two and sixteen - four <= 2 * (four - two) + 40


def test_slices_of_a_prefix_have_few_sizes_and_the_longest_fits():
    assert slice_sizes(32, 8) == [8, 16, 32]
    assert slice_sizes(11, 4) == [4, 8, 11]
    assert slice_sizes(1024, 32) == [32, 64, 128, 256, 512, 1024]
    assert slice_sizes(3, 32) == [3]


@pytest.mark.full
def test_with_a_single_block_both_caches_are_the_same():
    one = {"block_length": 11, "alg": "entropy", "steps": 6}
    chex.assert_trees_all_equal(*(run(sampler(cache=cache, **one), rows()[:1]).history for cache in ("prefix", "dual")))


@pytest.mark.parametrize("cache", ("prefix", pytest.param("dual", marks=pytest.mark.full)))
def test_over_a_dit_one_block_of_everything_is_what_no_cache_is(cache):
    # The slice is the whole sequence: nothing of what is kept is seen.
    denoiser, weights = golden_model.model(), golden_model.params()
    tokens = np.random.default_rng(1).integers(0, 90, (2, 12))
    tokens[0, 2:], tokens[1, 5:11] = golden_model.MASK, golden_model.MASK
    options = {"prompt_length": 0, "block_length": 12, "alg": "topk_margin", "steps": 5, "soft_mask": SOFT}
    out, plain = (run(sampler(denoiser, cache=name, **options), tokens, weights=weights) for name in (cache, "none"))
    np.testing.assert_array_equal(out.history, plain.history)
    assert golden_model.MASK not in np.asarray(out.tokens)


# Soft-masking


@pytest.mark.full
def test_a_scale_of_zero_is_binary_masking():
    weights = {**params(), "soft_mask": soft_masking.raw_from_effective(0.0, -3.0, 1.5)}
    options = {"cache": "dual", "alg": "entropy", "temperature": 0.5}
    keys = jax.random.split(jax.random.key(3), 3)
    soft = run(sampler(soft_mask=SOFT, **options), rows(), keys=keys, weights=weights)
    np.testing.assert_array_equal(soft.history, run(sampler(**options), rows(), keys=keys).history)
    changed = run(sampler(soft_mask=SOFT, **options), rows(), keys=keys)
    assert (np.asarray(changed.history) != np.asarray(soft.history)).any()


@pytest.mark.parametrize("cache", ("dual", pytest.param("prefix", marks=pytest.mark.full)))
def test_masks_carry_the_last_prediction_and_only_those_in_reach_are_predicted(cache):
    this = sampler(cache=cache, alg="maskgit_plus", tokens_per_step=1, suppress_mask=True, soft_mask=SOFT, trace=True)
    tokens = rows()[:1]
    out = run(this, tokens)
    trace, calls = out.trace, int(out.calls)
    assert calls == 11 and trace.called[:calls].all() and not trace.called[calls:].any()
    at = np.arange(14)
    np.testing.assert_array_equal(trace.tokens[0], tokens)
    assert not trace.weight[0].any()
    for step in range(calls):
        begin = 3 + 4 * min(step // 4, 2)
        full = step % 4 == 0
        masked = (np.asarray(trace.tokens[step, 0]) == MASK) & (at >= 3)
        inside = (at >= begin) & ((at < begin + 4) | full | (cache == "prefix"))
        np.testing.assert_array_equal(np.asarray(trace.neg_entropy[step, 0]) != 0, masked & inside)
        if step:
            np.testing.assert_array_equal(np.asarray(trace.weight[step, 0]) > 0, masked & inside)
            np.testing.assert_allclose(trace.shares[step, 0].sum(-1)[masked], 1, atol=1e-5)
            # A mask outside the slice before keeps what it was told by an earlier call.
            far = masked & (at >= begin + 4) & (step % 4 > 1)
            same = (trace.token_ids[step, 0] == trace.token_ids[step - 1, 0]).all(-1)
            assert same[far].all() or cache == "prefix"
    assert np.asarray(trace.weight)[:calls, 0, :3].max() == 0  # a mask in the prompt stays plain


def test_binary_masking_predicts_masks_of_the_block_alone():
    out = run(sampler(cache="dual", alg="maskgit_plus", tokens_per_step=1, suppress_mask=True, trace=True), rows()[:1])
    predicted = (np.asarray(out.trace.neg_entropy[: int(out.calls), 0]) != 0).sum(-1)
    np.testing.assert_array_equal(predicted, [1, 3, 2, 1, 1, 3, 2, 1, 1, 2, 1])
    assert not out.trace.weight.any()


@pytest.mark.full
@pytest.mark.parametrize("variant", ("full", "slerp"))
def test_other_variants_run_and_differ(variant):
    options = {"cache": "dual", "alg": "entropy"}
    out = run(sampler(soft_mask=SoftMask(variant, 2), trace=True, **options), rows())
    assert bool(out.finite.all()) and float(out.trace.weight.max()) > 0
    assert (np.asarray(out.history) != np.asarray(run(sampler(**options), rows()).history)).any()


@pytest.mark.full
def test_forbidden_tokens_are_not_drawn():
    free = run(sampler(cache="dual", alg="entropy"), rows())
    words = tuple(sorted(set(np.asarray(free.tokens)[0, 3:].tolist()) - {MASK}))
    out = run(sampler(cache="dual", alg="entropy", constraints=Constraints(words)), rows())
    assert not np.isin(np.asarray(out.tokens)[rows() == MASK], words).any()


@pytest.mark.full
def test_on_a_mesh_the_tokens_are_the_same():
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    model_ = model(mesh)
    placed = jax.device_put(params(), sharding.param_shardings(mesh, model_.axes, params()))
    tokens = np.concatenate([rows(), rows()[:1]])
    for cache in ("dual", "prefix"):
        options = {"cache": cache, "alg": "entropy", "soft_mask": SOFT}
        out = run(sampler(model_, **options), jax.device_put(tokens, sharding.batch_sharding(mesh)), weights=placed)
        np.testing.assert_array_equal(out.history, run(sampler(**options), tokens).history)


@pytest.mark.full
def test_it_compiles_for_tpu_and_never_holds_the_attention_weights():
    mesh = sharding.make_mesh(2, 1, 2, devices=test_splash.devices())
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
             "intermediate_size": 512, "mask_token_id": 8}  # fmt: skip
    model_ = dream_denoiser.build(Model(kind="dream", base="-", compute_dtype="bfloat16", param_dtype="bfloat16"),
                                  config.SoftMask(k=1), {**dream_model.config_json(), **sizes}, mesh=mesh)  # fmt: skip
    shapes = jax.eval_shape(model_.init, jax.random.key(0))
    placed = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes,
                          sharding.param_shardings(mesh, model_.axes, shapes))
    tokens = jax.ShapeDtypeStruct((4, 768), jnp.int32, sharding=sharding.batch_sharding(mesh))
    this = BlockSampler(model_, SOFT, prompt_length=256, cache="dual", history=False)
    text = jax.jit(this).lower(placed, None, tokens, tokens).compile().as_text()
    # The full call's attention is a kernel; a slice's 32 queries are not. Each device keeps its rows and heads.
    assert text.count("tpu_custom_call") == 1 and "768,768]" not in text
    assert "bf16[2,2,768,1,128]" in text and "bf16[2,4,768,2,128]" not in text


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
