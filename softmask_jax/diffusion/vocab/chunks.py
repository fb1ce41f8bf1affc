"""The vocabulary's columns, walked in chunks and over devices: what `vocab_head` and `vocab_draw` stand on.

A full B x L x V array of logits is the largest buffer of a language model by far, so nothing here ever holds one. The
columns are visited in windows of equal width; the last window is shifted back to fit and skips what was already seen.
Over a mesh, every device walks its own shard of the vocabulary for its own rows, inside one `jax.shard_map`.
"""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

LANES = 128
SMALL_VOCABULARY = 512
WIDEST_CHUNK = 4096
# Stands for "no column seen yet": finite, so that differences and products with a zero sum stay finite.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class VocabSharding:
    """Where rows, their positions and the vocabulary live on a mesh; axes of size 1 cost nothing."""
    mesh: Mesh
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    vocab_axis: str = "tensor"
    sequence_axis: str | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"],
         meta_fields=["vocab_size", "mask_token_id", "suppress_mask", "sharding", "chunk"])
@dataclasses.dataclass(frozen=True)
class Head:
    """The output layer: weight [Vpad D], bias [Vpad] or None.

    Columns from `vocab_size` on (padding) and, with `suppress_mask`, column `mask_token_id` do not exist for any
    function. `chunk` forces the width of a window (rounded up to 128); None chooses: all at once up to
    `SMALL_VOCABULARY`, else an eighth.
    """
    weight: jax.Array
    bias: jax.Array | None
    vocab_size: int
    mask_token_id: int
    suppress_mask: bool
    sharding: VocabSharding | None = None
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Columns:
    """The static side of a head: which columns exist, the width of a window, and the mesh axes in use.

    rows: mesh axes over which the batch is split; places: those over which positions are; shards: devices over which the
    vocabulary is; mapped: any is used.
    """
    size: int
    vocab_size: int
    skipped: int
    chunk: int | None
    sharding: VocabSharding | None
    rows: tuple[str, ...]
    places: tuple[str, ...]
    shards: int

    @property
    def mapped(self) -> bool:
        over = (*self.rows, *self.places)
        return self.sharding is not None and (self.shards > 1 or _mesh_size(self.sharding, over) > 1)

    @property
    def dense(self) -> bool:
        return self.chunk is None and self.vocab_size <= SMALL_VOCABULARY

    @property
    def count(self) -> int:
        return self.vocab_size - (0 <= self.skipped < self.vocab_size)

    def exist(self, ids: jax.Array) -> jax.Array:
        return (ids >= 0) & (ids < self.vocab_size) & (ids != self.skipped)

    def width(self, local: int) -> int:
        if self.dense:
            return local
        if self.chunk is not None:
            return min(local, _up(self.chunk, LANES))
        widest = max(LANES, min(WIDEST_CHUNK, local // 8 // LANES * LANES))
        # Equal shares, so that the shifted last window repeats as little as possible.
        return min(local, _up(math.ceil(local / math.ceil(local / widest)), LANES))

    def sum_rows(self, x: Any) -> Any:
        over = (*self.rows, *self.places)
        return lax.psum(x, over) if self.mapped and over else x

    def sum_shards(self, x: Any) -> Any:
        return lax.psum(x, self.sharding.vocab_axis) if self.shards > 1 else x

    def max_shards(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.sharding.vocab_axis) if self.shards > 1 else x

    def lowest_id_at_max(self, score: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(score, ids) of the shard with the highest score; between equals the lowest id."""
        if self.shards == 1:
            return score, ids
        top = self.max_shards(score)
        return top, lax.pmin(jnp.where(score == top, ids, jnp.iinfo(jnp.int32).max), self.sharding.vocab_axis)

    def offset(self, local: int) -> jax.Array | int:
        return lax.axis_index(self.sharding.vocab_axis).astype(jnp.int32) * local if self.shards > 1 else 0

    def over_devices(self, body: Callable, args: tuple, kinds: str, out_kinds: str) -> Any:
        """body(*args) on every device's part; one letter an argument or result: r(ows and positions), k(eys, rows only),
        v(ocabulary on axis 0), g (rows, positions, and vocabulary on axis 2), a(ll, the same on every device)."""
        if not self.mapped:
            return body(*args)
        rows, places, vocab = self.rows or None, self.places or None, self.sharding.vocab_axis
        spec = {"r": P(rows, places), "k": P(rows), "v": P(vocab), "g": P(rows, places, vocab), "a": P()}
        outs = tuple(spec[kind] for kind in out_kinds)
        # Replication is argued in the callers (explicit sums), not checked: loop carries start out unvarying.
        return jax.shard_map(body, mesh=self.sharding.mesh, in_specs=tuple(spec[kind] for kind in kinds),
                             out_specs=outs if len(outs) > 1 else outs[0], check_vma=False)(*args)


def columns(hidden: jax.Array, head: Head) -> Columns:
    """Check hidden [B L D] against the head and settle the static plan. ValueError says what does not fit."""
    weight, bias, sharding = head.weight, head.bias, head.sharding
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden must be [B L D] and the head's weight [Vpad D] with the same D, got {hidden.shape} "
                         f"and {weight.shape}")
    size = weight.shape[0]
    if not 0 < head.vocab_size <= size or (bias is not None and bias.shape != (size,)):
        raise ValueError(f"the head has {size} rows: vocab_size must be 1..{size} and the bias [{size}], got "
                         f"{head.vocab_size} and {None if bias is None else bias.shape}")
    if head.chunk is not None and head.chunk < 1:
        raise ValueError(f"Head.chunk must be a positive width or None, got {head.chunk}")
    rows, places, shards = (), (), 1
    if sharding is not None:
        named = {*sharding.batch_axes, sharding.vocab_axis, sharding.sequence_axis} - {None}
        missing = named - set(sharding.mesh.axis_names)
        if missing:
            raise ValueError(f"the mesh has axes {sharding.mesh.axis_names}, VocabSharding names {sorted(missing)}")
        shards = sharding.mesh.shape[sharding.vocab_axis]
        if size % shards:
            raise ValueError(f"{size} rows of the head do not divide over {shards} devices of mesh axis "
                             f"'{sharding.vocab_axis}': pad the vocabulary to a multiple of {LANES * shards}")
        # Rows that do not divide (a batch of one on a large mesh) are computed by every device instead.
        if hidden.shape[0] % _mesh_size(sharding, sharding.batch_axes) == 0:
            rows = tuple(sharding.batch_axes)
        if sharding.sequence_axis and hidden.shape[1] % sharding.mesh.shape[sharding.sequence_axis] == 0:
            places = (sharding.sequence_axis,)
    skipped = head.mask_token_id if head.suppress_mask else -1
    return Columns(size, head.vocab_size, skipped, head.chunk, sharding, rows, places, shards)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _mesh_size(sharding: VocabSharding, axes: tuple[str, ...]) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def wide(hidden: jax.Array) -> jnp.dtype:
    """float32, or float64 for float64 hidden states: what everything after a matrix product is kept in."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


def product(subscripts: str, a: jax.Array, b: jax.Array, hidden: jax.Array) -> jax.Array:
    """einsum with operands in the hidden states' dtype, accumulated in `wide`."""
    # Left to itself a TPU rounds float32 operands to bfloat16, a recent GPU to TF32.
    exact = None if hidden.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(
        subscripts, a.astype(hidden.dtype), b.astype(hidden.dtype), precision=exact, preferred_element_type=wide(hidden)
    )


def logits_of(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = product("...d,vd->...v", hidden, weight, hidden)
    return logits if bias is None else logits + bias.astype(logits.dtype)


class Chunk(NamedTuple):
    """One window: start within the shard, ids [c] (global), exists [c] (there, and not seen before), logits [B L c]."""
    start: jax.Array | int
    ids: jax.Array
    exists: jax.Array
    logits: jax.Array

    def part(self, array: jax.Array, axis: int = 0) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, self.start, self.ids.shape[0], axis)


def windows(total: int, width: int, step: Callable, carry: Any) -> Any:
    """carry = step(start, fresh, carry) over [0, total); a window begins at `start`, columns below `fresh` are old."""
    count = -(-total // width)
    if count == 1:
        return step(0, 0, carry)
    return lax.fori_loop(0, count, lambda i, c: step(jnp.minimum(i * width, total - width), i * width, c), carry)


def walk(cols: Columns, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, step: Callable,
         carry: Any) -> Any:
    """carry = step(chunk, carry) over this device's columns: weight [Vlocal D], bias [Vlocal] or None."""
    local = weight.shape[0]
    width, offset = cols.width(local), cols.offset(local)

    def one(start, fresh, carry):
        here = start + jnp.arange(width, dtype=jnp.int32)
        chunk = Chunk(start, here + offset, cols.exist(here + offset) & (here >= fresh), None)
        logits = logits_of(hidden, chunk.part(weight), None if bias is None else chunk.part(bias))
        return step(chunk._replace(logits=logits), carry)

    return windows(local, width, one, carry)


class Mass(NamedTuple):
    """Online softmax statistics over the columns seen: largest y, sum e^(y - m), sum (y - m) e^(y - m); all [B L]."""
    m: jax.Array
    s: jax.Array
    t: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> "Mass":
        return cls(jnp.full(shape, LOWEST, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def rebased(self, m: jax.Array) -> "Mass":
        shrink = jnp.exp(self.m - m)
        return Mass(m, self.s * shrink, (self.t + (self.m - m) * self.s) * shrink)

    def add(self, y: jax.Array, exists: jax.Array) -> tuple["Mass", jax.Array]:
        """With y [B L c] added; also e^(y - m) [B L c] under the new maximum, 0 where a column does not exist."""
        m = jnp.maximum(self.m, jnp.max(jnp.where(exists, y, LOWEST), -1))
        above = jnp.where(exists, y - m[..., None], 0.0)
        e = jnp.where(exists, jnp.exp(above), 0.0)
        old = self.rebased(m)
        return Mass(m, old.s + e.sum(-1), old.t + (above * e).sum(-1)), e

    def merged(self, cols: Columns) -> "Mass":
        if cols.shards == 1:
            return self
        own = self.rebased(cols.max_shards(self.m))
        return Mass(own.m, *cols.sum_shards((own.s, own.t)))

    @property
    def logsumexp(self) -> jax.Array:
        return self.m + jnp.log(self.s)

    @property
    def neg_entropy(self) -> jax.Array:
        return self.t / self.s - jnp.log(self.s)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, positions) of the k largest along the last axis, the lower position first between equals.

    The k largest lie in the k blocks with the largest maxima, so only those are sorted: several times faster than
    `lax.top_k` over the whole width.
    """
    n = values.shape[-1]
    if n <= 8 * LANES or k > n // LANES // 2:
        return lax.top_k(values, k)
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -n % LANES)], constant_values=-jnp.inf)
    blocks = values.reshape(*values.shape[:-1], -1, LANES)
    best = jnp.sort(lax.top_k(blocks.max(-1), k)[1], -1)
    candidates = jnp.take_along_axis(blocks, best[..., None], -2).reshape(*values.shape[:-1], k * LANES)
    top, at = lax.top_k(candidates, k)
    return top, jnp.take_along_axis(best, at // LANES, -1) * LANES + at % LANES
