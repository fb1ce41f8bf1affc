"""A trunk's key/value cache: slices against whole passes, in both networks."""
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.config.sections import Model, SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import dream_denoiser
from softmask_jax.models.nn import dit, dora, dream
from softmask_jax.models.nn.cache import Cache, Window
from softmask_jax.models.nn.dit import DiTConfig
from softmask_jax.models.nn.dream import DreamConfig
from tests.helpers.dream_model import adapter_config

B, L, D, START, SIZE = 2, 12, 32, 5, 4
REAL = np.ones((B, L), np.int32)
REAL[1, :3] = 0
PADDED = dict(zip(("positions", "segment_ids"), dream.padded_inputs(REAL)))
DORA = adapter_config(rank=4, alpha=4)


def dream_config(**options) -> DreamConfig:
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48, "rope_base": 1e6, "norm_eps": 1e-6}
    return DreamConfig(vocab_size=9, hidden_size=D, **sizes | options)


@functools.cache
def network(name: str, depth: int = 2, dtype: str = "float32", **options):
    """(trunk, parameters): dream has two query heads a key head, adapted is the same with a trained DoRA, dit gates."""
    key = jax.random.key(0)
    if name == "dit":
        config = DiTConfig(vocab_size=9, hidden_size=D, num_blocks=depth, num_heads=2, cond_dim=8, mlp_ratio=4, rope_base=1e4,
                           compute_dtype=dtype, **options)
        params = dit.init(config, key)
        filled = jax.random.normal(key, params["blocks"]["adaln"]["bias"].shape)
        params["blocks"]["adaln"]["bias"] = 0.5 * filled  # gates are zero at the start, and nothing would show
        return dit.trunk(config), params
    config = dream_config(num_layers=depth, compute_dtype=dtype, **options)
    params = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 2 else leaf, dream.init(config, key))
    if name == "dream":
        return dream.trunk(config), params
    adapter = dora.init(params, DORA, key)
    adapter = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape), adapter)
    return dream.trunk(config, adapter=DORA), {**params, "adapter": adapter}


@functools.cache
def compiled(trunk):
    return jax.jit(trunk), jax.jit(functools.partial(trunk, cache=True))


@functools.cache
def sliced(trunk):
    """The slice [start, start + S) of x in one compiled program for all starts."""
    def run(params, x, kept, start, fresh=None, **whole):
        def cut(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, start, x.shape[1], 1)

        own = {name: cut(leaf) for name, leaf in whole.items()}
        return trunk(params, x, cache=Window(kept, start, fresh, whole.get("segment_ids")), **own)

    return jax.jit(run)


def inputs(seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, L, D)), jnp.float32)


NETWORKS = ("dream", "adapted", "dit")
LAYOUTS = {"whole": {}, "padded": PADDED}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slice_of_unchanged_inputs_gives_the_whole_passs_hidden_states(name, layout):
    trunk, params = network(name)
    x, layout = inputs(), LAYOUTS[layout]
    plain, keeping = compiled(trunk)
    hidden, nothing = plain(params, x, **layout)
    assert nothing is None
    whole, kept = keeping(params, x, **layout)
    np.testing.assert_array_equal(whole, hidden)
    assert kept.k.shape == kept.v.shape and kept.k.shape[:3] == (2, B, L) and kept.k.dtype == jnp.float32
    for start in (START, 0, L - SIZE):
        part, after = sliced(trunk)(params, x[:, start : start + SIZE], kept, start, **layout)
        np.testing.assert_allclose(part, hidden[:, start : start + SIZE], atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after, kept)


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_one_layer_a_changed_slice_is_what_a_whole_pass_makes_of_it(name, layout):
    # The keys of a first layer depend on their own positions alone: here the cache is exact.
    trunk, params = network(name, 1)
    plain, keeping = compiled(trunk)
    before, layout = inputs(), LAYOUTS[layout]
    changed = before.at[:, START : START + SIZE].set(inputs(2)[:, :SIZE])
    kept = keeping(params, before, **layout)[1]
    part, after = sliced(trunk)(params, changed[:, START : START + SIZE], kept, START, **layout)
    expected, exact = keeping(params, changed, **layout)
    np.testing.assert_allclose(part, expected[:, START : START + SIZE], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after, exact)
    stale = plain(params, before, **layout)[0]
    assert np.abs(part - stale[:, START : START + SIZE]).max() > 0.1


