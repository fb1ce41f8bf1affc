"""Groups by regex, schedules, EMA."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softmask_jax.config import Optimizer
from softmask_jax.training import optimizer

PARAMS = {"backbone": {"w": jnp.ones((3, 2))}, "soft_mask": {"raw_scale": jnp.zeros(())}}


def test_every_parameter_must_match_a_group():
    assert optimizer.labels(PARAMS) == {"backbone": {"w": "backbone"}, "soft_mask": {"raw_scale": "soft_mask"}}
    with pytest.raises(ValueError, match="adapter/a, adapter/b"):
        optimizer.labels(PARAMS | {"adapter": {"a": jnp.ones(1), "b": jnp.ones(1)}})


def test_warm_up_is_linear_from_zero_and_then_constant_or_cosine():
    constant = optimizer.learning_rate(3e-4, Optimizer(), 10_000)
    np.testing.assert_allclose([constant(n) for n in (0, 1, 1250, 2500, 9000)], np.array([0, 1, 1250, 2500, 2500]) * 3e-4 / 2500)
    cosine = optimizer.learning_rate(1.0, Optimizer(schedule="cosine", warmup_steps=10), 110)
    np.testing.assert_allclose([cosine(n) for n in (5, 10, 60, 110)], [0.5, 1.0, 0.5, 0.0], atol=1e-6)
    assert optimizer.learning_rate(1.0, Optimizer(warmup_steps=0), 10)(0) == 1.0


def test_each_group_moves_at_its_own_rate_and_the_clip_is_over_all_of_them():
    config = Optimizer(warmup_steps=0, learning_rate=1e-3, sm_learning_rate=1e-2)
    tx = optimizer.make(config, 10)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 5.0), PARAMS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, soft_masked=jnp.array(True))
    np.testing.assert_allclose(updates["backbone"]["w"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["soft_mask"]["raw_scale"], -1e-2, rtol=1e-4)
    moments = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
               if isinstance(s, optax.ScaleByAdamState)]  # fmt: skip
    first = jnp.concatenate([leaf.ravel() for s in moments for leaf in jax.tree.leaves(s.mu)])
    np.testing.assert_allclose(jnp.linalg.norm(first), 0.1, rtol=1e-5)  # (1 - b1) of a gradient clipped to norm 1


def test_weight_decay_reaches_the_backbone_alone():
    tx = optimizer.make(Optimizer(warmup_steps=0, learning_rate=1.0, sm_learning_rate=1.0, weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS | {"soft_mask": {"raw_scale": jnp.ones(())}}, soft_masked=True)
    np.testing.assert_allclose(updates["backbone"]["w"], -0.5)
    assert updates["soft_mask"]["raw_scale"] == 0


def test_the_average_follows_quickly_at_first():
    ema = optimizer.ema_update(jnp.zeros(()), jnp.ones(()), jnp.int32(1), 0.9999)
    np.testing.assert_allclose(ema, 1 - 2 / 11, rtol=1e-6)
    late = optimizer.ema_update(jnp.zeros(()), jnp.ones(()), jnp.int32(10**7), 0.9999)
    np.testing.assert_allclose(late, 1e-4, rtol=1e-3)
