"""Work at the positions that need it, in blocks: as many as there are such positions, a number known on the device.

P positions of one device, flattened; S = P rounded up to whole blocks."""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The fewest positions of a block: smaller ones read the head's weights more often than the saved work is worth.
MIN_BLOCK = 256
# Scope of the loop over blocks, by which `compile` knows it in a program.
SCOPE = "blocks_of_positions"


def block_size(total: int) -> int:
    """Positions of one block of `total`."""
    return min(total, max(MIN_BLOCK, total // 8))


@dataclasses.dataclass(frozen=True)
class Positions:
    """The wanted positions in front, then the others, then P, past the end; by default all, in one block."""

    total: int  # P
    block: int  # positions of a block
    order: jax.Array | None = None  # [S] int32
    count: jax.Array | None = None  # [] int32, how many are wanted

    @classmethod
    def of(cls, total: int, where: jax.Array | None, block: int = 0) -> "Positions":
        """The positions `where` ([P] or, flattened here, [B L]); None: all. block: 0 is `block_size`."""
        if where is None:
            return cls(total, total)
        where, block = where.reshape(-1), block or block_size(total)
        order = jnp.argsort(~where, stable=True).astype(jnp.int32)
        return cls(total, block, jnp.pad(order, (0, -total % block), constant_values=total), where.sum(dtype=jnp.int32))

    def take(self, x: jax.Array) -> jax.Array:
        """[P ...] -> [S ...] in this order, zeros past the end."""
        return x if self.order is None else x.at[self.order].get(mode="fill", fill_value=0)

    def put(self, x: jax.Array) -> jax.Array:
        """[S ...] in this order -> [P ...], zeros at positions that are not wanted."""
        if self.order is None:
            return x
        wanted = jnp.where(jnp.arange(len(self.order)) < self.count, self.order, self.total)
        return jnp.zeros((self.total, *x.shape[1:]), x.dtype).at[wanted].set(x, mode="drop")

    @property
    def single(self) -> bool:
        """Whether there is just one block, which is then computed without a loop even if nobody wants it."""
        return self.order is None or len(self.order) == self.block

    def loop(self, body: Callable[[jax.Array | int, Any], Any], carry: Any) -> Any:
        """carry = body(start, carry) for the first index of every block with a wanted position."""
        if self.single:
            return body(0, carry)
        state = jnp.zeros((), jnp.int32), carry
        with jax.named_scope(SCOPE):
            return lax.while_loop(lambda s: s[0] < self.count, lambda s: (s[0] + self.block, body(*s)), state)[1]

    def part(self, x: jax.Array, start: jax.Array | int) -> jax.Array:
        """[S ...] -> [block ...], the block that starts there."""
        return x if self.single else lax.dynamic_slice_in_dim(x, start, self.block)

    def with_part(self, x: jax.Array, part: jax.Array, start: jax.Array | int) -> jax.Array:
        """[S ...] with this block replaced."""
        return part if self.single else lax.dynamic_update_slice_in_dim(x, part, start, 0)

    def compute(self, function: Callable[[jax.Array], Any]) -> Any:
        """function(positions [block]) by blocks: leaves [S ...] in this order, 0 in blocks that nobody wants."""
        index = jnp.arange(self.total, dtype=jnp.int32)
        if self.order is None:
            return function(index)
        index = jnp.minimum(self.order, self.total - 1)
        shapes = jax.eval_shape(function, jax.ShapeDtypeStruct((self.block,), jnp.int32))
        empty = jax.tree.map(lambda x: jnp.zeros((len(index), *x.shape[1:]), x.dtype), shapes)

        def body(start, out):
            return jax.tree.map(lambda x, part: self.with_part(x, part, start), out, function(self.part(index, start)))

        return self.loop(body, empty)


def at_positions(function: Callable[[jax.Array], Any], total: int, where: jax.Array | None, block: int) -> Any:
    """function(positions [block]) by blocks of dense work: leaves [P ...], 0 where not wanted."""
    positions = Positions.of(total, jnp.ones(total, bool) if where is None else where, block)
    return jax.tree.map(positions.put, positions.compute(function))
