"""Exact draws from the vocabulary's distribution, without B x L x V noise.

The Gumbel-max trick draws argmax_v(log p_v + g_v). A block's maximum is itself Gumbel, shifted by the log of the
block's mass, and independent of the column that attains it (max-stability). So one Gumbel number for every block of 128
columns chooses the block, and 128 more choose within it: the same law of (token, score) from V / 128 + 128 numbers a
position instead of V. Recorded noise [B L V] is replayed literally. P positions."""
import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.noise import keyed_noise
from softmask_jax.diffusion.vocab.chunks import DENSE_BLOCK, Plan, Projection, Specs, Tile
from softmask_jax.diffusion.vocab.online_softmax import LANES, OnlineSoftmax
from softmask_jax.diffusion.vocab.positions import at_positions

# "high": plain float32 noise tops out at 16.6, which cuts off tokens rarer than e^-16 and cools the rest.
gumbel = partial(jax.random.gumbel, mode="high")


class Noise(NamedTuple):
    """Gumbel noise of P positions."""

    across: jax.Array  # [P n] one number a block of 128 columns; recorded: [P V] one a column
    within: jax.Array | None  # [P 128] for the columns of the winning block; recorded: None

    @property
    def width(self) -> int:
        """Columns of one number of `across`."""
        return 1 if self.within is None else LANES

    def of(self, tile: Tile) -> jax.Array:
        """The part of `across` for a tile."""
        across = tile.rows(self.across)
        if self.within is None:
            return tile.columns(across, -1)
        return lax.dynamic_slice_in_dim(across, tile.ids[0] // LANES, len(tile.ids) // LANES, -1)


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "gumbel", "temperature", "bias"],
         meta_fields=["nucleus_p"])