def attended_by_hand(params: dict, x, kept: Cache, start: int) -> np.ndarray:
    """The hidden states of a slice in Dream, a layer at a time: its keys and values stand in those of all others."""
    config, x = dream_config(), np.asarray(x)
    angles = dream.layers.rotary_angles(start + jnp.arange(x.shape[1]), config.head_width, config.rope_base)
    for i in range(config.num_layers):
        layer = dream.layer(config, jax.tree.map(lambda leaf: leaf[i], params["layers"]))
        inside = layer.attn_norm(x)
        q, k, v = (getattr(layer, name)(inside).reshape(*x.shape[:2], -1, config.head_width) for name in "qkv")
        q, k = (np.asarray(dream.layers.rotate(y, angles)) for y in (q, k))
        keys, values = np.array(kept.k[i]), np.array(kept.v[i])
        keys[:, start : start + x.shape[1]], values[:, start : start + x.shape[1]] = k, v
        keys, values = (y.repeat(config.num_heads // config.num_kv_heads, axis=2) for y in (keys, values))
        scores = np.einsum("bskd,blkd->bksl", q, keys) / np.sqrt(config.head_width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bksl,blkd->bskd", weights / weights.sum(-1, keepdims=True), values)
        x = x + np.asarray(layer.o(jnp.asarray(mixed.reshape(x.shape), jnp.float32)))
        inside = layer.mlp_norm(x)
        x = x + np.asarray(layer.down(jax.nn.silu(layer.gate(inside)) * layer.up(inside)))
    return dream.layers.rms_norm(jnp.asarray(x), params["final_norm"]["scale"], config.norm_eps)


def test_deeper_a_changed_slice_sees_the_cached_keys_of_all_layers():
    trunk, params = network("dream")
    kept = compiled(trunk)[1](params, inputs())[1]
    x = inputs(2)[:, :SIZE]
    part = sliced(trunk)(params, x, kept, START)[0]
    np.testing.assert_allclose(part, attended_by_hand(params, x, kept, START), atol=5e-5)


@pytest.mark.parametrize("name", ("dream", "dit"))
def test_a_slice_that_begins_too_early_gives_what_the_exact_one_gives(name):
    trunk, params = network(name)
    kept = compiled(trunk)[1](params, inputs(), **PADDED)[1]
    x = inputs(2)
    exact, after = sliced(trunk)(params, x[:, START:], kept, START, **PADDED)
    early = START - 3
    part, same = sliced(trunk)(params, x[:, early:], kept, early, START, **PADDED)
    np.testing.assert_allclose(part[:, 3:], exact, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), same, after)


def test_padding_is_neither_seen_by_a_slice_nor_sees_it():
    trunk, params = network("dream")
    x = inputs()
    other = x.at[1, :3].set(7.0)
    kept, changed = (compiled(trunk)[1](params, given, **PADDED)[1] for given in (x, other))
    assert np.abs(kept.v - changed.v).max() > 0.1
    parts = [sliced(trunk)(params, x[:, START : START + SIZE], given, START, **PADDED)[0] for given in (kept, changed)]
    np.testing.assert_array_equal(*parts)


def test_an_unrolled_network_keeps_the_same():
    trunk, params = network("dream")
    unrolled = network("dream", unroll=True)[0]
    whole, kept = compiled(trunk)[1](params, inputs())
    other, same = compiled(unrolled)[1](params, inputs())
    np.testing.assert_allclose(whole, other, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, same)


@pytest.mark.parametrize("name", ("dream", "dit"))
def test_a_bfloat16_networks_cache_is_bfloat16(name):
    trunk, params = network(name, 2, "bfloat16")
    hidden, kept = compiled(trunk)[1](params, inputs(), **PADDED)
    assert kept.k.dtype == kept.v.dtype == jnp.bfloat16
    part = sliced(trunk)(params, inputs()[:, :SIZE], kept, 0, **PADDED)[0]
    np.testing.assert_allclose(part.astype(np.float32), hidden[:, :SIZE].astype(np.float32), atol=0.1)


def test_a_cache_that_nobody_reads_is_not_written():
    depth = 16
    trunk, params = network("dream", depth)
    kept = Cache(*[jax.ShapeDtypeStruct((depth, B, 40 * L, 2, 8), jnp.float32)] * 2)

    def temporary(run) -> int:
        shapes = jax.ShapeDtypeStruct((B, SIZE, D), jnp.float32), kept, jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(run).lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes

    def both(params, x, kept, start):
        return trunk(params, x, cache=Window(kept, start))

    assert temporary(lambda *args: both(*args)[0]) < kept.k.size * 4 // 2


# Dream's shift


def test_the_shift_of_a_slice_takes_the_state_before_it_or_leaves_the_first_its_own():
    hidden = jnp.arange(2 * 5, dtype=jnp.float32).reshape(2, 5, 1)
    kept = Cache(*[jnp.zeros((1, 2, 9, 1, 1))] * 2)
    moved = [[0, 0, 1, 2, 3], [5, 5, 6, 7, 8]]
    np.testing.assert_array_equal(dream.shift(hidden)[..., 0], moved)
    np.testing.assert_array_equal(dream.shift(hidden, Window(kept, 3))[..., 0], moved)
    before = jnp.asarray([[70.0], [80.0]])
    np.testing.assert_array_equal(dream.shift(hidden, Window(kept, 3, before=before))[..., 0],
                                  [[70, 0, 1, 2, 3], [80, 5, 6, 7, 8]])
    np.testing.assert_array_equal(dream.shift(hidden, Window(kept, 3, 5, before=before))[..., 0],
                                  [[0, 0, 70, 2, 3], [5, 5, 80, 7, 8]])
    np.testing.assert_array_equal(dream.shift(hidden, Window(kept, 3, 5))[..., 0], [[0, 0, 2, 2, 3], [5, 5, 7, 7, 8]])


def hf(layers: int = 2) -> dict:
    return {"model_type": "Dream", "vocab_size": 9, "hidden_size": D, "num_hidden_layers": layers, "mask_token_id": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 64}


def denoiser(mesh=None):
    sizes = Model(kind="dream", base="-", compute_dtype="float32", param_dtype="float32", remat="none")
    return dream_denoiser.build(sizes, SoftMask(k=1), hf(), mesh=mesh)


def test_the_denoisers_slice_is_shifted_as_its_whole_pass_is():
    model, params = denoiser(), network("dream")[1]
    whole, kept = jax.jit(lambda p, x: model.trunk(p, x, cache=True))(params, inputs())
    cut = slice(START, START + SIZE)
    part = jax.jit(lambda p, x, kept, before: model.trunk(p, x, cache=Window(kept, START, before=before))[0])(
        params, inputs()[:, cut], kept, whole[:, START])
    np.testing.assert_allclose(part, whole[:, cut], atol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 4, 1), marks=pytest.mark.full)])
