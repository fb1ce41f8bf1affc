import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from softmask_jax.distributed import sharding
from softmask_jax.models.nn import dit, dora, dream, layers, splash
from softmask_jax.models.nn.cache import Window
from softmask_jax.models.nn.dit import DiTConfig
from softmask_jax.models.nn.dream import DreamConfig
from softmask_jax.models.nn.splash import Layout
from tests.helpers.dream_model import adapter_config

BF16 = jnp.dtype("bfloat16")


def inputs(width=64, queries=128, keys=128, heads=2, kv_heads=1):
    """q, k, v of two rows, and segments of queries (the last positions) and keys that cut the first row."""
    random = jax.random.split(jax.random.key(0), 3)
    shapes = (2, queries, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)
    q, k, v = (jax.random.normal(key, shape).astype(BF16) for key, shape in zip(random, shapes, strict=True))
    segments = jnp.stack([jnp.arange(keys) // 50, jnp.zeros(keys, int)]).astype(jnp.int32)
    return q, k, v, segments[:, -queries:], segments


def assert_close(ours, plain):
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
    assert np.linalg.norm(ours - plain) < 0.01 * np.linalg.norm(plain)


@pytest.mark.parametrize(
    "width, keys, segmented",
    [(64, 128, True)] + [pytest.param(*case, marks=pytest.mark.full) for case in (
        (64, 128, False), (64, 256, True), (64, 384, False), (128, 128, True), (128, 128, False), (192, 128, True),
    )],
)  # fmt: skip
def test_the_kernel_is_the_plain_attention_with_its_gradients(width, keys, segmented):
    q, k, v, *segments = inputs(width, keys=keys)
    segments = segments if segmented else ()
    weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def both(attend):
        def loss(*qkv):
            out = attend(*qkv, *segments)
            return (weight * out).sum(), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    for ours, plain in zip(both(functools.partial(splash.attend, interpret=True)), both(layers.attend), strict=True):
        assert_close(ours, plain)


def sizes(dtype=BF16, width=64, queries=256, keys=256, rows=4, heads=2):
    """Shapes of q and k."""
    return tuple(jax.ShapeDtypeStruct((rows, n, heads, width), dtype) for n in (queries, keys))


def test_attention_is_chosen_for_the_machine_that_the_program_is_for():
    q, k = sizes()
    assert splash.choose("auto", q, k) == layers.choose_attention("auto", BF16, 64)
    assert splash.choose("xla", q, k) == "xla"
    with pytest.raises(ValueError, match="needs a TPU"):
        splash.choose("splash", q, k)
    with pytest.raises(ValueError, match="choose one of"):
        splash.choose("flash", q, k)


UNFIT = {
    "multiples of 64, got float32": sizes(jnp.dtype("float32")), "and 32": sizes(width=32),
    "200 queries": sizes(queries=200, keys=200), "200 keys": sizes(keys=200),
}  # fmt: skip


def test_the_kernel_is_taken_on_a_tpu_where_it_fits(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for fit in (sizes(), sizes(width=128), sizes(queries=128), sizes(heads=3)):
        assert splash.choose("auto", *fit) == splash.choose("splash", *fit) == "splash"
    for reason, unfit in UNFIT.items():
        assert splash.choose("auto", *unfit) == splash.choose("splash", *unfit, sliced=True) == "xla"
        with pytest.raises(ValueError, match=reason):
            splash.choose("splash", *unfit)


def test_the_shares_of_a_device_must_fit():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "tensor", "sequence"))
    layout = Layout(mesh, ("data",), "tensor", "sequence")
    assert not splash.misfit(*sizes(), layout)
    for reason, unfit in {
        "sequence = 2 must divide the 129 queries": sizes(queries=129), "got 64 queries": sizes(queries=128),
        "= 2 must divide the 3 rows": sizes(rows=3), "tensor = 2 must divide the 3 key/value heads": sizes(heads=3),
    }.items():  # fmt: skip
        assert reason in splash.misfit(*unfit, layout)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dit", "dream"])
def test_networks_and_their_slices_attend_with_the_kernel(kind, monkeypatch):
    sizes = dict(vocab_size=64, hidden_size=128, num_heads=2, rope_base=1e4, compute_dtype="bfloat16")
    if kind == "dit":
        network, config = dit, DiTConfig(**sizes, num_blocks=2, cond_dim=16, mlp_ratio=2)
        random = jax.random.split(jax.random.key(2), 99)
        params = dit.init(config, jax.random.key(1))
        leaves, tree = jax.tree.flatten(params)  # the gates are zero at first
        params = tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, random)])
    else:
        network, config = dream, DreamConfig(**sizes, num_layers=2, num_kv_heads=1, intermediate_size=256,
                                             norm_eps=1e-6, param_dtype="bfloat16")
        params = dream.init(config, jax.random.key(1))
    x, segment_ids = jax.random.normal(jax.random.key(0), (2, 256, 128)), inputs(keys=256)[-1]
    run = network.trunk(config)

    def both():
        whole, kept = run(params, x, segment_ids=segment_ids, cache=True)
        window = Window(kept, 64, segment_ids=segment_ids)
        return whole, run(params, 2 * x[:, 64:192], segment_ids=segment_ids[:, 64:192], cache=window)[0]

    plain, calls = both(), []
    monkeypatch.setattr(splash, "choose", lambda *_, sliced: calls.append(sliced) or "splash")
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    for ours, expected in zip(both(), plain, strict=True):
        assert_close(ours, expected)
    assert set(calls) == {False, True}


