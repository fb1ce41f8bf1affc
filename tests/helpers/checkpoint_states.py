"""Small states for the tests of checkpoints."""
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softmask_jax.io.checkpoint import Checkpoints


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def make_state(step: int) -> State:
    """With a bfloat16 leaf, scalars, and an optimiser of nested NamedTuples; its numbers tell the step."""
    params = {
        "backbone": {"w": jnp.full((4, 8), step, jnp.bfloat16), "b": jnp.arange(5.0) + step},
        "soft_mask": {"raw_scale": jnp.float32(step)},
    }
    labels = {"backbone": "backbone", "soft_mask": "soft_mask"}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"backbone": optax.adamw(1e-3), "soft_mask": optax.adam(1e-2)}, labels),
    )
    _, opt_state = tx.update(params, tx.init(params), params)
    return State(jnp.int32(step), params, {"w": jnp.full((4, 8), step + 0.5)}, opt_state)


def trees(state: State) -> dict:
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}


def abstract(state: State) -> dict:
    return jax.eval_shape(lambda: trees(state))


STATES = {step: make_state(step) for step in range(1, 5)}
ABSTRACT = abstract(STATES[1])


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_three(folder: Path) -> Path:
    """Steps 1, 2, 3, each better than the one before."""
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, STATES[step], {"step": step}, {"validation/nelbo": 4.0 - step})
    return folder
