"""The train step against the recorded trace, gradient accumulation, the coin, and the mesh."""
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softmask_jax import config
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser
from softmask_jax.training import optimizer, train_state, train_step
from tests.golden import load
from tests.helpers import golden_model, torch_weights
from tests.helpers.arrays import made_once

OPTIMIZER = config.Optimizer(warmup_steps=2, ema_decay=0.9999)
UNCLIPPED = 1e9  # Adam hides a factor of the gradient, and so does clipping: norms are 7 to 11 here


@functools.cache
def built(p_sm=0.8, micro_batches=1, clip_norm=UNCLIPPED):
    c = config.Config(
        model=golden_model.MODEL, optimizer=dataclasses.replace(OPTIMIZER, clip_norm=clip_norm),
        soft_mask=config.SoftMask(p_sm=p_sm),
        train=config.Train(steps=10, global_batch_size=8, micro_batches=micro_batches),
    )  # fmt: skip
    tx = optimizer.make(c.optimizer, c.train.steps)
    return train_step.make(c, golden_model.model(), tx), tx


@functools.cache
def compiled(micro_batches):
    step, _ = built(micro_batches=micro_batches)
    return jax.jit(step.train_step)


def run(state, key, *coins):
    """One update with these coins, a micro-batch each."""
    return compiled(len(coins))(state, batch(), key, jnp.tile(jnp.array(coins), 8 // len(coins)))


@made_once
def start(at=0):
    return train_state.fresh(golden_model.params(), built()[1])._replace(step=jnp.int32(at))


@made_once
def batch():
    tokens = np.random.default_rng(0).integers(0, 97, (8, 16), np.int32)
    return {"tokens": jnp.asarray(tokens), "rows": jnp.arange(8, dtype=jnp.int32)}


def same(a, b, tolerance=2e-6):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=tolerance)


def test_four_updates_match_the_recorded_trace(monkeypatch):
    z = load("mdlm_dit/train_trace.npz")
    t = jnp.asarray(z["t"])
    noisy = Nelbo(SoftMask()).noisy(jnp.asarray(z["x0"], jnp.int32), jnp.asarray(z["xt"], jnp.int32), t, golden_model.MASK)
    monkeypatch.setattr(Nelbo, "draw", lambda *_, **__: noisy)
    step = jax.jit(lambda state, batch: built(p_sm=1.0, clip_norm=1.0)[0].train_step(state, batch, jax.random.key(0)))
    state = start()
    given = {"tokens": noisy.x0, "rows": jnp.arange(3)}
    for i in range(4):
        state, metrics = step(state, given)
        np.testing.assert_allclose(metrics.loss, z[f"step{i}/loss"], rtol=1e-4)
        np.testing.assert_allclose(metrics.grad_norm, z[f"step{i}/grad_norm"], rtol=1e-3)
        for group, rate in zip((OPTIMIZER.learning_rate, OPTIMIZER.sm_learning_rate), z[f"step{i}/lr"]):
            np.testing.assert_allclose(optimizer.learning_rate(group, OPTIMIZER, 10)(i), rate, rtol=1e-6)
    # The arrays named step0/param and step0/ema hold step 3's values too: at step 0 the rate is 0.
    check(state.params, z, "step3/param/")
    check({"backbone": state.ema}, z, "step3/ema/")


def check(params, z, prefix):
    ours = torch_weights.to_torch(jax.tree.map(np.asarray, params), golden_model.VOCAB)
    wanted = {key.removeprefix(prefix): z[key] for key in z if key.startswith(prefix)}
    assert wanted and wanted.keys() <= ours.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=2e-6, err_msg=prefix + name)


@pytest.mark.full
@pytest.mark.parametrize("coin", [False, True])
def test_accumulated_micro_batches_equal_the_large_batch(coin):
    key = jax.random.key(5)
    whole, m1 = run(start(), key, coin)
    parts, m4 = run(start(), key, *[coin] * 4)
    same(gradients(whole), gradients(parts))
    np.testing.assert_allclose(m1.grad_norm, m4.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(m1.loss, m4.loss, rtol=1e-5)
    np.testing.assert_allclose(m1.xent_count, m4.xent_count)


def first_moments(state):
    is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)  # noqa: E731
    return jax.tree.leaves([s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s)])


def gradients(state):
    """Of the first, unclipped update."""
    return [moment / (1.0 - OPTIMIZER.b1) for moment in first_moments(state)]


def test_an_explicit_vector_of_coins_gives_the_mean_of_its_micro_batches():
    """Two two-pass and two single-pass micro-batches: loss and gradient are the mean of the two kinds on their rows."""
    key, coins = jax.random.key(5), [True, False, True, False]
    mixed, metrics = run(start(), key, *coins)
    step, _ = built()
    noisy, soft_mask = step.objective.corrupt(batch(), key, 0, mask_token_id=97), step.objective.soft_mask

    def mean(params):
        total = 0.0
        for first, coin in enumerate(coins[:2]):
            rows = jax.tree.map(lambda x: x[first::2], noisy)
            feedback = two_pass.pass_1(golden_model.model(), soft_mask, params, rows.xt) if coin else None
            total += (two_pass.token_nll(golden_model.model(), soft_mask, params, rows, feedback) * rows.weights).sum()
        return total / 8

    loss, wanted = jax.jit(jax.value_and_grad(mean))(golden_model.params())
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.global_norm(wanted), rtol=1e-5)
    same(gradients(mixed), jax.tree.leaves(wanted), 1e-5)
    assert float(metrics.two_pass) == 0.5 and float(metrics.grad_norm) > 1


