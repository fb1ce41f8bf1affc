from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab import head
from softmask_jax.distributed.sharding import RULES
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.models.nn import dora, dream
from tests.golden import load, meta
from tests.helpers import dream_model
from tests.helpers.dream_model import ADAPTER, MASK, VOCAB, adapter_config, logits
from tests.helpers.trees import assert_trees_close

TINY = dream_model.config()
EVERYWHERE = r"^(q|k|v|o|gate|up|down)$"
RAW_NAMES = {"raw_scale": "raw_scale", "raw_centre": "raw_centre_neg", "raw_steepness": "raw_steep",
             "raw_temperature": "raw_temperature"}


@pytest.fixture(scope="module")
def base():
    return dream_model.params()


@pytest.fixture(scope="module")
def adapter():
    return dream_model.adapter()


@pytest.fixture(scope="module")
def recorded():
    return load("dora/dora.npz")


@partial(jax.jit, static_argnums=(0, 1))
def hidden(config, adapter_config, params, x, **inputs):
    return dream.trunk(config, adapter=adapter_config)(params, x, **inputs)[0]


@partial(jax.jit, static_argnums=(0, 1))
def gradients(config, adapter_config, base, adapter, x, **inputs):
    def loss(adapter):
        out = dream.trunk(config, adapter=adapter_config)({**base, "adapter": adapter}, x, **inputs)[0]
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    return jax.grad(loss)(adapter)


def some_adapter(base, config, seed=0):
    """An adapter with nothing at zero."""
    fresh = dora.init(base, config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])


# Parity with the reference


def test_adapted_logits_match_the_reference(base, adapter, recorded):
    x = dream.embed(base, recorded["input_ids"])
    np.testing.assert_allclose(logits(base, hidden(TINY, None, base, x)), recorded["logits_base"], atol=2e-5)
    ours = logits(base, hidden(TINY, ADAPTER, {**base, "adapter": adapter}, x))
    np.testing.assert_allclose(ours, recorded["logits_adapted"], atol=2e-5)
    np.testing.assert_allclose(ours, recorded["logits_reloaded"], atol=2e-5)


def test_merged_weights_and_their_logits_match_the_reference(base, adapter, recorded):
    merged = dora.merge(base, adapter, ADAPTER)
    for i in range(TINY.num_layers):
        for name in "qkvo":
            theirs = recorded[f"merged/model.layers.{i}.self_attn.{name}_proj.weight"]
            np.testing.assert_allclose(merged["layers"][name]["kernel"][i].T, theirs, atol=1e-6)
    out = hidden(TINY, None, merged, dream.embed(base, recorded["input_ids"]))
    np.testing.assert_allclose(logits(base, out), recorded["logits_merged"], atol=2e-5)


def shifted(params, x, **inputs):
    hidden, cache = dream.trunk(TINY, adapter=ADAPTER)(params, x, **inputs)
    return dream.shift(hidden), cache


MODEL = Denoiser(
    embedding=dream.embedding,
    embed=dream.embed,
    trunk=shifted,
    head=lambda params: head.Head(params["head"]["weight"], None, VOCAB, MASK, False, None),
    init=None, axes={}, vocab_size=VOCAB, mask_token_id=MASK, num_params=0, flops_per_token=None,
)  # fmt: skip


@partial(jax.jit, static_argnums=0)
def two_passes(spec, base, trained, tokens, labels, weight):
    """The recorded loss, its input embeddings and its gradients for the adapter and the scalars."""

    def loss(trained):
        params = {"backbone": {**base, "adapter": trained["adapter"]}, "soft_mask": trained["soft_mask"]}
        given = two_pass.pass_1(MODEL, spec, params, tokens) if spec.on else None
        x = two_pass.soft_embed(MODEL, spec, params, tokens, given)
        hidden, _ = MODEL.trunk(params["backbone"], x)
        scored = (labels != -100) & (jnp.arange(tokens.shape[1]) > 0)
        nll = head.cross_entropy(hidden, MODEL.head(params["backbone"]), jnp.where(scored, labels, 0))
        return weight * jnp.where(scored, nll, 0).sum() / scored.sum(), x

    return jax.value_and_grad(loss, has_aux=True)(trained)


