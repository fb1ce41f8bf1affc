"""The output layer over a large vocabulary: the columns that exist, their chunks and their devices.

B x L x V logits would be the largest buffer of a language model by far, so they are never made. `walk` visits the
columns in windows of equal width; the last window is shifted back to fit and skips columns seen before. Within a
window it visits the positions in blocks. Over a mesh
every device walks the columns of its shard for its own rows, inside one `jax.shard_map`."""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

from softmask_jax.diffusion.vocab.online_softmax import LANES
from softmask_jax.diffusion.vocab.positions import Positions

SMALL_VOCABULARY = 512
WIDEST_CHUNK = 4096
# Elements of a block of positions that is dense in V.
DENSE_BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class VocabSharding:
    """Mesh axes of rows, positions and the vocabulary; axes of size 1 cost nothing."""

    mesh: Mesh
    batch_axes: tuple[str, ...] = ("dcn_data", "data", "fsdp")
    vocab_axis: str = "tensor"
    sequence_axis: str | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"],
         meta_fields=["vocab_size", "mask_token_id", "suppress_mask", "sharding", "chunk"])
@dataclasses.dataclass(frozen=True)
class Head:
    """The output layer: logits = hidden @ weight.T + bias."""

    weight: jax.Array  # [Vpad D]
    bias: jax.Array | None  # [Vpad]
    vocab_size: int  # columns from here on are padding; they do not exist for any function
    mask_token_id: int  # the mask's column
    suppress_mask: bool  # the mask's column does not exist either
    sharding: VocabSharding | None = None  # None on a single device
    chunk: int | None = None  # width of a window, rounded up to 128; None: see `Plan.width`


class Projection(NamedTuple):
    """hidden [B L D] or [P D] with the weight [V D] and bias [V] | None that make logits of it."""

    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None

    @property
    def dtype(self) -> jnp.dtype:
        """float32, or float64 for float64 hidden states: of everything after a matrix product."""
        return jnp.promote_types(self.hidden.dtype, jnp.float32)

    @property
    def flat(self) -> "Projection":
        """Hidden states [P D], all positions of all rows."""
        return self._replace(hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def at(self, positions: Positions) -> "Projection":
        """The hidden states [S D] in the order of `positions`."""
        return self._replace(hidden=positions.take(self.hidden))

    def product(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """einsum with operands in the hidden states' dtype, accumulated in `dtype`."""
        # Left to itself a TPU rounds float32 operands to bfloat16, a recent GPU to TF32.
        precision = None if self.hidden.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
        a, b = a.astype(self.hidden.dtype), b.astype(self.hidden.dtype)
        return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=self.dtype)

    @property
    def logits(self) -> jax.Array:
        logits = self.product("...d,vd->...v", self.hidden, self.weight)
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)

    def add_bias(self, bias: jax.Array | None) -> "Projection":
        if bias is None:
            return self
        return self._replace(bias=bias if self.bias is None else self.bias + bias)


