"""A frozen base with int8 kernels: what it computes, what its norms are, and what gets a gradient."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.config.sections import Model, SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.models.nn import dora, dream, layers
from softmask_jax.models.nn.dora import AdapterConfig
from tests.helpers import dream_model
from tests.helpers.dream_model import ADAPTER
from tests.helpers.trees import assert_trees_close

FLOAT = dream_model.config()
INT8 = replace(FLOAT, base_dtype="int8")
EVERYWHERE = replace(ADAPTER, targets="^(q|k|v|o|gate|up|down)$")


def int8(base: dict) -> dict:
    """A backbone with its kernels quantised."""
    def one(leaves: dict) -> dict:
        if "kernel" not in leaves:
            return leaves
        kernel, scale = jax.vmap(layers.quantised)(leaves["kernel"])
        return {**leaves, "kernel": kernel, "kernel_scale": scale}

    return {**base, "layers": {name: one(leaves) for name, leaves in base["layers"].items()}}


def as_float(base: dict) -> dict:
    """The float32 backbone that an int8 one stands for."""
    def one(leaves: dict) -> dict:
        if "kernel_scale" not in leaves:
            return leaves
        kernel = leaves["kernel"].astype(jnp.float32) * leaves["kernel_scale"][:, None]
        return {name: leaf for name, leaf in leaves.items() if name != "kernel_scale"} | {"kernel": kernel}

    return {**base, "layers": {name: one(leaves) for name, leaves in base["layers"].items()}}


@pytest.fixture(scope="module")
def base():
    return int8(dream_model.params())


def some_adapter(base: dict, config: AdapterConfig) -> dict:
    """Nothing of it is zero."""
    leaves, tree = jax.tree.flatten(dora.init(base, config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])


def embeddings(length: int = 16):
    return jax.random.normal(jax.random.key(5), (2, length, FLOAT.hidden_size))


@partial(jax.jit, static_argnums=(0, 1))
def hidden(config, adapter_config, params, x):
    return dream.trunk(config, adapter=adapter_config)(params, x)[0]


@partial(jax.jit, static_argnums=(0, 1))
def gradients(config, adapter_config, base, adapter, x):
    def loss(adapter, x):
        out = dream.trunk(config, adapter=adapter_config)({**base, "adapter": adapter}, x)[0]
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    return jax.grad(loss, argnums=(0, 1))(adapter, x)


def test_a_weight_is_off_by_half_a_step_at_most_and_the_largest_is_kept():
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.05, (256, 32)), jnp.float32).at[:, 3].set(0)
    values, scale = layers.quantised(kernel)
    assert values.dtype == jnp.int8 and scale.shape == (32,)
    again = values.astype(jnp.float32) * scale
    assert (jnp.abs(again - kernel) <= 0.5001 * scale).all()
    np.testing.assert_allclose(jnp.abs(again).max(0), jnp.abs(kernel).max(0), rtol=1e-6)
    assert jnp.abs(values).max() == 127 and scale[3] == 1 and not values[:, 3].any()


def test_the_trees_of_init_and_axes_have_a_scale_for_every_output():
    params, axes = dream.init(INT8, jax.random.key(0)), dream.logical_axes(INT8)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        leaves = params["layers"][name]
        assert leaves["kernel"].dtype == jnp.int8 and leaves["kernel_scale"].dtype == jnp.float32
        assert leaves["kernel_scale"].shape == (INT8.num_layers, leaves["kernel"].shape[-1])
        assert axes["layers"][name]["kernel_scale"] == ("layers", axes["layers"][name]["kernel"][-1])
    rest = {name: leaf.dtype for name, leaf in params["layers"]["q"].items() if not name.startswith("kernel")}
    assert rest == {"bias": jnp.float32} and params["head"]["weight"].dtype == jnp.float32
    assert dream.num_params(INT8) == dream.num_params(FLOAT)


def test_the_network_is_that_of_the_weights_that_it_stands_for(base):
    x = embeddings()
    assert_trees_close(hidden(INT8, None, base, x), hidden(FLOAT, None, as_float(base), x), 2e-5)


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapted_network_is_that_of_the_weights_that_it_stands_for(base, kind):
    config = replace(EVERYWHERE, kind=kind)
    adapter, x = some_adapter(base, config), embeddings()
    ours = hidden(INT8, config, {**base, "adapter": adapter}, x)
    assert_trees_close(ours, hidden(FLOAT, config, {**as_float(base), "adapter": adapter}, x), 2e-5)


@pytest.mark.full
@pytest.mark.parametrize("remat", ("none", "full"))
def test_gradients_of_adapter_and_activations_are_those_of_the_weights_that_it_stands_for(base, remat):
    adapter, x = some_adapter(base, ADAPTER), embeddings()
    ours = gradients(replace(INT8, remat=remat), ADAPTER, base, adapter, x)
    assert_trees_close(ours, gradients(FLOAT, ADAPTER, as_float(base), adapter, x), 1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours))


def test_a_fresh_adapter_changes_nothing(base):
    x, fresh = embeddings(), dora.init(base, EVERYWHERE, jax.random.key(0))
    plain = hidden(INT8, None, base, x)
    np.testing.assert_allclose(hidden(INT8, EVERYWHERE, {**base, "adapter": fresh}, x), plain, atol=1e-5)


def test_the_norm_is_that_of_the_scaled_kernel_and_has_no_gradient():
    draw = np.random.default_rng(1).normal
    kernel, scale = layers.quantised(jnp.asarray(draw(0, 0.05, (64, 24)), jnp.float32))
    a, b = jnp.asarray(draw(size=(64, 4)), jnp.float32), jnp.asarray(draw(size=(4, 24)), jnp.float32)
    exact = np.linalg.norm(np.asarray(kernel, np.float64) * scale + 1.5 * np.asarray(a, np.float64) @ b, axis=0)
    np.testing.assert_allclose(dora.column_norm(kernel, a, b, 1.5, scale), exact, rtol=1e-6)
    for leaf in jax.grad(lambda a, b, s: dora.column_norm(kernel, a, b, 1.5, s).sum(), argnums=(0, 1, 2))(a, b, scale):
        assert not leaf.any()


def test_in_bfloat16_it_is_nearer_to_its_weights_than_weights_that_are_rounded_to_bfloat16():
    draw = np.random.default_rng(2).normal
    x = jnp.asarray(draw(size=(1, 64, 512)), jnp.bfloat16)
    kernel, scale = layers.quantised(jnp.asarray(draw(0, 0.05, (512, 128)), jnp.float32))
    exact = np.asarray(x[0], np.float64) @ (np.asarray(kernel, np.float64) * scale)
    ours = layers.wide_product(x, kernel)[0] * scale
    rounded = layers.wide_product(x, (kernel * scale).astype(jnp.bfloat16))[0]
    assert 50 * np.abs(ours - exact).max() < np.abs(rounded - exact).max()


def test_no_float_array_has_the_size_of_all_kernels_together(base):
    adapter, x = some_adapter(base, ADAPTER), embeddings()
    step = gradients.lower(replace(INT8, remat="full"), ADAPTER, base, adapter, x)
    sizes = {leaves["kernel"].shape for leaves in base["layers"].values() if "kernel" in leaves}
    for shape in sizes:
        shape = "x".join(map(str, shape))
        assert f"{shape}xi8" in step.as_text() and f"{shape}xf32" not in step.as_text()


def test_on_a_mesh_it_is_the_same_network(base):
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    config = Model(kind="dream", base="-", compute_dtype="float32", base_dtype="int8", adapter="dora", adapter_rank=ADAPTER.rank)
    alone, over = (dream_denoiser.build(config, SoftMask(k=1), dream_model.config_json(), mesh=m) for m in (None, mesh))
    backbone = {**base, "adapter": some_adapter(base, alone_adapter := dream_denoiser.adapter_config(config))}
    assert alone_adapter.kind == "dora"
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 190, (4, 16)))
    placed = jax.device_put(backbone, sharding.param_shardings(mesh, over.axes["backbone"], backbone))

    def run(model, backbone):
        return jax.jit(lambda b, t: model.trunk(b, model.embed(b, t))[0])(backbone, tokens)

    np.testing.assert_allclose(run(over, placed), run(alone, backbone), atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("config", [FLOAT, INT8], ids=["float", "int8"])
def test_prepared_for_many_calls_it_is_the_same_network_and_reads_no_kernel_for_its_norms(base, config, kind):
    adapter = replace(ADAPTER, kind=kind)
    base = base if config is INT8 else dream_model.params()
    params = {**base, "adapter": some_adapter(base, adapter)}
    ready, x = dora.prepared(params, adapter), embeddings()
    np.testing.assert_allclose(hidden(config, adapter, ready, x), hidden(config, adapter, params, x), atol=1e-5)

    def squares(params):
        return str(jax.make_jaxpr(dream.trunk(config, adapter=adapter))(params, x)).count("square")

    layer_norms = 3  # two a layer, and the last
    assert squares(ready) == layer_norms and (squares(params) > layer_norms) == (kind == "dora")


def test_an_adapter_is_prepared_whole_or_not_at_all(base):
    params = {**base, "adapter": some_adapter(base, ADAPTER)}
    ready = dora.prepared(params, ADAPTER)
    ready["adapter"]["layers"]["q"] = params["adapter"]["layers"]["q"]
    with pytest.raises(ValueError, match="adapter on k, o, q, v has"):
        dream.trunk(INT8, adapter=ADAPTER)(ready, embeddings())


def test_an_adapter_is_not_merged_into_int8(base):
    with pytest.raises(ValueError, match="not merged into int8 kernels"):
        dora.merge(base, some_adapter(base, ADAPTER), ADAPTER)


def test_another_base_dtype_names_those_there_are():
    with pytest.raises(ValueError, match="'int4'; choose one of float, int8"):
        replace(FLOAT, base_dtype="int4")
