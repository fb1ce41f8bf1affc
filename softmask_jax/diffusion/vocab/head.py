"""Top-k, entropy, cross-entropy, mixtures and draws over a large vocabulary, without B x L x V logits.

Formulas: arXiv 2510.17206 for lambda and the feedback mixture, MDLM (arXiv 2406.07524) for the likelihood. Matrix
products take operands in the hidden states' dtype; all else is float32 (float64 for float64). Columns that do not exist
(padding, the suppressed mask) are left out of every sum. Small vocabularies take one dense window.

With a `VocabSharding` every device works on its own rows and columns, with the same noise. Over the vocabulary's
devices a sweep takes 2 all-reduces (maximum, sums) and 2 all-gathers (top k), a draw 1 more all-reduce, a cross-entropy
2 all-reduces forward and 1 backward (d hidden), beside the 1 that sums the head's gradient over the rows."""
import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Head, Plan, Projection, Tile, VocabSharding, make_plan, walk
from softmask_jax.diffusion.vocab.cross_entropy import cross_entropy
from softmask_jax.diffusion.vocab.draw import Draw, GumbelMax, Noise, nucleus_draw
from softmask_jax.diffusion.vocab.mixture import mixture
from softmask_jax.diffusion.vocab.online_softmax import LANES, OnlineSoftmax, top_k
from softmask_jax.diffusion.vocab.positions import Positions

__all__ = ["Draw", "Head", "Sweep", "VocabSharding", "cross_entropy", "mixture", "sweep"]


class Sweep(NamedTuple):
    """Results of one pass over the vocabulary; the last three are None without a draw."""

    token_ids: jax.Array  # [B L k] of the largest logits, the lower id first between equals
    top_logits: jax.Array  # [B L k] the logits, unscaled, largest first
    neg_entropy: jax.Array  # [B L] sum_v p_v log p_v of softmax(z / temperature), nats
    logsumexp: jax.Array  # [B L] of z / temperature, nats
    drawn: jax.Array | None = None  # [B L] the drawn token
    drawn_score: jax.Array | None = None  # [B L] its log p + Gumbel noise
    drawn_log_p: jax.Array | None = None  # [B L] its log p under the distribution that it was drawn from


def sweep(hidden: jax.Array, head: Head, *, k: int, temperature: jax.Array | float = 1.0, draw: Draw | None = None,
          where: jax.Array | None = None, positions: jax.Array | None = None) -> Sweep:
    """hidden [B L D] -> top-k, entropy, logsumexp and, if asked, one exact draw a position; no gradient.

    p = softmax(z / temperature) over the columns that exist; the draw is from softmax((z + draw.bias) / (temperature *
    draw.temperature)), nucleus-filtered and renormalised if nucleus_p < 1. Without the reference's 1e-10 inside the
    entropy's logarithm neg_entropy changes by less than V * 1e-10. where [B L] bool: positions to compute, others are
    0. positions [B L]: what keyed noise depends on, by default 0..L-1. ValueError for unfit arguments."""
    plan, projection = make_plan(hidden, head), Projection(hidden, head.weight, head.bias)
    if not 1 <= k <= plan.count:
        raise ValueError(f"k must be between 1 and the {plan.count} tokens that exist, got {k}")
    plan.check_where(where, hidden)
    specs, draw_specs = plan.specs, None
    if draw is not None:
        draw_specs = draw.specs(specs)
        projection, draw = _whole_blocks(plan, projection, draw.prepare(plan, projection))
    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]) if positions is None else positions, hidden.shape[:2])
    args = projection, draw, where, positions, jnp.asarray(temperature, projection.dtype)
    in_specs = specs.projection, draw_specs, specs.positions, specs.positions, specs.replicated
    local_sweep = plan.over_devices(partial(_local_sweep, plan, k), in_specs, specs.positions)
    return local_sweep(*jax.tree.map(lax.stop_gradient, args))


def _whole_blocks(plan: Plan, projection: Projection, draw: Draw) -> tuple[Projection, Draw]:
    """With columns added for keyed noise, which comes in blocks from column 0 on: no shard may begin inside one."""
    extra = -plan.size % (LANES * plan.shards)
    if draw.keys is None or draw.nucleus_p < 1 or not extra:
        return projection, draw

    def pad(x):
        return None if x is None else jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1)))

    hidden, weight, bias = projection
    return Projection(hidden, pad(weight), pad(bias)), dataclasses.replace(draw, bias=pad(draw.bias))


def _local_sweep(plan: Plan, k: int, projection: Projection, draw: Draw | None, where: jax.Array | None,
                 places: jax.Array, temperature: jax.Array) -> Sweep:
    """The `Sweep` of one device's rows; places [B L]: what keyed noise depends on."""
    flat, total, drawn, noise = projection.flat, places.size, (), None
    positions, streamed = Positions.of(total, where), draw is not None and draw.nucleus_p == 1
    if streamed:
        noise = positions.compute(lambda index: draw.noise(plan, index, places, flat.dtype))
    elif draw is not None:
        drawn = nucleus_draw(plan, flat, draw, where, places, temperature)
    swept = _sweep(plan, k, flat.at(positions), positions, draw if streamed else None, noise, temperature)
    sweep = Sweep(*map(positions.put, swept), *drawn)
    return jax.tree.map(lambda x: x.reshape(*places.shape, *x.shape[1:]), sweep)


def _sweep(plan: Plan, k: int, projection: Projection, positions: Positions, draw: Draw | None, noise: Noise | None,
           temperature: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of `Sweep` [S ...] over all devices' columns; the draw's are left out for None."""
    count, dtype = len(projection.hidden), projection.dtype

    def step(tile: Tile, rows, columns):
        top, ids, softmax, best = rows
        softmax, _ = softmax.update(tile.logits / temperature, tile.exists)
        new, index = top_k(jnp.where(tile.exists, tile.logits, -jnp.inf), min(k, len(tile.ids)))
        ids = jnp.concatenate([ids, tile.ids[0] + index], -1)
        top, index = lax.top_k(jnp.concatenate([top, new], -1), k)
        ids = jnp.take_along_axis(ids, index, -1)
        if draw is not None:
            z = tile.logits if draw.bias is None else tile.logits + tile.columns(draw.bias)
            best = best.update(z / (temperature * draw.temperature), tile.exists, tile.ids[0], noise.of(tile))
        return (top, ids, softmax, best), columns

    (top, ids, softmax, best), _ = walk(plan, projection, positions, step, (
        jnp.full((count, k), -jnp.inf, dtype), jnp.zeros((count, k), jnp.int32), OnlineSoftmax.empty((count,), dtype),
        None if draw is None else GumbelMax.empty(noise)))
    if plan.vocab_axis:
        # Shards come in the order of their ids, so the lower id still comes first between equals.
        top, ids = (lax.all_gather(x, plan.vocab_axis, axis=1, tiled=True) for x in (top, ids))
        top, index = lax.top_k(top, k)
        ids = jnp.take_along_axis(ids, index, -1)
    softmax = softmax.merge(plan.vocab_axis)
    drawn = () if draw is None else best.drawn(noise, plan.vocab_axis)
    return ids, top, softmax.neg_entropy, softmax.logsumexp, *drawn