class Specs(NamedTuple):
    """The `PartitionSpec` of every array, by its leading axes."""

    rows: P        # [B]
    positions: P   # [B L ...]
    vocab: P       # [V ...]
    logits: P      # [B L V]
    replicated: P  # scalars, and arrays that every device needs all of

    @property
    def projection(self) -> Projection:
        return Projection(self.positions, self.vocab, self.vocab)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of a head and its hidden states."""

    size: int  # Vpad
    vocab_size: int  # columns from here on do not exist
    absent_id: int  # the suppressed mask, which does not exist either; -1: none
    chunk: int | None  # as `Head.chunk`
    mesh: Mesh | None = None  # None where a single device holds everything
    batch_axes: tuple[str, ...] = ()  # mesh axes that split the rows
    sequence_axes: tuple[str, ...] = ()  # mesh axes that split the positions
    vocab_axis: str | None = None  # mesh axis that splits the vocabulary; None: every device has all of it

    @property
    def shards(self) -> int:
        return self.mesh.shape[self.vocab_axis] if self.vocab_axis else 1

    @property
    def dense(self) -> bool:
        return self.chunk is None and self.vocab_size <= SMALL_VOCABULARY

    @property
    def count(self) -> int:
        """Columns that exist."""
        return self.vocab_size - (0 <= self.absent_id < self.vocab_size)

    @property
    def specs(self) -> Specs:
        rows, positions = self.batch_axes or None, self.sequence_axes or None
        return Specs(P(rows), P(rows, positions), P(self.vocab_axis), P(rows, positions, self.vocab_axis), P())

    def exists(self, ids: jax.Array) -> jax.Array:
        return (ids >= 0) & (ids < self.vocab_size) & (ids != self.absent_id)

    def width(self, local: int) -> int:
        """Columns of one window over `local` ones: all up to `SMALL_VOCABULARY`, else about an eighth."""
        if self.dense:
            return local
        if self.chunk is not None:
            return min(local, _round_up(self.chunk, LANES))
        widest = max(LANES, min(WIDEST_CHUNK, local // 8 // LANES * LANES))
        # Equal shares, so that the shifted last window repeats as little as possible.
        return min(local, _round_up(math.ceil(local / math.ceil(local / widest)), LANES))

    def over_devices(self, body: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """`body` on every device's part of its arguments; the methods below are for use in it."""
        if self.mesh is None:
            return body
        # Replication is argued in the callers (explicit sums), not checked: loop carries start out unvarying.
        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def vocab_start(self, local: int) -> jax.Array | int:
        """Id of this device's first of `local` columns."""
        return lax.axis_index(self.vocab_axis).astype(jnp.int32) * local if self.vocab_axis else 0

    def sum_positions(self, x: Any) -> Any:
        axes = (*self.batch_axes, *self.sequence_axes)
        return lax.psum(x, axes) if axes else x

    def sum_vocab(self, x: Any) -> Any:
        return lax.psum(x, self.vocab_axis) if self.vocab_axis else x

    def all_columns(self, x: jax.Array) -> jax.Array:
        """[P Vlocal] -> [P/shards V]: all columns of this device's share of the positions."""
        return lax.all_to_all(self._padded(x), self.vocab_axis, 0, 1, tiled=True) if self.vocab_axis else x

    def share(self, x: jax.Array) -> jax.Array:
        """[P ...], the same on every shard -> [P/shards ...]: this device's share."""
        if self.vocab_axis is None:
            return x
        x = self._padded(x)
        size = len(x) // self.shards
        return lax.dynamic_slice_in_dim(x, self.vocab_start(size), size)

    def unshare(self, tree: Any, count: int) -> Any:
        """Leaves [P/shards ...] -> [P ...], the same on every shard; P = count."""
        if self.vocab_axis is None:
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, self.vocab_axis, tiled=True)[:count], tree)

    def check_where(self, where: jax.Array | None, hidden: jax.Array) -> None:
        """ValueError unless `where` is None or [B L] bool."""
        if where is not None and (where.shape != hidden.shape[:2] or where.dtype != bool):
            raise ValueError(f"where must be bool {hidden.shape[:2]} [B L], got {where.dtype} {where.shape}")

    def dense_logits(self, projection: Projection) -> jax.Array:
        """[P Vlocal], -inf where a column does not exist."""
        local = projection.weight.shape[0]
        exists = self.exists(jnp.arange(local, dtype=jnp.int32) + self.vocab_start(local))
        return jnp.where(exists, projection.logits, -jnp.inf)

    def _padded(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -len(x) % self.shards), *((0, 0),) * (x.ndim - 1)))


