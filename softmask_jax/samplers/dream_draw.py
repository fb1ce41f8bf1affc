"""Predictions of Dream's and LLaDA's samplers: filters, draw, confidence and feedback in one pass over the vocabulary.

Dream (HKU NLP and Huawei, 2025) divides the logits by a temperature, keeps a nucleus, then the top k; token,
probability, margin and entropy are of that distribution. LLaDA (arXiv 2502.09992) ranks by the probability before that.
Filters need all columns of a position: blocks of P masked positions are dense in V."""
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import DENSE_BLOCK, Head, Plan, Projection, make_plan
from softmask_jax.diffusion.vocab.draw import Draw, Noise, dense_draw
from softmask_jax.diffusion.vocab.online_softmax import OnlineSoftmax, top_k
from softmask_jax.diffusion.vocab.positions import at_positions

# Logits of a tile, and a TPU's rows of a register: a tile has no fewer positions.
TILE, LEAST_TILE = 2**19, 8
CONFIDENCES = ("none", "probability", "margin", "entropy", "unfiltered")


@dataclasses.dataclass(frozen=True)
class Filters:
    """How a token is drawn, all static; None: no filter. ValueError for values out of range."""

    temperature: float = 0.0  # 0 takes the arg-max
    top_p: float | None = None  # keep tokens while the mass before them is at most top_p (MDLM: the mass with them)
    top_k: int | None = None  # then the k largest, with all that equal the k-th
    # a name from `CONFIDENCES`, of the filtered distribution; unfiltered: the probability at temperature 1 (LLaDA)
    confidence: str = "none"
    unsure: tuple[int, ...] = ()  # of unfiltered: ids that are left out, so that to draw one has confidence 0

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
    """Predictions [B L ...]; outside `where` only `finite` is defined."""

    drawn: jax.Array  # the drawn token
    confidence: jax.Array  # of the filtered distribution, see `Filters`
    token_ids: jax.Array | None  # [B L k] of the largest plain logits; None with k = 0, as the next two
    top_logits: jax.Array | None  # [B L k] the logits
    neg_entropy: jax.Array | None  # sum_v p_v log p_v of the plain logits
    finite: jax.Array  # no logit was NaN or +inf; True outside `where`


def predict(hidden: jax.Array, head: Head, where: jax.Array, filters: Filters, *, k: int = 0, draw: Draw = Draw(),
            positions: jax.Array | None = None, suppress_mask: bool = False) -> Predicted:
    """hidden [B L D] -> predictions at the positions `where` [B L]; no gradient. ValueError if shapes do not fit.

    k: candidates of soft-masking's feedback, from the plain logits of all columns of `head`; 0 for none. draw: its
    noise and bias; no noise is needed at temperature 0. positions [B L]: what keyed noise depends on, by default
    0..L-1. suppress_mask: never draw the mask token."""
    plan, projection = make_plan(hidden, head), Projection(hidden, head.weight, head.bias)
    if not 0 <= k <= plan.count:
        raise ValueError(f"k must be between 0 and the {plan.count} tokens that exist, not {k}.")
    bias, draw = draw.bias, dataclasses.replace(draw, bias=None)
    if bias is not None and bias.shape != (plan.size,):
        raise ValueError(f"bias must be [{plan.size}] as the head's rows, not {bias.shape}.")
    draw = draw.prepare(plan, projection) if filters.temperature else None
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    absent_id = head.mask_token_id if suppress_mask else -1
    specs = plan.specs
    in_specs = (specs.projection, None if draw is None else draw.specs(specs), specs.replicated, specs.positions,
                specs.positions)
    local_predict = plan.over_devices(partial(_local_predict, plan, filters, k, absent_id), in_specs, specs.positions)
    return local_predict(*jax.tree.map(lax.stop_gradient, (projection, draw, bias, where, positions)))