@pytest.mark.parametrize(
    "case, variant, k", [("single", "none", 1), ("sm_k1", "topk", 1), ("sm_k3", "topk", 3), ("sm_temp", "full", 1)]
)
def test_loss_and_gradients_of_one_and_two_passes_match_the_reference(base, adapter, recorded, case, variant, k):
    start = meta("dora/dora.npz")["head"]
    scalars = soft_masking.init_scalars(start["scale"], start["centre"], start["steep"], start["temp"])
    (loss, x), ours = two_passes(
        SoftMask(variant, k), base, {"adapter": adapter, "soft_mask": scalars},
        recorded["input_ids"], recorded["labels"], recorded["dsigma"],
    )  # fmt: skip
    np.testing.assert_allclose(loss, recorded[f"{case}/loss"], rtol=1e-5)
    if case != "single":
        np.testing.assert_allclose(x, recorded[f"{case}/inputs_embeds"], atol=2e-5)
    assert_trees_close(ours["adapter"], dream_model.adapter(f"{case}/grad"), 1e-4)
    for name, theirs in RAW_NAMES.items():
        expected = recorded[f"{case}/grad/base_model.model.transparency.{theirs}"]
        np.testing.assert_allclose(ours["soft_mask"][name], expected, rtol=1e-4, atol=1e-7)


# The start


@pytest.mark.parametrize("kind", dora.KINDS)
def test_a_fresh_adapter_changes_nothing(base, recorded, kind):
    config = adapter_config(kind=kind, rank=4, targets=EVERYWHERE)
    fresh = dora.init(base, config, jax.random.key(0))
    x = dream.embed(base, recorded["input_ids"])
    out = hidden(TINY, config, {**base, "adapter": fresh}, x)
    np.testing.assert_allclose(out, hidden(TINY, None, base, x), atol=2e-5)


def test_initial_values_are_pefts(base):
    fresh = dora.init(base, adapter_config(rank=32), jax.random.key(0))["layers"]
    assert sorted(fresh) == ["k", "o", "q", "v"]
    for name, low in fresh.items():
        kernel = base["layers"][name]["kernel"]
        assert low["a"].shape == (2, 64, 32) and low["b"].shape == (2, 32, kernel.shape[-1])
        bound = 64**-0.5
        assert 0.98 * bound < float(abs(low["a"]).max()) <= bound
        assert abs(float(low["a"].std()) / bound - 3**-0.5) < 0.02
        np.testing.assert_array_equal(low["b"], 0)
        np.testing.assert_allclose(low["magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_a_products_start_does_not_depend_on_the_other_targets(base):
    few = dora.init(base, adapter_config(targets="^v$"), jax.random.key(0))["layers"]
    many = dora.init(base, adapter_config(targets=EVERYWHERE), jax.random.key(0))["layers"]
    assert list(few) == ["v"]
    chex.assert_trees_all_equal(few["v"], many["v"])
    assert not np.array_equal(many["v"]["a"], many["k"]["a"])


@pytest.mark.parametrize("kind", dora.KINDS)
def test_every_axis_of_every_array_has_a_name_with_a_rule(base, kind):
    config = adapter_config(kind=kind, targets=EVERYWHERE)
    axes = dora.logical_axes(dream.logical_axes(TINY), config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dora.init(base, config, jax.random.key(0))):
        names = axes
        for key in path:
            names = names[key.key]
        assert len(names) == leaf.ndim == len(set(names)) and set(names) <= set(RULES)
    assert axes["layers"]["k"]["b"] == ("layers", "rank", "kv")


# What it computes


def test_lora_adds_the_scaled_product_of_two_matrices(base):
    config = adapter_config(kind="lora", rank=4, alpha=8, targets="^q$")
    low = {name: leaf[0] for name, leaf in some_adapter(base, config)["layers"]["q"].items()}
    kernel, bias = base["layers"]["q"]["kernel"][0], base["layers"]["q"]["bias"][0]
    x = jax.random.normal(jax.random.key(0), (2, 5, 64))
    expected = x @ (kernel + 2.0 * low["a"] @ low["b"]) + bias
    np.testing.assert_allclose(dora.apply(kernel, bias, low, x, config), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_norm_is_that_of_the_sum_from_tiny_to_huge_adapters(size):
    shapes = [(512, 96), (512, 16), (16, 96)]
    kernel, a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    kernel = (0.02 * kernel).astype(jnp.bfloat16)
    a, b = 0.04 * a, size * 0.01 * b
    exact = np.linalg.norm(np.asarray(kernel, np.float64) + 1.5 * np.asarray(a, np.float64) @ np.asarray(b), axis=0)
    np.testing.assert_allclose(dora.column_norm(kernel, a, b, 1.5), exact, rtol=1e-6)


def test_no_gradient_flows_through_the_norm():
    kernel, a, b = jnp.ones((8, 4)), jnp.ones((8, 2)), jnp.ones((2, 4))
    for leaf in jax.grad(lambda *arrays: dora.column_norm(*arrays, 1.0).sum(), argnums=(0, 1, 2))(kernel, a, b):
        np.testing.assert_array_equal(leaf, 0)


def test_a_zero_column_gives_no_nan():
    low = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 4)), "magnitude": jnp.zeros(4)}
    out = dora.apply(jnp.zeros((8, 4)), None, low, jnp.ones((1, 3, 8)), adapter_config(rank=2))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.full
