"""Key/value caches of a trunk, so that a later call computes only a slice of the sequence.

Attention is bidirectional: a changed token changes the keys of all positions from layer 2 on, so cached keys are an
approximation unless everything outside the slice is unchanged. Both caches of Fast-dLLM (arXiv 2505.22618) are slices:
`dual` the block being decoded, `prefix` everything from its start on.

A trunk takes `cache=None`, `cache=True` (x is the whole sequence; returns a `Cache`) or a `Window` (x is a slice whose
queries see all L positions; returns the updated cache, free under `jit` if unused).

Letters: N layers, B batch, L length, S slice length, G key/value heads, d head width."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Cache(NamedTuple):
    """Rotated keys and values of every layer, [N B L G d] in the compute dtype.
    Dream-7B in bfloat16: 56 KiB per position, 112 MiB for a row of 2,048."""

    k: Array
    v: Array


class Window(NamedTuple):
    """A slice [B S D] of a sequence and the cache of the rest."""

    kept: Cache  # from a call with the whole sequence
    start: Array | int  # first position of the slice, at most L - S; may be traced
    # Positions of the slice before `fresh` (default: `start`) keep their cached keys and values, so that slices of
    # different lengths share one compiled size.
    fresh: Array | int | None = None
    segment_ids: Array | None = None  # [B L] of all keys; needed if the trunk gets those [B S] of the queries
    before: Array | None = None  # [B D] hidden state of the position before `fresh`, for predictions shifted by one

    @property
    def first(self) -> Array | int:
        """Index in the slice of its first fresh position."""
        return 0 if self.fresh is None else self.fresh - self.start


class Slot:
    """The cache of one layer while that layer runs, updated in place."""

    def __init__(self, kept: Cache | None, window: Window | None):
        self.kept, self.window = kept, window

    def put(self, k: Array, v: Array) -> Cache:
        """Store new k, v [B S G d]; return all that the queries see, [B L G d]."""
        if self.window is None:
            self.kept = Cache(k, v)
        else:
            self.kept = jax.tree.map(self._merged, self.kept, Cache(k, v))
        return self.kept

    def _merged(self, kept: Array, new: Array) -> Array:
        if self.window.fresh is not None:
            old = lax.dynamic_slice_in_dim(kept, self.window.start, new.shape[1], 1)
            new = jnp.where(jnp.arange(new.shape[1])[:, None, None] < self.window.first, old, new)
        return lax.dynamic_update_slice_in_dim(kept, new, self.window.start, 1)


def window_of(cache: object) -> Window | None:
    """A trunk's `cache` if it is a Window, else None. ValueError unless it is None, True or a Window."""
    if isinstance(cache, Window):
        return cache
    if cache is None or cache is True:
        return None
    raise ValueError("cache is None, True (the whole sequence; keep its keys and values) or a models.cache.Window (a "
                     f"slice), not {cache if isinstance(cache, bool) else type(cache).__name__}.")


def positions_of(x: Array, window: Window | None) -> Array:
    """Positions [S] of x [B S D] in a sequence without padding."""
    own = jnp.arange(x.shape[1])
    return own if window is None else own + window.start


def check_window(window: Window, x: Array, segment_ids: Array | None, depth: int, heads: int, head_width: int,
          dtype: str) -> None:
    """ValueError unless the window's arrays fit a slice x [B S D] and a network of these sizes."""
    rows, size = x.shape[:2]
    length = window.kept.k.shape[2] if window.kept.k.ndim == 5 else size
    expected = (depth, rows, length, heads, head_width)
    for name, leaf in window.kept._asdict().items():
        if leaf.shape != expected or leaf.dtype != dtype:
            raise ValueError(f"The cache's {name} must be {expected} [N B L G d] {dtype} for this network and {rows} "
                             f"rows, got {leaf.shape} {leaf.dtype}.")
    if size > length:
        raise ValueError(f"A slice of {size} positions does not fit a cache of {length}.")
    for name, leaf in (("start", window.start), ("fresh", 0 if window.fresh is None else window.fresh)):
        if jnp.shape(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            raise ValueError(f"The window's {name} must be one integer, got {leaf}.")
    if not isinstance(window.start, jax.core.Tracer) and not 0 <= window.start <= length - size:
        raise ValueError(f"A slice of {size} of {length} positions starts between 0 and {length - size}, not at "
                         f"{window.start}.")
    if (segment_ids is None) != (window.segment_ids is None):
        raise ValueError("Give segment_ids both of the slice [B S] and, in its window, of all keys [B L], or neither.")
    if window.segment_ids is not None and window.segment_ids.shape != (rows, length):
        raise ValueError(f"The window's segment_ids must be {(rows, length)} [B L], got {window.segment_ids.shape}.")
    if window.before is not None and window.before.shape != (rows, x.shape[-1]):
        raise ValueError(f"The window's before must be {(rows, x.shape[-1])} [B D], got {window.before.shape}.")
