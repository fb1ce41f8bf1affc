"""Softmax statistics that are updated chunk by chunk and merged across devices, and the k largest of a row."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # columns of one block, of the noise for draws and of `top_k`
LOWEST = -1e30  # the maximum of no columns: finite, so that differences and products with a zero sum stay finite


class OnlineSoftmax(NamedTuple):
    """softmax(x) over the columns seen so far; every field has the shape of x without its last axis."""

    max: jax.Array  # the largest x
    sum_exp: jax.Array  # sum of e^(x - max)
    sum_x_exp: jax.Array  # sum of (x - max) e^(x - max), for the entropy

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "OnlineSoftmax":
        return cls(jnp.full(shape, LOWEST, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @classmethod
    def of(cls, x: jax.Array) -> "OnlineSoftmax":
        """All columns of x [... V] at once, -inf where there is none: half as many reads of x as `update`."""
        largest = x.max(-1)
        below = x - largest[..., None]
        e = jnp.exp(below)
        return cls(largest, e.sum(-1), jnp.where(e > 0, below * e, 0.0).sum(-1))

    def update(self, x: jax.Array, exists: jax.Array) -> tuple["OnlineSoftmax", jax.Array]:
        """With a chunk x [... c] added; also e^(x - max) [... c] under the new maximum, 0 where not `exists`."""
        largest = jnp.maximum(self.max, jnp.max(jnp.where(exists, x, LOWEST), -1))
        below = jnp.where(exists, x - largest[..., None], 0.0)
        e = jnp.where(exists, jnp.exp(below), 0.0)
        old = self.rescale(largest)
        return OnlineSoftmax(largest, old.sum_exp + e.sum(-1), old.sum_x_exp + (below * e).sum(-1)), e

    def rescale(self, largest: jax.Array) -> "OnlineSoftmax":
        """The same columns relative to a larger maximum."""
        shift = self.max - largest
        shrink = jnp.exp(shift)
        return OnlineSoftmax(largest, self.sum_exp * shrink, (self.sum_x_exp + shift * self.sum_exp) * shrink)

    def merge(self, axis: str | None) -> "OnlineSoftmax":
        """All columns of the devices along a mesh axis; None: there is one device."""
        if axis is None:
            return self
        own = self.rescale(lax.pmax(self.max, axis))
        return OnlineSoftmax(own.max, *lax.psum((own.sum_exp, own.sum_x_exp), axis))

    @property
    def logsumexp(self) -> jax.Array:
        return self.max + jnp.log(self.sum_exp)

    @property
    def neg_entropy(self) -> jax.Array:
        """sum_v p_v log p_v, nats."""
        return self.sum_x_exp / self.sum_exp - jnp.log(self.sum_exp)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices) of the k largest along the last axis, the lower index first between equals. Only the k blocks
    with the largest maxima are sorted: several times faster than `lax.top_k` over the whole width."""
    n = values.shape[-1]
    if n <= 8 * LANES or k > n // LANES // 2:
        return lax.top_k(values, k)
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -n % LANES)], constant_values=-jnp.inf)
    blocks = values.reshape(*values.shape[:-1], -1, LANES)
    best = jnp.sort(lax.top_k(blocks.max(-1), k)[1], -1)
    candidates = jnp.take_along_axis(blocks, best[..., None], -2).reshape(*values.shape[:-1], k * LANES)
    top, index = lax.top_k(candidates, k)
    return top, jnp.take_along_axis(best, index // LANES, -1) * LANES + index % LANES