@pytest.mark.parametrize("kind", dora.KINDS)
def test_merged_is_adapted_on_every_product(base, recorded, kind):
    config = adapter_config(kind=kind, rank=4, alpha=6, targets=EVERYWHERE)
    adapter, x = some_adapter(base, config), dream.embed(base, recorded["input_ids"])
    merged = dora.merge(base, adapter, config)
    adapted = hidden(TINY, config, {**base, "adapter": adapter}, x)
    np.testing.assert_allclose(hidden(TINY, None, merged, x), adapted, atol=5e-5)
    assert float(abs(adapted - hidden(TINY, None, base, x)).max()) > 0.1
    jax.tree.map(np.testing.assert_array_equal, merged["layers"]["q"]["bias"], base["layers"]["q"]["bias"])
    assert merged["head"] is base["head"]


def test_merging_keeps_the_bases_dtype_and_rounds_once(base, adapter):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    merged = dora.merge(small, adapter, ADAPTER)["layers"]["q"]["kernel"]
    exact = dora.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small), adapter, ADAPTER)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, exact["layers"]["q"]["kernel"].astype(jnp.bfloat16))


def test_a_magnitude_below_bfloat16s_resolution_still_counts():
    kernel = jnp.full((64, 2), 0.125, jnp.bfloat16)
    low = {"a": jnp.zeros((64, 2)), "b": jnp.zeros((2, 2)), "magnitude": jnp.array([1.0, 1.001])}
    x = jax.random.normal(jax.random.key(0), (1, 4096, 64)).astype(jnp.bfloat16)
    out = np.asarray(dora.apply(kernel, None, low, x, adapter_config(rank=2)), np.float64)
    assert abs(np.abs(out[..., 1]).mean() / np.abs(out[..., 0]).mean() - 1.001) < 5e-4


@pytest.mark.full
def test_bfloat16_gradients_stay_close_to_float32(base, adapter, recorded):
    x = dream.embed(base, recorded["input_ids"])
    exact = gradients(TINY, ADAPTER, base, adapter, x)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    config = replace(TINY, param_dtype="bfloat16", compute_dtype="bfloat16")
    ours = gradients(config, ADAPTER, small, adapter, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact)):
        assert a.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b))


@pytest.mark.full
@pytest.mark.parametrize("change", [{"remat": "full"}, {"unroll": True}], ids=str)
def test_rematerialisation_and_unrolling_change_no_gradient(base, adapter, recorded, change):
    x, keys = dream.embed(base, recorded["input_ids"]), jax.random.split(jax.random.key(0), 2)
    dropping = replace(ADAPTER, dropout=0.5)
    expected = gradients(TINY, dropping, base, adapter, x, dropout_keys=keys)
    ours = gradients(replace(TINY, **change), dropping, base, adapter, x, dropout_keys=keys)
    assert_trees_close(ours, expected, 1e-5)


# Dropout


def test_dropout_acts_on_the_low_rank_branch_alone():
    low = {"a": jnp.ones((64, 1)) / 64, "b": jnp.ones((1, 2)), "magnitude": jnp.ones(2)}
    config = adapter_config(kind="lora", rank=1, alpha=1, dropout=0.5)
    kernel, x = jnp.ones((64, 2)), jnp.ones((2, 512, 64))
    keys = jax.random.split(jax.random.key(0), 2)
    out = dora.apply(kernel, None, low, x, config, keys) - 64
    assert abs(float(out.mean()) - 1) < 0.02 and float(out.std()) > 0.05
    np.testing.assert_allclose(dora.apply(kernel, None, low, x, config), 65)
    swapped = dora.apply(kernel, None, low, x, config, keys[::-1]) - 64
    np.testing.assert_array_equal(swapped[::-1], out)


def test_products_drop_differently_and_only_with_keys_and_a_rate(base, adapter, recorded):
    x, keys = dream.embed(base, recorded["input_ids"]), jax.random.split(jax.random.key(0), 2)
    params, dropping = {**base, "adapter": adapter}, replace(ADAPTER, dropout=0.5)
    without = hidden(TINY, ADAPTER, params, x)
    np.testing.assert_array_equal(hidden(TINY, ADAPTER, params, x, dropout_keys=keys), without)
    np.testing.assert_array_equal(hidden(TINY, dropping, params, x), without)
    assert float(abs(hidden(TINY, dropping, params, x, dropout_keys=keys) - without).max()) > 1e-3
    key = jax.random.key(0)
    assert len({str(jax.random.key_data(dora.fold_name(key, name))) for name in ("q", "k", "v", "o")}) == 4
