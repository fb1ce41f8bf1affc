from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.config import Model, SoftMask
from softmask_jax.models import denoiser
from softmask_jax.models.nn import dit
from softmask_jax.models.nn.dit import DiTConfig
from tests.golden import load
from tests.helpers import torch_weights
from tests.helpers.trees import assert_trees_close

TINY = DiTConfig(vocab_size=98, hidden_size=64, num_blocks=2, num_heads=2, cond_dim=16, mlp_ratio=4, rope_base=1e4, dropout=0.1)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, torch_weights.from_torch(load("mdlm_dit/params.npz"), 2)["backbone"])


@pytest.fixture(scope="module")
def recorded():
    return load("mdlm_dit/forward.npz")


@partial(jax.jit, static_argnums=0)
def hidden(config, params, x, **inputs):
    return dit.trunk(config)(params, x, **inputs)[0]


@partial(jax.jit, static_argnums=0)
def gradients(config, params, x, inputs):
    """Gradients of a fixed weighting of the hidden state for parameters and input, and the hidden state."""

    def loss(params, x):
        out = dit.trunk(config)(params, x, **inputs)[0]
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@partial(jax.jit, static_argnums=0)
def residual(config, params, x, **inputs):
    return dit.run_blocks(config, params, x, dit.condition(config, params, None), **inputs)


@partial(jax.jit, static_argnums=0)
def fresh_params(config):
    return dit.init(config, jax.random.key(0))


def logits(params, hidden):
    return (hidden @ params["head"]["weight"].T + params["head"]["bias"])[..., : TINY.vocab_size]


def keys_of_rows(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


# Parity with the reference


def test_the_default_model_has_169_627_218_parameters():
    assert denoiser.build(Model(), SoftMask(), vocab_size=50_258, mask_token_id=50_257).num_params == 169_627_218


def test_logits_from_tokens_match_the_reference(params, recorded):
    x = dit.embed(params, recorded["xt"])
    np.testing.assert_allclose(x, recorded["hidden_after_embed"], atol=1e-7)
    np.testing.assert_allclose(logits(params, hidden(TINY, params, x)), recorded["logits_ids"], atol=2e-5)


def test_logits_with_time_conditioning_match_the_reference(params, recorded):
    x = dit.embed(params, recorded["xt"])
    ours = logits(params, hidden(TINY, params, x, sigma=recorded["sigma_nonzero"]))
    np.testing.assert_allclose(ours, recorded["logits_ids_sigma"], atol=2e-5)


def test_logits_from_soft_inputs_match_the_reference(params, recorded):
    x = jnp.sum(recorded["sparse_probs"][..., None] * dit.embedding(params)[recorded["sparse_indices"]], axis=-2)
    np.testing.assert_allclose(x, recorded["embed_sparse"], atol=1e-6)
    np.testing.assert_allclose(logits(params, hidden(TINY, params, x)), recorded["logits_sparse"], atol=2e-5)


def test_the_timestep_embedding_matches_the_reference(params, recorded):
    sigma_map = dit.shell(TINY, params).sigma_map
    np.testing.assert_allclose(sigma_map(jnp.zeros(3)), recorded["sigma_map_zero"], atol=2e-6)
    np.testing.assert_allclose(sigma_map(recorded["sigma_nonzero"]), recorded["sigma_map_nonzero"], atol=2e-6)


def test_every_block_matches_the_reference(params, recorded):
    x = dit.embed(params, recorded["xt"])
    np.testing.assert_allclose(x, recorded["hidden_states"][0], atol=1e-7)
    for depth in (1, 2):
        first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])}
        out = residual(replace(TINY, num_blocks=depth), first, x)
        np.testing.assert_allclose(out, recorded["hidden_states"][depth], atol=2e-5)


# The start


def test_initial_values_are_the_references_distributions():
    config = replace(TINY, hidden_size=128, cond_dim=64)
    fresh = fresh_params(config)
    fan_in = {"embed/table": 128, "sigma_map/in": 256, "sigma_map/out": 64, "blocks/qkv": 128, "blocks/attn_out": 128,
              "blocks/mlp_in": 128, "blocks/mlp_out": 512}
    uniform, ones, zero = 0, 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fans = [fan for prefix, fan in fan_in.items() if name.startswith(prefix)]
        assert leaf.dtype == jnp.float32
        if fans:
            values = leaf[:98] if name == "embed/table" else leaf
            bound = fans[0] ** -0.5
            assert float(abs(values).max()) <= bound
            if values.size > 1000:
                assert float(abs(values).max()) > 0.99 * bound
                assert abs(float(values.mean())) < 0.05 * bound
                assert abs(float(values.std()) / bound - 3**-0.5) < 0.02
            uniform += 1
        elif "norm" in name:
            np.testing.assert_array_equal(leaf, 1)
            ones += 1
        else:
            assert "adaln" in name or name.startswith("head/")
            np.testing.assert_array_equal(leaf, 0)
            zero += 1
    assert (uniform, ones, zero) == (11, 3, 6)
    np.testing.assert_array_equal(fresh["embed"]["table"][98:], 0)
    assert not np.array_equal(*fresh["blocks"]["qkv"]["kernel"])


