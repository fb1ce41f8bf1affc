"""One look at the vocabulary for Dream's samplers: filters, draw, confidence and soft-masking's statistics at once.

Dream (HKU NLP and Huawei, 2025) divides the logits by a temperature, keeps a nucleus, then the top k; the token is
drawn from what is left, and probability, margin and entropy are all of that distribution. The filters need every column
of a position together, so blocks of positions are dense in V, and only positions that are still masked are visited.
"""
import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Columns, Head, LANES, Mass, columns, logits_of, top_k, wide
from softmask_jax.diffusion.vocab.draw import Best, keyed_noise

CONFIDENCES = ("none", "probability", "margin", "entropy")
# Elements of one dense block, positions x V.
BLOCK = 2 ** 24


@dataclasses.dataclass(frozen=True)
class Filters:
    """How a token is drawn, all static; ValueError for what is out of range.

    temperature: 0 takes the arg-max. top_p: tokens are kept while the mass before them is at most top_p, so the one
    that crosses it stays (unlike MDLM's nucleus). top_k: then the k largest, with all that equal the k-th. None: no
    filter.
    confidence: what is reported of the filtered distribution.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    confidence: str = "none"

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (arg-max) or above and finite, not {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None for no filter, not {self.top_p}.")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number from 1 on, or None for no filter, not {self.top_k}.")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence is '{self.confidence}'; choose one of {', '.join(CONFIDENCES)}.")


class Predicted(NamedTuple):
    """At the wanted positions (elsewhere undefined), all [B L]: the drawn token and its confidence; of the plain logits
    the k largest with their ids [B L k] and sum_v p_v log p_v (None with k = 0). finite: no logit was NaN or +inf,
    True elsewhere."""

    drawn: jax.Array
    confidence: jax.Array
    token_ids: jax.Array | None
    top_logits: jax.Array | None
    neg_entropy: jax.Array | None
    finite: jax.Array


def predict(hidden: jax.Array, head: Head, wanted: jax.Array, filters: Filters, *, k: int = 0, keys=None, places=None,
            gumbel=None, suppress_mask: bool = False, bias: jax.Array | None = None) -> Predicted:
    """hidden [B L D] -> what the wanted positions [B L] predict. No gradient flows.

    Args:
      k: the size of soft-masking's feedback, read from the plain logits of all columns that `head` has; 0 for none.
      keys: [B] one key a row, with places [B L]: the noise is a function of (key, place) alone.
      gumbel: [B L V] recorded noise instead. With temperature 0 neither is used.
      suppress_mask: leave the mask token out of the draw, also where `head` has it.
      bias: [Vpad], added to the logits that are drawn from, and to no others.

    ValueError if shapes do not fit or a temperature comes without noise.
    """
    cols = columns(hidden, head)
    if filters.temperature == 0:
        keys = gumbel = None
    elif (keys is None) == (gumbel is None):
        raise ValueError("A temperature above 0 needs either keys [B] or recorded gumbel [B L V], exactly one of them.")
    if gumbel is not None:
        if gumbel.shape != (*hidden.shape[:2], cols.vocab_size):
            raise ValueError(f"gumbel must be {(*hidden.shape[:2], cols.vocab_size)} [B L V], not {gumbel.shape}.")
        gumbel = jnp.pad(gumbel, ((0, 0), (0, 0), (0, cols.size - cols.vocab_size))).astype(wide(hidden))
    if not 0 <= k <= cols.count:
        raise ValueError(f"k must be between 0 and the {cols.count} tokens that exist, not {k}.")
    if bias is not None and bias.shape != (cols.size,):
        raise ValueError(f"bias must be [{cols.size}] as the head's rows, not {bias.shape}.")
    left_out = head.mask_token_id if suppress_mask else -1
    if places is None:
        places = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])

    args = (hidden, head.weight, head.bias, bias, keys, gumbel, wanted, places)
    body = partial(_over_blocks, cols, filters, k, left_out)
    out = cols.over_devices(body, jax.tree.map(lax.stop_gradient, args), "rvvakgrr", "rrrrrr")
    return Predicted(*out[:2], *(out[2:5] if k else (None, None, None)), out[5])


def _over_blocks(cols: Columns, filters: Filters, k: int, left_out: int, hidden, weight, bias, tilt, keys, gumbel,
                 wanted, places):
    """The six results on one device's rows: blocks of wanted positions, each dense in V."""
    batch, length = wanted.shape
    total, dtype, shards = batch * length, wide(hidden), cols.shards
    per = max(1, min(BLOCK // cols.size, total))
    local = weight.shape[0]
    exists = cols.exist(jnp.arange(local, dtype=jnp.int32) + cols.offset(local))
    order = jnp.argsort(~wanted.reshape(total), stable=True)
    count = wanted.sum()

    def by_position(x):
        """[P Vlocal] on every shard -> [P/shards V]: all columns of this device's share of the positions."""
        if shards == 1:
            return x
        x = jnp.pad(x, ((0, -per % shards), (0, 0)))
        return lax.all_to_all(x, cols.sharding.vocab_axis, 0, 1, tiled=True)

    def share(x):
        """[P], the same on every shard -> [P/shards]."""
        if shards == 1:
            return x
        size = -(-per // shards)
        return lax.dynamic_slice_in_dim(jnp.pad(x, (0, -per % shards)), lax.axis_index(cols.sharding.vocab_axis) * size,
                                        size)

    def step(carry):
        start, out = carry
        # The last block is shifted back to fit: the same positions give the same results again.
        at = lax.dynamic_slice_in_dim(order, start, per)
        z = logits_of(hidden.reshape(total, -1)[at], weight, bias)
        z = by_position(jnp.where(exists, z, -jnp.inf))
        noise = None if gumbel is None else by_position(gumbel.reshape(total, -1)[at])
        if keys is not None:
            own = share(at)
            noise = keyed_noise(keys[own // length], places.reshape(total)[own], cols.size, dtype)
        found = _block(filters, k, left_out, z, tilt, noise, keys is not None)
        if shards > 1:
            found = tuple(lax.all_gather(x, cols.sharding.vocab_axis, tiled=True)[:per] for x in found)
        return start + per, tuple(o.at[at].set(x) for o, x in zip(out, found))

    empty = (jnp.zeros(total, jnp.int32), jnp.zeros(total, dtype), jnp.zeros((total, k), jnp.int32),
             jnp.zeros((total, k), dtype), jnp.zeros(total, dtype), jnp.ones(total, bool))
    out = lax.while_loop(lambda carry: carry[0] < count, step, (jnp.zeros((), count.dtype), empty))[1]
    drawn, confidence, ids, top, neg_entropy, finite = (x.reshape(batch, length, *x.shape[1:]) for x in out)
    return drawn, confidence, ids, top, neg_entropy, finite | ~wanted


def _block(filters: Filters, k: int, left_out: int, z: jax.Array, tilt: jax.Array | None, noise: jax.Array | None,
           keyed: bool):
    """The results of a dense block: logits z [P V], -inf where no column exists; tilt [V] for the draw."""
    positions, dtype = z.shape[0], z.dtype
    # Not from the largest value: in a fused program a maximum may pass over NaN.
    finite = ~(jnp.isnan(z) | (z == jnp.inf)).any(-1)
    ids, top, neg_entropy = jnp.zeros((positions, 0), jnp.int32), jnp.zeros((positions, 0), dtype), None
    if k:
        top, ids = top_k(z, k)
        neg_entropy = _mass(z).neg_entropy
    y = z if tilt is None else z + tilt
    y = jnp.where(jnp.arange(z.shape[-1]) == left_out, -jnp.inf, y) / (filters.temperature or 1.0)
    y = filtered(y, filters.top_p, filters.top_k)
    mass = _mass(y)
    if filters.temperature == 0:
        drawn = lax.argmax(y, 1, jnp.int32)
    else:
        inside, across = (noise[:, :LANES], noise[:, LANES:]) if keyed else (None, noise)
        columns_of = jnp.pad(y, ((0, 0), (0, -y.shape[-1] % LANES if keyed else 0)), constant_values=-jnp.inf)
        best = Best.empty((positions,), dtype, keyed).add(columns_of, columns_of > -jnp.inf, 0, across)
        drawn = best.local(inside)[1]
    if filters.confidence == "probability":
        confidence = jnp.exp(jnp.take_along_axis(y, drawn[:, None], 1)[:, 0] - mass.logsumexp)
    elif filters.confidence == "margin":
        two = jnp.exp(top_k(y, 2)[0] - mass.logsumexp[:, None])
        confidence = two[:, 0] - two[:, 1]
    elif filters.confidence == "entropy":
        confidence = mass.neg_entropy
    else:
        confidence = jnp.zeros(positions, dtype)
    return drawn, confidence, ids, top, jnp.zeros(positions, dtype) if neg_entropy is None else neg_entropy, finite


def _mass(y: jax.Array) -> Mass:
    """Of all columns of y [P V] at once, -inf where there is none: half as many looks at y as `Mass.add` takes."""
    m = y.max(-1)
    above = y - m[:, None]
    e = jnp.exp(above)
    return Mass(m, e.sum(-1), jnp.where(e > 0, above * e, 0.0).sum(-1))


def filtered(y: jax.Array, top_p: float | None, k: int | None) -> jax.Array:
    """y [P V], already over the temperature, with -inf where top_p and then top_k (see `Filters`) drop a column."""
    if top_p is not None and top_p < 1:
        y = jnp.where(_nucleus(y, top_p), y, -jnp.inf)
    if k is not None and k < y.shape[-1]:
        y = jnp.where(y >= top_k(y, k)[0][:, -1:], y, -jnp.inf)
    return y


def _nucleus(y: jax.Array, top_p: float) -> jax.Array:
    """Which of y [P V] the nucleus keeps, lower ids first between equals; exact without sorting.

    A column is kept while the mass before it is at most top_p. The smallest kept value is found bit by bit: floats are
    ordered as integers are, so 31 halvings leave one float32 value.
    """
    y = y - y.max(-1, keepdims=True)
    p = jax.nn.softmax(y, -1)
    kind, bits = (jnp.int64, 63) if y.dtype == jnp.float64 else (jnp.int32, 31)

    def as_float(order):
        # From 0 down, ordered integers are the floats' bits with all but the sign flipped.
        flipped = jnp.where(order < 0, order ^ jnp.iinfo(kind).max, order)
        return lax.bitcast_convert_type(flipped, y.dtype)

    def above(order):
        return jnp.where(y > as_float(order)[:, None], p, 0.0).sum(-1)

    def halve(_, carry):
        low, high = carry
        middle = low + (high - low) // 2
        enough = above(middle) <= top_p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    lowest = lax.bitcast_convert_type(jnp.asarray(-jnp.inf, y.dtype), kind) ^ jnp.iinfo(kind).max
    start = jnp.full(y.shape[:1], lowest - 1, kind), jnp.zeros(y.shape[:1], kind)
    least = lax.fori_loop(0, bits, halve, start)[1]
    before, value = above(least), as_float(least)[:, None]
    tied = (y == value) & (y > -jnp.inf)
    # Between equals each adds its own mass before the next one.
    room = jnp.floor((top_p - before) / jnp.where(tied, p, 0.0).max(-1)) + 1
    crowded = (tied.sum(-1) > room).any()
    kept = lax.cond(crowded, lambda: tied & (jnp.cumsum(tied, -1) <= room[:, None]), lambda: tied)
    return (y > value) | kept
