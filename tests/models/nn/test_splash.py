import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from softmask_jax.distributed import sharding
from softmask_jax.models.nn import dora, dream, layers, splash
from softmask_jax.models.nn.cache import attention_for_slices
from softmask_jax.models.nn.dream import DreamConfig
from softmask_jax.models.nn.splash import Layout
from tests.helpers.dream_model import adapter_config

BF16 = jnp.dtype("bfloat16")


def inputs(length=128, heads=2, kv_heads=1):
    """q, k, v of two rows with head width 128 and segments that cut the first row."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, length, n, 128)).astype(BF16) for key, n in zip(keys, (heads, kv_heads, kv_heads))
    )
    return q, k, v, jnp.stack([jnp.arange(length) // 50, jnp.zeros(length, int)]).astype(jnp.int32)


@pytest.mark.full
@pytest.mark.parametrize("segmented", [False, True])
def test_the_kernel_is_the_plain_attention_with_its_gradients(segmented):
    q, k, v, segment_ids = inputs()
    segment_ids = segment_ids if segmented else None
    weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def both(attend):
        def loss(*qkv):
            out = attend(*qkv, segment_ids)
            return (weight * out).sum(), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    for ours, plain in zip(both(functools.partial(splash.attend, interpret=True)), both(layers.attend), strict=True):
        assert ours.dtype == BF16 and ours.shape == plain.shape
        ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
        assert np.linalg.norm(ours - plain) < 0.01 * np.linalg.norm(plain)


def test_attention_is_chosen_for_the_machine_that_the_program_is_for():
    choose = functools.partial(splash.choose, dtype=BF16, head_width=128, length=256, layout=None)
    assert choose("auto") == layers.choose_attention("auto", BF16, 128) and choose("xla") == "xla"
    with pytest.raises(ValueError, match="needs a TPU"):
        choose("splash")
    with pytest.raises(ValueError, match="choose one of"):
        choose("flash")


def test_the_kernel_is_taken_on_a_tpu_where_it_fits(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert splash.choose("auto", BF16, 128, 256, None) == splash.choose("splash", BF16, 128, 256, None) == "splash"
    for dtype, head_width, length in ((jnp.dtype("float32"), 128, 256), (BF16, 64, 256), (BF16, 128, 200)):
        assert splash.choose("auto", dtype, head_width, length, None) == "xla"
        with pytest.raises(ValueError, match="multiples of 128"):
            splash.choose("splash", dtype, head_width, length, None)


def test_splash_attention_becomes_what_slices_can_have():
    assert attention_for_slices("splash", jnp.dtype("bfloat16"), 128) == "xla"
    assert attention_for_slices("xla", jnp.dtype("float32"), 8) == "xla"


def test_key_value_heads_that_the_mesh_does_not_divide_are_an_error():
    with pytest.raises(ValueError, match="3 key/value heads to be divisible by the mesh's tensor = 2"):
        mesh = jax.sharding.AbstractMesh((1, 2), ("data", "tensor"))
        Layout(mesh, ("data",), "tensor").over_devices(splash.attend, 3)


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