# Compiled ahead of time, without a TPU


@functools.cache
def devices():
    from jax.experimental import topologies

    # libtpu reads these when it is loaded: without them it looks for a real machine.
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "1",
        "TPU_STDERR_LOG_LEVEL": "1",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.full
@pytest.mark.parametrize("fsdp, tensor", [(4, 1)])
def test_an_adapters_gradient_compiles_for_tpu_without_the_attention_weights(fsdp, tensor):
    length, heads, width, depth = 768, 8, 1024, 4
    mesh = sharding.make_mesh(1, fsdp, tensor, devices=devices())
    config = DreamConfig(vocab_size=256, hidden_size=width, num_layers=depth, num_heads=heads, num_kv_heads=2,
                         intermediate_size=2048, rope_base=1e6, norm_eps=1e-6, param_dtype="bfloat16",
                         compute_dtype="bfloat16", remat="full")
    adapted, layout = adapter_config(), Layout(mesh, sharding.BATCH_AXES, "tensor")
    trunk = dream.trunk(config, sharding.rows_over(mesh), adapted, layout)

    def loss(adapter, base, x, segment_ids):
        hidden, _ = trunk({**base, "adapter": adapter}, x, segment_ids=segment_ids)
        return jnp.square(hidden.astype(jnp.float32)).mean()

    def placed(shapes, axes):
        return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes,
                            sharding.param_shardings(mesh, axes, shapes))

    base = jax.eval_shape(functools.partial(dream.init, config), jax.random.key(0))
    adapter = jax.eval_shape(lambda base: dora.init(base, adapted, jax.random.key(0)), base)
    axes, rows = dream.logical_axes(config), jax.sharding.NamedSharding(mesh, P(sharding.BATCH_AXES))
    program = jax.jit(jax.grad(loss)).lower(
        placed(adapter, dora.logical_axes(axes, adapted)), placed(base, axes),
        jax.ShapeDtypeStruct((4, length, width), BF16, sharding=rows),
        jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows),
    ).compile()  # fmt: skip
    text = program.as_text()
    assert "tpu_custom_call" in text
    assert f"{length},{length}]" not in text
    # A layer's input for every layer, and a few layers' worth of everything else: no copy of all the base's weights.
    kept = depth * (4 // fsdp) * length * width * 2
    layer = 4 * width**2 + 3 * width * 2048
    assert program.memory_analysis().temp_size_in_bytes < kept + 2 * (2 * layer) + 12 * (4 // fsdp) * length * 2048 * 4


@pytest.mark.full
@pytest.mark.parametrize("fsdp, sequence, tensor", [(1, 1, 1), (1, 2, 2)])
def test_a_dits_gradient_compiles_for_tpu_without_the_attention_weights(fsdp, sequence, tensor):
    rows, length, width = 4, 1024, 768
    mesh = sharding.make_mesh(1, fsdp, tensor, sequence=sequence, devices=devices()[:fsdp * sequence * tensor])
    config = DiTConfig(vocab_size=256, hidden_size=width, num_blocks=2, num_heads=12, cond_dim=16, mlp_ratio=4,
                       rope_base=1e4, compute_dtype="bfloat16", remat="products")
    layout = Layout(mesh, sharding.BATCH_AXES, "tensor", "sequence")
    trunk = dit.trunk(config, sharding.rows_over(mesh), layout)

    def loss(params, x, segment_ids):
        return jnp.square(trunk(params, x, segment_ids=segment_ids)[0].astype(jnp.float32)).mean()

    shapes = jax.eval_shape(functools.partial(dit.init, config), jax.random.key(0))
    over_rows = sharding.batch_sharding(mesh)
    text = jax.jit(jax.grad(loss)).lower(
        jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes,
                     sharding.param_shardings(mesh, dit.logical_axes(config), shapes)),
        jax.ShapeDtypeStruct((rows, length, width), BF16, sharding=over_rows),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=over_rows),
    ).compile().as_text()  # fmt: skip
    # "products" keeps the kernel's results: one kernel forward, one (fused) backward.
    assert len(re.findall(r"%splash_mha_\S+ = ", text)) == 2
    assert f"{length // sequence},{length}]" not in text
