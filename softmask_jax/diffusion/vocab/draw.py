"""Exact draws from the vocabulary's distribution, without B x L x V noise.

The Gumbel-max trick draws argmax_v(log p_v + g_v). Within a block of columns the maximum is itself a Gumbel variable,
shifted by the log of the block's mass, and independent of where it is attained (max-stability). So one Gumbel number
for every block of 128 columns chooses the block, and 128 more choose within it: the same law of (token, score) at
V / 128 + 128 random numbers a position instead of V. Recorded noise [B L V] is replayed literally instead.

Noise is a function of (row key, position) alone, whatever the batch, L, chunks and devices.
"""
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Chunk, Columns, LANES, Mass, logits_of, top_k, wide, windows

# Elements of one dense block of the nucleus filter, positions x V.
NUCLEUS_BLOCK = 2 ** 24


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "gumbel", "temperature", "bias"],
         meta_fields=["nucleus_p"])
@dataclasses.dataclass(frozen=True)
class Draw:
    """How to draw: `keys` [B] (typed JAX keys, one a row) or recorded `gumbel` [B L V], exactly one of them.

    temperature divides the logits on top of the sweep's own. nucleus_p < 1 keeps the most probable tokens while their
    cumulative probability is <= nucleus_p (the first always) and renormalises; it is static. bias: [Vpad], added to the
    logits that are drawn from, and to no others.
    """
    keys: jax.Array | None = None
    gumbel: jax.Array | None = None
    nucleus_p: float = 1.0
    temperature: jax.Array | float = 1.0
    bias: jax.Array | None = None


def check_draw(draw: Draw, cols: Columns, hidden: jax.Array) -> None:
    """ValueError if the draw does not fit hidden [B L D]."""
    if (draw.keys is None) == (draw.gumbel is None):
        raise ValueError("Draw needs either keys [B] or recorded gumbel [B L V], exactly one of them")
    if not 0.0 < draw.nucleus_p <= 1.0:
        raise ValueError(f"Draw.nucleus_p must be in (0, 1], got {draw.nucleus_p}")
    batch, length = hidden.shape[:2]
    if draw.keys is not None and (not jnp.issubdtype(draw.keys.dtype, jax.dtypes.prng_key)
                                  or draw.keys.shape != (batch,)):
        raise ValueError(f"Draw.keys must be {batch} typed keys (jax.random.key), one a row, got "
                         f"{draw.keys.dtype} {draw.keys.shape}")
    if draw.gumbel is not None and draw.gumbel.shape != (batch, length, cols.vocab_size):
        raise ValueError(f"Draw.gumbel must be {(batch, length, cols.vocab_size)} [B L V], got {draw.gumbel.shape}")
    if draw.bias is not None and draw.bias.shape != (cols.size,):
        raise ValueError(f"Draw.bias must be [{cols.size}] as the head's rows, got {draw.bias.shape}")


