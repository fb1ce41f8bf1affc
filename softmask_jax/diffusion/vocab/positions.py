"""Work at the positions that need it, in blocks: as many as there are such positions, a number known on the device.

P positions of one device, flattened."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The fewest positions of a block: fewer would read the head's weights too often for the work that they save.
MIN_BLOCK = 256


def block_size(total: int) -> int:
    """Positions of one block of `total`."""
    return min(total, max(MIN_BLOCK, total // 8))


def over_positions(step: Callable[[jax.Array | slice, Any], Any], carry: Any, where: jax.Array | None, *,
                   block: int = 0) -> Any:
    """carry = step(positions, carry) until all positions where `where` [P] have come up; None: once, with all of them.

    positions [block] int32 (block 0: see `block_size`): the wanted ones in order, then others, then P, past the end."""
    if where is None:
        return step(slice(None), carry)
    total = len(where)
    block = block or block_size(total)
    order = jnp.argsort(~where, stable=True).astype(jnp.int32)
    order, count = jnp.pad(order, (0, -total % block), constant_values=total), where.sum(dtype=jnp.int32)

    def visit(state):
        start, carry = state
        return start + block, step(lax.dynamic_slice_in_dim(order, start, block), carry)

    return lax.while_loop(lambda state: state[0] < count, visit, (jnp.int32(0), carry))[1]


def at_positions(function: Callable[[jax.Array | slice], Any], where: jax.Array | None, *, block: int = 0) -> Any:
    """function(positions) at the blocks of `over_positions`: leaves [P ...], 0 where no block came."""
    if where is None:
        return function(slice(None))

    def step(positions, out):
        results = function(jnp.minimum(positions, len(where) - 1))
        return jax.tree.map(lambda old, new: old.at[positions].set(new, mode="drop"), out, results)

    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct((block or block_size(len(where)),), jnp.int32))
    empty = jax.tree.map(lambda x: jnp.zeros((len(where), *x.shape[1:]), x.dtype), shapes)
    return over_positions(step, empty, where, block=block)


def in_blocks(function: Callable[[jax.Array], Any], total: int, block: int) -> Any:
    """function(positions [block]) at all `total` positions: leaves [P ...]."""
    positions = jnp.arange(total + -total % block, dtype=jnp.int32).reshape(-1, block)
    blocks = lax.map(function, jnp.minimum(positions, total - 1))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], blocks)
