"""Non-finite values are found wherever they are in what a checkpoint holds."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax import config, optimizer, train_state
from softmask_jax.soft_masking import init_scalars


@pytest.fixture(scope="module")
def trees():
    """As they are saved: float arrays, and the optimiser's integer counters."""
    params = {"backbone": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "soft_mask": init_scalars(scale=0.5)}
    state = train_state.fresh(params, optimizer.make(config.Optimizer(), 10))
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}


def test_finite_trees_are_finite(trees):
    assert bool(train_state.all_finite(trees))


@pytest.mark.parametrize("tree", ["params", "ema", "optimizer"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_in_any_array_is_found(trees, tree, value):
    leaves, structure = jax.tree.flatten(trees[tree])
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floating) == {"params": 6, "ema": 2, "optimizer": 12}[tree]
    for i in floating:
        bad = leaves[i].at[(-1,) * leaves[i].ndim].set(value)
        changed = jax.tree.unflatten(structure, [*leaves[:i], bad, *leaves[i + 1 :]])
        assert not bool(train_state.all_finite(trees | {tree: changed}))