@dataclasses.dataclass(frozen=True)
class Draw:
    """How to draw: from `keys` or from recorded `gumbel`, exactly one of them."""

    keys: jax.Array | None = None  # [B] typed JAX keys, one a row
    gumbel: jax.Array | None = None  # [B L V] recorded noise
    nucleus_p: float = 1.0  # static; below 1, keep the likeliest tokens up to this cumulative mass, the first always
    temperature: jax.Array | float = 1.0  # divides the logits on top of the sweep's own
    bias: jax.Array | None = None  # [Vpad], added to the logits that are drawn from, and to no others

    def prepare(self, plan: Plan, projection: Projection) -> "Draw":
        """With noise over all Vpad columns and a temperature of the logits' dtype; ValueError if it does not fit."""
        batch, length = projection.hidden.shape[:2]
        if (self.keys is None) == (self.gumbel is None):
            raise ValueError("Draw needs either keys [B] or recorded gumbel [B L V], exactly one of them")
        if not 0.0 < self.nucleus_p <= 1.0:
            raise ValueError(f"Draw.nucleus_p must be in (0, 1], got {self.nucleus_p}")
        if self.keys is not None and (not jnp.issubdtype(self.keys.dtype, jax.dtypes.prng_key)
                                      or self.keys.shape != (batch,)):
            raise ValueError(f"Draw.keys must be {batch} typed keys (jax.random.key), one a row, got "
                             f"{self.keys.dtype} {self.keys.shape}")
        if self.gumbel is not None and self.gumbel.shape != (batch, length, plan.vocab_size):
            raise ValueError(f"Draw.gumbel must be {(batch, length, plan.vocab_size)} [B L V], got {self.gumbel.shape}")
        if self.bias is not None and self.bias.shape != (plan.size,):
            raise ValueError(f"Draw.bias must be [{plan.size}] as the head's rows, got {self.bias.shape}")
        noise = self.gumbel
        if noise is not None:
            noise = jnp.pad(noise, ((0, 0), (0, 0), (0, plan.size - plan.vocab_size))).astype(projection.dtype)
        return dataclasses.replace(self, gumbel=noise, temperature=jnp.asarray(self.temperature, projection.dtype))

    def specs(self, specs: Specs) -> "Draw":
        """The `PartitionSpec`s of the arrays."""
        return dataclasses.replace(self, keys=specs.rows, gumbel=specs.logits, bias=specs.vocab,
                                   temperature=specs.replicated)

    def noise(self, plan: Plan, index: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> Noise:
        """The noise at index [P] of a device's flattened positions [B L]."""
        if self.gumbel is not None:
            return Noise(self.gumbel.reshape(positions.size, -1)[index], None)
        law = partial(gumbel, shape=(LANES - (-plan.size // LANES),), dtype=dtype)
        noise = keyed_noise(law, self.keys[index // positions.shape[1]], positions.reshape(-1)[index])
        # Columns added to make shards of whole blocks do not exist and need no noise.
        blocks = -(-plan.size // (LANES * plan.shards)) * plan.shards
        across = noise[:, LANES:]
        return Noise(jnp.pad(across, ((0, 0), (0, blocks - across.shape[1]))), noise[:, :LANES])


class Drawn(NamedTuple):
    """Drawn tokens, under the distribution that they were drawn from."""

    token_ids: jax.Array  # [P]
    score: jax.Array  # [P] log p + Gumbel noise
    log_p: jax.Array  # [P] nats


class GumbelMax(NamedTuple):
    """The running draw over the columns seen."""

    softmax: OnlineSoftmax  # of all columns
    score: jax.Array  # [P] the best log-mass + Gumbel noise of a block, which is a single column with recorded noise
    first_id: jax.Array  # [P] first column of the winning block
    logits: jax.Array  # [P width] of the winning block

    @classmethod
    def empty(cls, noise: Noise) -> "GumbelMax":
        count, dtype = len(noise.across), noise.across.dtype
        return cls(OnlineSoftmax.empty((count,), dtype), jnp.full(count, -jnp.inf, dtype),
                   jnp.zeros(count, jnp.int32), jnp.full((count, noise.width), -jnp.inf, dtype))

    def update(self, y: jax.Array, exists: jax.Array, first_id: jax.Array | int, across: jax.Array) -> "GumbelMax":
        """With y [P c] added, columns first_id and up, and their part of `Noise.across`."""
        count, width = self.logits.shape
        softmax, e = self.softmax.update(y, exists)
        y = jnp.where(exists, y, -jnp.inf)
        # With a single column a block's log-mass is y itself, without rounding.
        mass = y if width == 1 else jnp.log(e.reshape(count, -1, width).sum(-1)) + softmax.max[:, None]
        scores = mass + across
        best = lax.argmax(scores, 1, jnp.int32)[:, None]
        score = jnp.take_along_axis(scores, best, 1)[:, 0]
        logits = jnp.take_along_axis(y.reshape(count, -1, width), best[..., None], 1)[:, 0]
        better = score > self.score
        return GumbelMax(softmax, jnp.where(better, score, self.score),
                         jnp.where(better, first_id + best[:, 0] * width, self.first_id),
                         jnp.where(better[:, None], logits, self.logits))

    def drawn(self, noise: Noise, vocab_axis: str | None = None) -> Drawn:
        """The draw from this device's columns, or those of all devices along a mesh axis."""
        column = 0 if noise.within is None else lax.argmax(self.logits + noise.within, 1, jnp.int32)
        column = jnp.broadcast_to(column, self.first_id.shape)
        logit = jnp.take_along_axis(self.logits, column[:, None], 1)[:, 0]
        ids, score, logsumexp = self.first_id + column, self.score, self.softmax.merge(vocab_axis).logsumexp
        if vocab_axis is not None:
            # The shard with the highest score; between equals the lowest id.
            score, own_ids = lax.pmax(score, vocab_axis), ids
            ids = lax.pmin(jnp.where(score == self.score, ids, jnp.iinfo(jnp.int32).max), vocab_axis)
            logit = lax.psum(jnp.where((own_ids == ids) & (self.score == score), logit, 0.0), vocab_axis)
        return Drawn(ids, score - logsumexp, logit - logsumexp)


def dense_draw(y: jax.Array, exists: jax.Array, noise: Noise) -> Drawn:
    """A draw from softmax(y) over all columns y [P V] that exist; token_ids are columns of y."""
    padding = (0, 0), (0, noise.across.shape[1] * noise.width - y.shape[1])
    y, exists = jnp.pad(y, padding), jnp.pad(exists, padding)
    return GumbelMax.empty(noise).update(y, exists, 0, noise.across).drawn(noise)


def nucleus_draw(plan: Plan, projection: Projection, draw: Draw, where: jax.Array | None, places: jax.Array,
                 temperature: jax.Array) -> Drawn:
    """Draw from the nucleus of softmax(z / temperature) at a device's wanted positions [P], on its columns. The sort
    needs all of a position's columns: blocks are dense in V, shared out over the devices of a sharded vocabulary."""
    total, projection = places.size, projection.add_bias(draw.bias)
    block, temperature = max(1, min(DENSE_BLOCK // plan.size, total // 8)), temperature * draw.temperature

    def at(index):
        logits = plan.dense_logits(projection._replace(hidden=projection.hidden[index])) / temperature
        y, noise = plan.all_columns(logits), draw.noise(plan, index, places, projection.dtype)
        ids = lax.broadcasted_iota(jnp.int32, y.shape, 1)
        if noise.within is None:
            y, ids, across = lax.sort((-y, ids, plan.all_columns(noise.across)), num_keys=1)
            noise = Noise(across, None)
        else:
            # The noise is independent of the logits: its order may be the sorted one.
            y, ids = lax.sort((-y, ids), num_keys=1)
            noise = jax.tree.map(plan.share, noise)
        y = -y
        keep = (jnp.cumsum(jax.nn.softmax(y, -1), -1) <= draw.nucleus_p).at[:, 0].set(True)
        drawn = dense_draw(y, keep & (y > -jnp.inf), noise)
        token_ids = jnp.take_along_axis(ids, drawn.token_ids[:, None], 1)[:, 0]
        return plan.unshare(drawn._replace(token_ids=token_ids), block)

    return at_positions(at, total, where, block)