def keyed_noise(keys: jax.Array, places: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Gumbel noise [P 128 + blocks] of places [P] of the rows with keys [P]: for the columns within a block, then for
    the blocks of `size` columns."""
    def position(key, at):
        # "high": plain float32 noise tops out at 16.6, which cuts off tokens rarer than e^-16 and cools the rest.
        return jax.random.gumbel(jax.random.fold_in(key, at), (LANES - (-size // LANES),), dtype, mode="high")

    return jax.vmap(position)(keys, places)


class Best(NamedTuple):
    """The draw so far: mass of all columns seen, the best score [B L] (log-mass + Gumbel), and the winner: `at` [B L],
    an id with recorded noise, else the first id of the winning block; `block`: its logit [B L 1], or those of the
    winning block [B L 128]."""
    mass: Mass
    score: jax.Array
    at: jax.Array
    block: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any, keyed: bool) -> "Best":
        return cls(Mass.empty(shape, dtype), jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32),
                   jnp.full((*shape, LANES if keyed else 1), -jnp.inf, dtype))

    @property
    def keyed(self) -> bool:
        return self.block.shape[-1] == LANES

    def add(self, y: jax.Array, exists: jax.Array, first_id: jax.Array | int, noise: jax.Array) -> "Best":
        """With y [B L c] added, columns first_id and up; noise [B L c/128] by block, or [B L c] recorded."""
        mass, e = self.mass.add(y, exists)
        if not self.keyed:
            score, at = (x[..., 0] for x in top_k(jnp.where(exists, y + noise, -jnp.inf), 1))
            better = score > self.score
            return Best(mass, jnp.where(better, score, self.score), jnp.where(better, first_id + at, self.at),
                        jnp.where(better[..., None], jnp.take_along_axis(y, at[..., None], -1), self.block))
        by_block = e.reshape(*e.shape[:-1], -1, LANES).sum(-1)
        scores = jnp.log(by_block) + mass.m[..., None] + noise
        which = lax.argmax(scores, scores.ndim - 1, jnp.int32)[..., None]
        score = jnp.take_along_axis(scores, which, -1)[..., 0]
        blocks = jnp.where(exists, y, -jnp.inf).reshape(*e.shape[:-1], -1, LANES)
        block = jnp.take_along_axis(blocks, which[..., None], -2)[..., 0, :]
        better = score > self.score
        return Best(mass, jnp.where(better, score, self.score),
                    jnp.where(better, first_id + which[..., 0] * LANES, self.at),
                    jnp.where(better[..., None], block, self.block))

    def local(self, noise: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(score, winning column, its logit) [B L] on this device; noise [B L 128] within the block, None if recorded."""
        if not self.keyed:
            return self.score, self.at, self.block[..., 0]
        at = lax.argmax(self.block + noise, noise.ndim - 1, jnp.int32)
        return self.score, self.at + at, jnp.take_along_axis(self.block, at[..., None], -1)[..., 0]

    def finish(self, cols: Columns, noise: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(drawn ids [B L], log p + g [B L], log p [B L]) over all devices."""
        own_score, own, logit = self.local(noise)
        score, at = cols.lowest_id_at_max(own_score, own)
        if cols.shards > 1:
            logit = cols.sum_shards(jnp.where((own == at) & (own_score == score), logit, 0.0))
        logsumexp = self.mass.merged(cols).logsumexp
        return at, score - logsumexp, logit - logsumexp


def add_chunk(best: Best, y: jax.Array, chunk: Chunk, noise: jax.Array) -> Best:
    """`best` with a chunk of scaled logits y [B L c]; noise [B L blocks] over the whole vocabulary, or this shard's
    recorded [B L Vlocal]."""
    first_id = chunk.ids[0]
    if not best.keyed:
        return best.add(y, chunk.exists, first_id, chunk.part(noise, 2))
    blocks = lax.dynamic_slice_in_dim(noise, first_id // LANES, y.shape[-1] // LANES, 2)
    return best.add(y, chunk.exists, first_id, blocks)


def nucleus_draw(cols: Columns, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, noise: jax.Array,
                 temperature: jax.Array | float, nucleus_p: float,
                 keyed: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(drawn [B L], log p + g [B L], log p [B L]) from the nucleus of softmax(z / temperature), on one device's rows and columns.

    The filter needs every column of a position in sorted order, so blocks of positions are dense in V instead; over a
    sharded vocabulary each device sorts its share of a block's positions. noise as for `Best`, with [B L 128 + blocks].
    """
    batch, length = hidden.shape[:2]
    total, local, dtype = batch * length, weight.shape[0], wide(hidden)
    exists = cols.exist(jnp.arange(local, dtype=jnp.int32) + cols.offset(local))
    hidden, noise = (x.reshape(total, -1) for x in (hidden, noise))
    per = max(1, min(NUCLEUS_BLOCK // cols.size, total // 8))

    def by_position(x):
        """[P Vlocal] on every shard -> [P/shards V]: all columns of this device's share of the positions."""
        if cols.shards == 1:
            return x
        x = jnp.pad(x, ((0, -per % cols.shards), (0, 0)))
        return lax.all_to_all(x, cols.sharding.vocab_axis, 0, 1, tiled=True)

    def share(x):
        """[P n], the same on every shard -> [P/shards n]."""
        if cols.shards == 1:
            return x
        size = -(-per // cols.shards)
        x = jnp.pad(x, ((0, -per % cols.shards), (0, 0)))
        return lax.dynamic_slice_in_dim(x, lax.axis_index(cols.sharding.vocab_axis) * size, size)

    def step(start, _, out):
        h, g = (lax.dynamic_slice_in_dim(x, start, per) for x in (hidden, noise))
        y = by_position(jnp.where(exists, logits_of(h, weight, bias) / temperature, -jnp.inf))
        ids = lax.broadcasted_iota(jnp.int32, y.shape, 1)
        if keyed:
            # The noise is independent of the logits, so it may as well be given out in sorted order.
            g, pad = share(g), -cols.size % LANES
            y, ids = lax.sort((-y, ids), num_keys=1)
            inside, across = g[:, :LANES], g[:, LANES:]
        else:
            y, ids, across = lax.sort((-y, ids, by_position(g)), num_keys=1)
            inside, pad = None, 0
        y = jnp.pad(-y, ((0, 0), (0, pad)), constant_values=-jnp.inf)
        keep = (jnp.cumsum(jax.nn.softmax(y, -1), -1) <= nucleus_p).at[:, 0].set(True) & (y > -jnp.inf)
        best = Best.empty(y.shape[:1], dtype, keyed).add(y, keep, 0, across)
        score, at, logit = best.local(inside)
        lse = best.mass.logsumexp
        found = jnp.take_along_axis(ids, at[:, None], 1)[:, 0], score - lse, logit - lse
        if cols.shards > 1:
            found = tuple(lax.all_gather(x, cols.sharding.vocab_axis, tiled=True)[:per] for x in found)
        return tuple(lax.dynamic_update_slice_in_dim(o, x, start, 0) for o, x in zip(out, found))

    out = windows(total, per, step, (jnp.zeros(total, jnp.int32), *(jnp.zeros(total, dtype) for _ in range(2))))
    return tuple(x.reshape(batch, length) for x in out)
