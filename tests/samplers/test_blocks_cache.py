"""Block decoding with a key/value cache: what slices see, and what masks carry from call to call."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.config.sections import Model
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.samplers.blocks import BlockSampler, slice_sizes
from tests.helpers import dream_model, golden_model
from tests.helpers.dream_model import MASK
from tests.models.nn import test_splash
from tests.helpers.blocks import SOFT, model, params, rows, run, sampler, with_bias


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


def test_a_slice_makes_no_array_of_all_hidden_states():
    this = BlockSampler(model(), block_length=2, prompt_length=4, soft_mask=SOFT, history=False, cache="dual")
    text = jax.jit(this).lower(params(), None, jax.ShapeDtypeStruct((1, 40), jnp.int32)).as_text()
    width = dream_model.config().hidden_size
    # The slice's hidden states are never put back into an array of the whole sequence's.
    assert f"tensor<1x2x{width}xf32>" in text
    assert not re.search(rf"dynamic_update_slice .*tensor<1x2x{width}xf32>.*-> tensor<1x40x{width}xf32>", text)


def test_slices_of_a_prefix_have_few_sizes_and_the_longest_fits():
    assert slice_sizes(32, 8) == [8, 16, 32]
    assert slice_sizes(11, 4) == [4, 8, 11]
    assert slice_sizes(1024, 32) == [32, 64, 128, 256, 512, 1024]
    assert slice_sizes(3, 32) == [3]


@pytest.mark.full
def test_with_a_single_block_both_caches_are_the_same():
    one = {"block_length": 11, "alg": "entropy", "steps": 6}
    found = [np.asarray(run(sampler(cache=cache, **one), rows()[:1]).history) for cache in ("prefix", "dual")]
    np.testing.assert_array_equal(*found)


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
