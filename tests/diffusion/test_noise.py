"""The forward process against recorded draws, and noise that depends on a row's global index alone."""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from softmask_jax.diffusion import noise as diffusion
from softmask_jax.diffusion.noise import LogLinear, Stream
from tests.golden import load

ROOT = jax.random.key(1)
MASK, B, L = 97, 8, 64


def uniforms(key):
    return jax.random.uniform(key, (L,))


@jax.jit
def noise(rows, step):
    """t, x_t, the coin and the dropout key's data of each of the global rows [B]."""
    keys = [diffusion.row_keys(diffusion.stream_key(ROOT, stream, step), rows) for stream in Stream]
    t = diffusion.stratified_t(keys[Stream.T], rows, B)
    tokens = jnp.zeros((rows.shape[0], L), jnp.int32)
    xt = diffusion.corrupt(tokens, LogLinear().alpha(t), jax.vmap(uniforms)(keys[Stream.MASK]), MASK)
    return t, xt, diffusion.coin(keys[Stream.COIN], 0.5), jax.random.key_data(keys[Stream.DROPOUT])


def test_recorded_uniforms_give_the_recorded_corruption():
    golden = load("mdlm_dit/forward.npz")
    schedule, t = LogLinear(), jnp.asarray(golden["t"])
    alpha = schedule.alpha(t)
    np.testing.assert_allclose(alpha, golden["alpha_t"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(schedule.alpha))(t), np.full(3, golden["dalpha_t"]), rtol=1e-7)
    xt = diffusion.corrupt(jnp.asarray(golden["x0"], jnp.int32), alpha, jnp.asarray(golden["u"]), MASK)
    assert xt.dtype == jnp.int32
    np.testing.assert_array_equal(xt, golden["xt"])


def test_the_loss_weight_is_minus_dalpha_over_one_minus_alpha():
    t = jnp.linspace(1e-3, 1.0, 50)
    for schedule in (LogLinear(), LogLinear(eps=0.0), LogLinear(eps=0.1)):
        dalpha = jax.vmap(jax.grad(schedule.alpha))(t)
        np.testing.assert_allclose(schedule.loss_weight(t), -dalpha / (1 - schedule.alpha(t)), rtol=1e-4)
        np.testing.assert_allclose(schedule.alpha(jnp.asarray([0.0, 1.0])), [1.0, schedule.eps], atol=1e-7)
    with pytest.raises(ValueError, match="eps"):
        LogLinear(eps=1.0)


def test_a_row_s_noise_is_the_same_however_the_batch_is_split():
    whole = noise(jnp.arange(B), 3)
    for size in (1, 4):
        parts = [noise(jnp.arange(i, i + size), 3) for i in range(0, B, size)]
        chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[::-1], noise(jnp.arange(B)[::-1], 3)), whole)


def test_a_row_s_noise_is_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(jnp.arange(B), NamedSharding(mesh, PartitionSpec("data")))
    sharded = noise(rows, 3)
    assert len(sharded[1].sharding.device_set) == 8
    chex.assert_trees_all_equal(sharded, noise(jnp.arange(B), 3))


def test_streams_steps_and_rows_have_noise_of_their_own():
    keys = set()
    for stream in Stream:
        for step in range(3):
            rows = diffusion.row_keys(diffusion.stream_key(ROOT, stream, step), jnp.arange(2))
            keys |= set(map(tuple, jax.random.key_data(rows).tolist()))
    assert len(keys) == 36
    assert [(s.name, s.value) for s in Stream] == [("T", 0), ("MASK", 1), ("COIN", 2), ("DROPOUT", 3),
                                                   ("SAMPLE", 4), ("LENGTH", 5)]


def test_stratified_times_fall_once_into_each_stratum():
    n, eps = 512, 1e-3
    rows = jnp.arange(n)
    keys = diffusion.row_keys(ROOT, rows)
    t = np.asarray(diffusion.stratified_t(keys, rows, n, eps))
    assert t.dtype == np.float32
    u = (t.astype(np.float64) - eps) / (1 - eps)
    inside = u * n - np.arange(n)
    assert (inside > -1e-3).all() and (inside < 1 + 1e-3).all()
    assert abs(inside.mean() - 0.5) < 0.05 and inside.std() > 0.25
    free = np.asarray(diffusion.stratified_t(keys, rows, n, eps, stratified=False))
    np.testing.assert_allclose((free - eps) / (1 - eps), inside, atol=1e-3)
    assert free.min() >= eps and free.max() <= 1


def test_the_mask_rate_is_one_minus_alpha():
    alpha = jnp.asarray([0.999, 0.75, 0.5, 0.1, 0.0, 1.0])
    tokens = jnp.zeros((6, 20_000), jnp.int32)
    xt = diffusion.corrupt(tokens, alpha, jax.random.uniform(ROOT, tokens.shape), MASK)
    rate = np.asarray(xt == MASK).mean(axis=-1)
    np.testing.assert_allclose(rate, 1 - alpha, atol=0.015)
    assert rate[4] == 1 and rate[5] == 0


def test_a_coin_lands_with_its_probability():
    keys = diffusion.row_keys(ROOT, jnp.arange(4000))
    assert not diffusion.coin(keys, 0.0).any()
    assert diffusion.coin(keys, 1.0).all()
    assert abs(diffusion.coin(keys, 0.8).mean() - 0.8) < 0.03
    assert diffusion.coin(keys[7], 0.8) == diffusion.coin(keys, 0.8)[7]


def test_sampling_times_go_down_evenly_from_one():
    times = diffusion.sampling_times(8)
    np.testing.assert_allclose(times, np.linspace(1, 1e-5, 9), rtol=1e-6)
    assert times.dtype == jnp.float32 and times[0] == 1
    with pytest.raises(ValueError, match="at least 1 step"):
        diffusion.sampling_times(0)