def test_on_a_mesh_a_slice_gives_the_same_and_the_cache_is_cut_by_rows(sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    model, params = denoiser(mesh), network("dream")[1]
    placed = jax.device_put(params, sharding.param_shardings(mesh, model.axes["backbone"], params))
    rows = sharding.batch_sharding(mesh)
    x, changed = (jax.device_put(jnp.tile(inputs(seed), (2, 1, 1)), rows) for seed in (1, 2))

    def run(model, params, x, changed, start):
        whole, kept = model.trunk(params, x, cache=True)
        return whole, kept, model.trunk(params, changed[:, :SIZE], cache=Window(kept, start, before=whole[:, START]))[0]

    whole, kept, part = jax.jit(functools.partial(run, model))(placed, x, changed, START)
    here = (jnp.asarray(np.asarray(y)) for y in (x, changed))
    plain = jax.jit(functools.partial(run, denoiser()))(params, *here, START)
    chex.assert_trees_all_close((whole, kept, part), plain, rtol=1e-7, atol=2e-5)
    per_device = kept.k.sharding.shard_shape(kept.k.shape)
    assert per_device[1] == 4 // (sizes[0] * sizes[1]) and per_device[3] == 2 // min(2, sizes[2])


# Bad input


def window(**changes) -> Window:
    shape = (2, B, L, 2, 8)
    return Window(**{"kept": Cache(jnp.zeros(shape), jnp.zeros(shape)), "start": START, **changes})


def kept(*shape, dtype=jnp.float32) -> Cache:
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@pytest.mark.parametrize("cache, options, says", [
    ((), {}, "cache is None, True"),
    (False, {}, "cache is None, True"),
    (window(kept=kept(3, B, L, 2, 8)), {}, r"cache's k must be \(2, 2, 12, 2, 8\)"),
    (window(kept=kept(2, 1, L, 2, 8)), {}, "cache's k must be"),
    (window(kept=kept(2, B, L, 4, 8)), {}, "cache's k must be"),
    (window(kept=kept(2, B, L, 2)), {}, "cache's k must be"),
    (window(kept=kept(2, B, L, 2, 8, dtype=jnp.bfloat16)), {}, "float32 for this network"),
    (window(kept=kept(2, B, SIZE - 1, 2, 8)), {}, "slice of 4 positions does not fit a cache of 3"),
    (window(start=L - SIZE + 1), {}, "starts between 0 and 8, not at 9"),
    (window(start=-1), {}, "starts between"),
    (window(start=jnp.zeros(B, jnp.int32)), {}, "start must be one integer"),
    (window(start=1.0), {}, "start must be one integer"),
    (window(fresh=jnp.zeros(B, jnp.int32)), {}, "fresh must be one integer"),
    (window(), {"segment_ids": jnp.zeros((B, SIZE), jnp.int32)}, "or neither"),
    (window(segment_ids=jnp.zeros((B, L), jnp.int32)), {}, "or neither"),
    (window(segment_ids=jnp.zeros((B, SIZE), jnp.int32)), {"segment_ids": jnp.zeros((B, SIZE), jnp.int32)},
     "segment_ids must be"),
    (window(before=jnp.zeros((B, SIZE, D))), {}, r"before must be \(2, 32\)"),
    (window(), {"positions": jnp.arange(L)}, "positions must have shape"),
])  # fmt: skip
def test_a_cache_that_does_not_fit_is_an_error(cache, options, says):
    trunk, params = network("dream")
    with pytest.raises(ValueError, match=says):
        trunk(params, jnp.zeros((B, SIZE, D)), cache=cache, **options)


def test_a_network_that_is_told_the_noise_level_keeps_nothing():
    trunk, params = network("dit")
    with pytest.raises(ValueError, match="noise level"):
        trunk(params, inputs(), sigma=jnp.zeros(B), cache=True)
    with pytest.raises(ValueError, match=r"cache's k must be \(2, 2, 12, 2, 16\)"):
        trunk(params, inputs()[:, :SIZE], cache=window())