def make_plan(hidden: jax.Array, head: Head) -> Plan:
    """Check hidden [B L D] against the head; ValueError if they do not fit."""
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
    plan = Plan(size, head.vocab_size, head.mask_token_id if head.suppress_mask else -1, head.chunk)
    if sharding is None:
        return plan
    devices = sharding.mesh.shape
    missing = {*sharding.batch_axes, sharding.vocab_axis, sharding.sequence_axis} - {None, *devices}
    if missing:
        raise ValueError(f"the mesh has axes {tuple(devices)}, VocabSharding names {sorted(missing)}")
    shards = devices[sharding.vocab_axis]
    if size % shards:
        raise ValueError(f"{size} rows of the head do not divide over {shards} devices of mesh axis "
                         f"'{sharding.vocab_axis}': pad the vocabulary to a multiple of {LANES * shards}")

    def dividing(count: int, *axes: str) -> tuple[str, ...]:
        # What does not divide (a batch of one on a large mesh) is computed by every device instead.
        return () if count % math.prod(devices[axis] for axis in axes) else axes

    rows = dividing(hidden.shape[0], *sharding.batch_axes)
    positions = dividing(hidden.shape[1], sharding.sequence_axis) if sharding.sequence_axis else ()
    if shards * math.prod(devices[axis] for axis in (*rows, *positions)) == 1:
        return plan
    return dataclasses.replace(plan, mesh=sharding.mesh, batch_axes=rows, sequence_axes=positions,
                               vocab_axis=sharding.vocab_axis if shards > 1 else None)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class Tile(NamedTuple):
    """A block of positions and a window of a device's columns."""

    positions: Positions
    first: jax.Array | int  # index of the first position in the order of `positions`
    ids: jax.Array  # [c] token ids
    exists: jax.Array  # [c] bool, False for columns that do not exist or were seen before
    start: jax.Array | int  # first column within the shard
    projection: Projection  # hidden [p D], weight [c D], bias [c]
    logits: jax.Array  # [p c]

    def rows(self, x: jax.Array) -> jax.Array:
        """These positions of an array [S ...] in the order of `positions`."""
        return self.positions.part(x, self.first)

    def columns(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """These columns of an array over the shard's."""
        return lax.dynamic_slice_in_dim(x, self.start, len(self.ids), axis)


def walk(plan: Plan, projection: Projection, positions: Positions, step: Callable[[Tile, Any, Any], tuple[Any, Any]],
         rows: Any, columns: Any = ()) -> tuple[Any, Any]:
    """rows, columns = step(tile, rows, columns) over this device's columns and, within a window, over the positions.

    projection: hidden [S D] in the order of `positions`. rows: leaves [S ...]; columns: leaves [Vlocal ...]; a step
    gets the tile's part of both. A window's weights and columns can stay in cache (a TPU: VMEM) for all blocks."""
    hidden, weight, bias = projection
    local = weight.shape[0]
    width, vocab_start = plan.width(local), plan.vocab_start(local)
    count = -(-local // width)

    def visit(start, first_unseen, state):
        def window(x):
            return lax.dynamic_slice_in_dim(x, start, width)

        rows, columns = state
        index = start + jnp.arange(width, dtype=jnp.int32)
        ids = vocab_start + index
        exists = plan.exists(ids) & (index >= first_unseen)
        own_weight, own_bias = window(weight).astype(hidden.dtype), None if bias is None else window(bias)

        def block(first, state):
            rows, own = state
            part = Projection(positions.part(hidden, first), own_weight, own_bias)
            tile = Tile(positions, first, ids, exists, start, part, part.logits)
            new, own = step(tile, jax.tree.map(tile.rows, rows), own)
            return jax.tree.map(lambda x, part: positions.with_part(x, part, first), rows, new), own

        rows, own = positions.loop(block, (rows, jax.tree.map(window, columns)))
        return rows, jax.tree.map(lambda x, own: lax.dynamic_update_slice_in_dim(x, own, start, 0), columns, own)

    if count == 1:
        return visit(0, 0, (rows, columns))
    return lax.fori_loop(0, count, lambda i, s: visit(jnp.minimum(i * width, local - width), i * width, s),
                         (rows, columns))