def block_size(count: int, width: int, vocabulary: int) -> int:
    """How many of `count` positions are dense in the vocabulary together, for a head [V D].

    Every block reads the head again: its logits in float32 take at least a quarter of the head's memory in bfloat16."""
    block = max(DENSE_BLOCK // vocabulary, width // 8)
    # A whole number of tiles.
    return max(1, min(block // LEAST_TILE * LEAST_TILE, count))


def _local_predict(plan: Plan, filters: Filters, k: int, absent_id: int, projection: Projection, draw: Draw | None,
                   bias: jax.Array | None, where: jax.Array, positions: jax.Array) -> Predicted:
    """The predictions of one device's rows: blocks of positions, each dense in V."""
    flat = projection.flat
    block = block_size(where.size, flat.hidden.shape[1], plan.size)
    exists = plan.exists(jnp.arange(plan.size, dtype=jnp.int32))

    def at(index):
        logits = plan.all_columns(flat._replace(hidden=flat.hidden[index]).logits)
        noise = None
        if draw is not None and draw.gumbel is not None:
            noise = jax.tree.map(plan.all_columns, draw.noise(plan, index, positions, projection.dtype))
        elif draw is not None:
            noise = draw.noise(plan, plan.share(index), positions, projection.dtype)
        return plan.unshare(_predict_tiles(partial(_predict_tile, filters, k, exists, absent_id, bias), logits, noise),
                            block)

    predicted = at_positions(at, where.size, where, block)
    predicted = jax.tree.map(lambda x: x.reshape(*where.shape, *x.shape[1:]), predicted)
    return predicted._replace(finite=predicted.finite | ~where)


def _predict_tiles(predict_tile: Callable, logits: jax.Array, noise: Noise | None) -> Predicted:
    """predict_tile(logits [T V], noise) over tiles of logits [P V]: a prediction reads its logits some 40 times (of
    which soft-masking 4), a tile from a CPU's cache or a TPU's own memory."""
    count, vocabulary = logits.shape
    most = max(TILE // vocabulary, LEAST_TILE)
    rows = max(rows for rows in range(1, min(most, count) + 1) if count % rows == 0)
    if rows == count:
        return predict_tile(logits, noise)
    tiles = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (logits, noise))
    # Without the barrier every read would take its part of the whole array again.
    predicted = lax.map(lambda tile: predict_tile(*lax.optimization_barrier(tile)), tiles)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), predicted)


def _predict_tile(filters: Filters, k: int, exists: jax.Array, absent_id: int, bias: jax.Array | None, z: jax.Array,
                  noise: Noise | None) -> Predicted:
    """The predictions [P] of logits z [P V]; exists [V]: of the columns; bias [V] for the draw."""
    z = jnp.where(exists, z, -jnp.inf)
    # Not from the largest value: in a fused program a maximum may pass over NaN.
    finite = ~(jnp.isnan(z) | (z == jnp.inf)).any(-1)
    top, ids, neg_entropy = (*top_k(z, k), OnlineSoftmax.of(z).neg_entropy) if k else (None,) * 3
    y = z if bias is None else z + bias
    unfiltered = jnp.where(jnp.arange(z.shape[-1]) == absent_id, -jnp.inf, y)
    y = filtered(unfiltered / (filters.temperature or 1.0), filters.top_p, filters.top_k)
    drawn = lax.argmax(y, 1, jnp.int32) if noise is None else dense_draw(y, y > -jnp.inf, noise).token_ids
    if filters.confidence == "unfiltered":
        y = unfiltered.at[:, list(filters.unsure)].set(-jnp.inf) if filters.unsure else unfiltered
    softmax = OnlineSoftmax.of(y)
    if filters.confidence in ("probability", "unfiltered"):
        confidence = jnp.exp(jnp.take_along_axis(y, drawn[:, None], 1)[:, 0] - softmax.logsumexp)
    elif filters.confidence == "margin":
        two = jnp.exp(top_k(y, 2)[0] - softmax.logsumexp[:, None])
        confidence = two[:, 0] - two[:, 1]
    elif filters.confidence == "entropy":
        confidence = softmax.neg_entropy
    else:
        confidence = jnp.zeros(len(z), z.dtype)
    return Predicted(drawn, confidence, ids, top, neg_entropy, finite)


def filtered(y: jax.Array, top_p: float | None, k: int | None) -> jax.Array:
    """y [P V], already over the temperature, with -inf where top_p and then top_k (see `Filters`) drop a column."""
    if top_p is not None and top_p < 1:
        y = jnp.where(_nucleus(y, top_p), y, -jnp.inf)
    if k is not None and k < y.shape[-1]:
        y = jnp.where(y >= top_k(y, k)[0][:, -1:], y, -jnp.inf)
    return y


def _nucleus(y: jax.Array, top_p: float) -> jax.Array:
    """[P V] columns of y in the nucleus (the mass before them is at most top_p), lower ids first between equals.

    Exact without sorting: floats order as integers do, so a bitwise search of 32 halvings finds its smallest value. It
    is a value of y itself: y less its maximum may be rounded otherwise where a fused program computes it again."""
    p = jax.nn.softmax(y, -1)
    kind, bits = (jnp.int64, 64) if y.dtype == jnp.float64 else (jnp.int32, 32)

    # Ordered integers are the bits of a float, with all but the sign flipped below 0.
    def flipped(order):
        return jnp.where(order < 0, order ^ jnp.iinfo(kind).max, order)

    def as_integer(x):
        return flipped(lax.bitcast_convert_type(x, kind))

    def as_float(order):
        return lax.bitcast_convert_type(flipped(order), y.dtype)

    def above(order):
        return jnp.where(y > as_float(order)[:, None], p, 0.0).sum(-1)

    def halve(_, carry):
        low, high = carry
        middle = (low & high) + ((low ^ high) >> 1)  # half of their sum, which may overflow
        enough = above(middle) <= top_p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    lowest = jnp.full(y.shape[:1], as_integer(jnp.asarray(-jnp.inf, y.dtype)))
    least = lax.fori_loop(0, bits, halve, (lowest, as_integer(y.max(-1))))[1]
    before, value = above(least), as_float(least)[:, None]
    tied = (y == value) & (y > -jnp.inf)
    # Between equals each adds its own mass before the next one.
    room = jnp.floor((top_p - before) / jnp.where(tied, p, 0.0).max(-1)) + 1
    crowded = (tied.sum(-1) > room).any()
    tied = lax.cond(crowded, lambda: tied & (jnp.cumsum(tied, -1) <= room[:, None]), lambda: tied)
    return (y > value) | tied