def test_every_axis_of_every_parameter_has_a_name():
    fresh = jax.eval_shape(partial(dit.init, TINY), jax.random.key(0))
    axes = dit.logical_axes(TINY)
    known = {"layers", "vocab", "embed", "mlp", "qkv", "mod", "heads", "cond", "freq"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        names = axes
        for key in path:
            names = names[key.key]
        assert len(names) == leaf.ndim == len(set(names)) and set(names) <= known
    assert axes["blocks"]["qkv"]["kernel"] == ("layers", "embed", "qkv")
    assert axes["head"]["weight"] == ("vocab", "embed")


def test_num_params_counts_real_parameters_without_the_vocabularys_padding(params):
    padding = (128 - 98) * (2 * 64 + 1)
    assert dit.num_params(TINY) == sum(leaf.size for leaf in jax.tree.leaves(params)) - padding


def test_flops_count_every_matrix_product():
    config = replace(TINY, num_blocks=1, vocab_size=128)
    run = jax.jit(lambda p, x: dit.trunk(config)(p, x)[0] @ p["head"]["weight"].T)
    shapes = jax.eval_shape(partial(dit.init, config), jax.random.key(0))
    counted = run.lower(shapes, jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)).compile().cost_analysis()["flops"]
    ours = dit.flops_per_token(config, 64) * 4 * 64
    assert ours < counted < 1.2 * ours  # XLA counts the elementwise work too


# One function, many ways to run it


@pytest.fixture(scope="module")
def plain(params, recorded):
    x = dit.embed(params, recorded["xt"])
    inputs = {"dropout_keys": keys_of_rows(3)}
    return x, inputs, gradients(TINY, params, x, inputs)


@pytest.mark.full
@pytest.mark.parametrize("remat", [name for name in dit.DiTConfig.policies if name != "none"])
def test_rematerialisation_changes_no_gradient(params, plain, remat):
    x, inputs, expected = plain
    assert_trees_close(gradients(replace(TINY, remat=remat), params, x, inputs), expected, 1e-5)


def test_the_scan_is_a_loop_over_blocks_rematerialised_or_not(params, plain):
    x, inputs, expected = plain
    config = replace(TINY, unroll=True, remat="full")
    assert_trees_close(gradients(config, params, x, inputs), expected, 1e-5)


def test_no_sigma_is_sigma_zero_gradients_included(params, plain):
    x, inputs, expected = plain
    zero = gradients(TINY, params, x, {**inputs, "sigma": jnp.zeros(3)})
    assert_trees_close(zero, expected, 1e-5)
    assert float(abs(expected[0][0]["sigma_map"]["in"]["bias"]).max()) > 0


@pytest.mark.full
def test_bfloat16_stays_close_to_float32_and_masters_stay_float32(params, plain):
    x, inputs, (expected, exact) = plain
    ours, rounded = gradients(replace(TINY, compute_dtype="bfloat16"), params, x, inputs)
    assert rounded.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < 0.02
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        assert a.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b))


def test_given_positions_equal_the_default_and_only_their_differences_matter(params, recorded):
    x = dit.embed(params, recorded["xt"])
    expected = hidden(TINY, params, x)
    np.testing.assert_array_equal(hidden(TINY, params, x, positions=jnp.arange(32)), expected)
    shifted = jnp.arange(32) + jnp.array([[0], [7], [50]])
    np.testing.assert_allclose(hidden(TINY, params, x, positions=shifted), expected, atol=5e-5)
    assert float(abs(hidden(TINY, params, x, positions=2 * shifted) - expected).max()) > 1e-3


def test_segments_do_not_see_each_other(params, recorded):
    x = dit.embed(params, recorded["xt"])
    segment_ids = jnp.broadcast_to(jnp.arange(32) // 20, (3, 32))
    both = hidden(TINY, params, x, segment_ids=segment_ids)
    np.testing.assert_allclose(both[:, :20], hidden(TINY, params, x[:, :20]), atol=2e-5)
    np.testing.assert_allclose(both[:, 20:], hidden(TINY, params, x[:, 20:]), atol=2e-5)
    disturbed = hidden(TINY, params, x.at[:, 25].add(1.0), segment_ids=segment_ids)
    np.testing.assert_array_equal(disturbed[:, :20], both[:, :20])


# Dropout


def test_dropout_acts_only_with_keys_and_a_rate(params, recorded):
    x = dit.embed(params, recorded["xt"])
    without, keys = hidden(TINY, params, x), keys_of_rows(3)
    assert float(abs(hidden(TINY, params, x, dropout_keys=keys) - without).max()) > 1e-3
    never = replace(TINY, dropout=0.0)
    np.testing.assert_array_equal(hidden(never, params, x, dropout_keys=keys), hidden(never, params, x))
    np.testing.assert_array_equal(hidden(never, params, x), without)


def test_a_rows_dropout_does_not_depend_on_its_neighbours(params, recorded):
    x, keys = dit.embed(params, recorded["xt"]), keys_of_rows(3)
    order = jnp.array([2, 0, 1])
    here = hidden(TINY, params, x, dropout_keys=keys)
    there = hidden(TINY, params, x[order], dropout_keys=keys[order])
    np.testing.assert_allclose(there, here[order], atol=1e-5)


def test_layers_and_branches_drop_differently():
    """With gates at one and branches that add constants, the residual shows the masks."""
    config = replace(TINY, dropout=0.5)
    fresh = fresh_params(config)
    blocks = jax.tree.map(jnp.zeros_like, fresh["blocks"])
    gates = jnp.zeros((2, 6, 64)).at[:, 5].set(1.0).reshape(2, 384)
    blocks["adaln"]["bias"], blocks["mlp_out"]["bias"] = gates, jnp.array([[1.0], [4.0]]) * jnp.ones((2, 64))
    fresh["blocks"] = blocks
    out = residual(config, fresh, jnp.zeros((2, 16, 64)), dropout_keys=keys_of_rows(2))
    share = {value: float((out == value).mean()) for value in (0.0, 2.0, 8.0, 10.0)}
    assert all(abs(fraction - 0.25) < 0.05 for fraction in share.values()), share