def test_a_single_pass_step_leaves_scalars_and_their_moments_untouched():
    key = jax.random.key(1)
    warm, _ = run(start(3), key, True)
    off, _ = run(warm, key, False)
    on, _ = run(warm, key, True)
    is_scalar = lambda path: any(getattr(entry, "key", "") == "raw_scale" for entry in path)  # noqa: E731
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(warm), jax.tree.leaves(off), strict=True):
        if is_scalar(path):
            np.testing.assert_array_equal(before, after)
    assert on.params["soft_mask"]["raw_scale"] != warm.params["soft_mask"]["raw_scale"]
    assert np.any(off.params["backbone"]["embed"]["table"] != warm.params["backbone"]["embed"]["table"])


def test_the_coin_falls_with_probability_p_sm():
    step, _ = built(micro_batches=8)
    coins = jax.jit(jax.vmap(lambda i: step._coins(batch(), jax.random.key(0), i)))(jnp.arange(500))
    assert abs(float(coins.mean()) - 0.8) < 0.02
    assert 0 < float(coins.std(axis=1).mean())
    assert not built(p_sm=0.0, micro_batches=8)[0]._coins(batch(), jax.random.key(0), 0).any()


def test_metrics_count_what_they_say():
    _, m = run(start(), jax.random.key(2), True)
    assert float(m.xent_count.sum()) == float(m.masked) == float(m.fed_back) == pytest.approx(float(m.lambda_hist.sum()))
    assert 0 < float(m.lambda_sum) < float(m.fed_back)
    assert 0 <= float(m.top_k_hits) <= float(m.fed_back)
    assert bool(m.finite)


def test_a_non_finite_gradient_is_seen_on_the_device():
    state = start()
    broken = state.params["backbone"] | {"final": jax.tree.map(lambda x: x * jnp.nan, state.params["backbone"]["final"])}
    _, m = run(state._replace(params=state.params | {"backbone": broken}), jax.random.key(2), True)
    assert not bool(m.finite)


def test_dropout_is_on_in_training_only_when_its_rate_is_positive():
    c = dataclasses.replace(golden_model.MODEL, dropout=0.5)
    model = denoiser.build(c, config.SoftMask(), vocab_size=98, mask_token_id=97)
    step, _ = built(p_sm=1.0)
    dropping = dataclasses.replace(step, denoiser=model)
    _, with_dropout = jax.jit(dropping.train_step)(start(), batch(), jax.random.key(2))
    _, without = run(start(), jax.random.key(2), True)
    assert float(with_dropout.loss) != float(without.loss)


# data, fsdp, tensor, sequence, slices
FEW, MANY = [(2, 2, 2)], [(4, 1, 1, 1, 2), (1, 2, 1, 1, 4), (1, 2, 2, 1, 2), (1, 1, 1, 1, 8), (1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 2, 2), (2, 2, 1, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4), (2, 4, 1)]


@pytest.mark.full
@pytest.mark.parametrize("sizes", FEW + [pytest.param(sizes, marks=pytest.mark.full) for sizes in MANY])
def test_losses_and_updates_are_the_same_on_every_mesh(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    sequence, slices = (*sizes[3:], 1, 1)[:2]
    mesh = sharding.make_mesh(*sizes[:3], devices=devices, sequence=sequence, dcn_data=slices)
    model = denoiser.build(golden_model.MODEL, config.SoftMask(), vocab_size=98, mask_token_id=97, mesh=mesh)
    step, tx = built()
    step = dataclasses.replace(step, denoiser=model)
    layout = jax.tree.map(lambda s: s.sharding, train_state.abstract(model, tx, mesh))
    plain = start(2)
    state = jax.device_put(plain, layout)
    given = {name: jax.device_put(x, sharding.batch_sharding(mesh)) for name, x in batch().items()}
    key, sharded = jax.random.key(5), jax.jit(step.train_step)
    for tolerance in (1e-5, 2e-4):  # Adam turns the rounding of tiny gradients into whole updates
        coins = step._coins(batch(), key, plain.step)[: step.micro_batches]
        state, got = sharded(state, given, key)
        plain, wanted = run(plain, key, *coins)
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=tolerance)
        np.testing.assert_array_equal(got.xent_count, wanted.xent_count)  # the same noise
        np.testing.assert_allclose(got.grad_norm, wanted.grad_norm, rtol=1e-3)
    same(first_moments(state), first_moments(plain), 2e-4)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
