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

from softmask_jax.diffusion.vocab.chunks import (
    Chunk, Head, Plan, Projection, VocabSharding, at_positions, make_plan, walk,
)
from softmask_jax.diffusion.vocab.draw import Draw, GumbelMax, Noise, nucleus_draw
from softmask_jax.diffusion.vocab.online_softmax import LANES, OnlineSoftmax, top_k

__all__ = ["Draw", "Head", "Sweep", "VocabSharding", "cross_entropy", "mixture", "sweep"]

# The fewest positions of a sweep with `where` that are computed together.
MIN_BLOCK = 256


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
    undefined. positions [B L]: what keyed noise depends on, by default 0..L-1. ValueError for unfit arguments."""
    plan, projection = make_plan(hidden, head), Projection(hidden, head.weight, head.bias)
    if not 1 <= k <= plan.count:
        raise ValueError(f"k must be between 1 and the {plan.count} tokens that exist, got {k}")
    if where is not None and where.shape != hidden.shape[:2]:
        raise ValueError(f"where must be {hidden.shape[:2]} [B L], got {where.shape}")
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
                 positions: jax.Array, temperature: jax.Array) -> Sweep:
    """The `Sweep` of one device's rows."""
    shape, total = positions.shape, positions.size
    flat, index = projection.hidden.reshape(total, -1), jnp.arange(total)

    def at(chosen):
        noise = None if draw is None else draw.noise(plan, index[chosen], positions, projection.dtype)
        return _sweep_positions(plan, k, projection._replace(hidden=flat[chosen]), draw, noise, temperature)

    if where is None:
        result = at(slice(None))
    else:
        # Few enough to skip much, enough that reading the weights again for each block does not dominate.
        block = min(total, max(MIN_BLOCK, total // 8))
        result = at_positions(at, jnp.argsort(~where.reshape(-1), stable=True), where.sum(), block)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), result)


def _sweep_positions(plan: Plan, k: int, projection: Projection, draw: Draw | None, noise: Noise | None,
                     temperature: jax.Array) -> Sweep:
    """The `Sweep` [P ...] of hidden [P D] over all devices' columns."""
    count, dtype = len(projection.hidden), projection.dtype
    streamed = draw is not None and draw.nucleus_p == 1

    def step(chunk: Chunk, carry):
        top, ids, softmax, best = carry
        softmax, _ = softmax.update(chunk.logits / temperature, chunk.exists)
        new, index = top_k(jnp.where(chunk.exists, chunk.logits, -jnp.inf), min(k, len(chunk.ids)))
        ids = jnp.concatenate([ids, chunk.ids[0] + index], -1)
        top, index = lax.top_k(jnp.concatenate([top, new], -1), k)
        ids = jnp.take_along_axis(ids, index, -1)
        if streamed:
            z = chunk.logits if draw.bias is None else chunk.logits + chunk.part(draw.bias)
            best = best.update(z / (temperature * draw.temperature), chunk.exists, chunk.ids[0], noise.of(chunk))
        return top, ids, softmax, best

    top, ids, softmax, best = walk(plan, projection, step, (
        jnp.full((count, k), -jnp.inf, dtype), jnp.zeros((count, k), jnp.int32), OnlineSoftmax.empty((count,), dtype),
        GumbelMax.empty(noise) if streamed else None))
    if plan.vocab_axis:
        # Shards come in the order of their ids, so the lower id still comes first between equals.
        top, ids = (lax.all_gather(x, plan.vocab_axis, axis=1, tiled=True) for x in (top, ids))
        top, index = lax.top_k(top, k)
        ids = jnp.take_along_axis(ids, index, -1)
    softmax, drawn = softmax.merge(plan.vocab_axis), ()
    if streamed:
        drawn = best.drawn(noise, plan.vocab_axis)
    elif draw is not None:
        biased = projection.add_bias(draw.bias)
        drawn = nucleus_draw(plan, biased, noise, temperature * draw.temperature, draw.nucleus_p)
    return Sweep(ids, top, softmax.neg_entropy, softmax.logsumexp, *drawn)


def cross_entropy(hidden: jax.Array, head: Head, targets: jax.Array, *, train_head: bool = True) -> jax.Array:
    """-log softmax(logits)[target]: hidden [B L D], targets [B L] integer -> [B L], nats.

    Gradients for hidden and, if `train_head`, the head's weight and bias, accumulated in float32; the backward pass
    recomputes the logits by chunks. A target that does not exist (padding, the suppressed mask, negative) gives +inf
    and no gradient; leave such positions out with `jnp.where`, not by a weight of 0."""
    plan = make_plan(hidden, head)
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers {hidden.shape[:2]} [B L], got {targets.dtype} {targets.shape}")
    weight, bias = (head.weight, head.bias) if train_head else lax.stop_gradient((head.weight, head.bias))
    projection, targets = Projection(hidden, weight, bias), targets.astype(jnp.int32)
    if plan.mesh or not plan.dense:
        nll = _nll(plan, train_head, projection, targets)
    else:
        logits = plan.dense_logits(projection)
        at_target = jnp.take_along_axis(logits, jnp.clip(targets, 0, plan.size - 1)[..., None], -1)[..., 0]
        nll = jax.nn.logsumexp(logits, -1) - at_target
    return jnp.where(plan.exists(targets), nll, jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(plan: Plan, train_head: bool, projection: Projection, targets: jax.Array) -> jax.Array:
    return _nll_forward(plan, train_head, projection, targets)[0]


def _nll_forward(plan, train_head, projection, targets):
    specs = plan.specs
    local_nll = plan.over_devices(partial(_local_nll, plan), (specs.projection, specs.positions), specs.positions)
    nll, logsumexp = local_nll(projection, targets)
    return nll, (projection, targets, logsumexp)


def _local_nll(plan: Plan, projection: Projection, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(chunk: Chunk, carry):
        softmax, at_target = carry
        hit = (chunk.ids == targets[..., None]) & chunk.exists
        return softmax.update(chunk.logits, chunk.exists)[0], at_target + jnp.where(hit, chunk.logits, 0.0).sum(-1)

    shape, dtype = targets.shape, projection.dtype
    softmax, at_target = walk(plan, projection, step, (OnlineSoftmax.empty(shape, dtype), jnp.zeros(shape, dtype)))
    logsumexp = softmax.merge(plan.vocab_axis).logsumexp
    return logsumexp - plan.sum_vocab(at_target), logsumexp


def _nll_backward(plan, train_head, saved, cotangent):
    projection, targets, logsumexp = saved
    # A target that does not exist has no gradient.
    cotangent = jnp.where(plan.exists(targets), cotangent, 0.0).astype(projection.dtype)
    specs = plan.specs
    in_specs = specs.projection, specs.positions, specs.positions, specs.positions
    gradient = plan.over_devices(partial(_local_nll_gradient, plan, train_head), in_specs, specs.projection)
    return gradient(projection, targets, logsumexp, cotangent), None


def _local_nll_gradient(plan: Plan, train_head: bool, projection: Projection, targets: jax.Array,
                        logsumexp: jax.Array, cotangent: jax.Array) -> Projection:
    def step(chunk: Chunk, d: Projection) -> Projection:
        p = jnp.exp(chunk.logits - logsumexp[..., None]) - (chunk.ids == targets[..., None])
        d_logits = jnp.where(chunk.exists, p * cotangent[..., None], 0.0)
        d_hidden = d.hidden + projection.product("blv,vd->bld", d_logits, chunk.part(projection.weight))
        if not train_head:
            return Projection(d_hidden, None, None)
        d_weight = chunk.add_part(d.weight, projection.product("blv,bld->vd", d_logits, projection.hidden))
        return Projection(d_hidden, d_weight, None if d.bias is None else chunk.add_part(d.bias, d_logits.sum((0, 1))))

    trained = projection if train_head else Projection(projection.hidden, None, None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, projection.dtype), trained)
    d_hidden, *d_head = walk(plan, projection, step, zeros)
    summed = Projection(plan.sum_vocab(d_hidden), *plan.sum_positions(d_head))
    return jax.tree.map(lambda d, x: d.astype(x.dtype), summed, trained)


_nll.defvjp(_nll_forward, _nll_backward)


def mixture(hidden: jax.Array, head: Head, temperature: jax.Array | float,
            embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The full-vocabulary variant: p = softmax(z / temperature) -> (sum p log p [B L], sum_v p_v e_v [B L D]).

    hidden [B L D], embedding [Vpad D]. Gradients flow to the temperature and the embedding, not to hidden states and
    head. The entropy is as in `sweep`. ValueError if shapes do not fit."""
    plan = make_plan(hidden, head)
    if embedding.ndim != 2 or embedding.shape[0] != plan.size or jnp.ndim(temperature) != 0:
        raise ValueError(f"embedding must be [{plan.size} D] as the head's weight and the temperature a scalar, got "
                         f"{embedding.shape} and {jnp.shape(temperature)}")
    projection = lax.stop_gradient(Projection(hidden, head.weight, head.bias))
    return _mixture(plan, projection, jnp.asarray(temperature, projection.dtype), embedding)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array):
    return _mixture_forward(plan, projection, temperature, embedding)[0]


def _mixture_forward(plan, projection, temperature, embedding):
    specs, args = plan.specs, (projection, temperature, embedding)
    in_specs = specs.projection, specs.replicated, specs.vocab
    neg_entropy, mix, logsumexp = plan.over_devices(partial(_local_mixture, plan), in_specs, specs.positions)(*args)
    return (neg_entropy, mix), (*args, neg_entropy, logsumexp)


def _local_mixture(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array):
    """(neg_entropy [B L], mixture [B L D], logsumexp [B L]) of one device's rows."""
    def step(chunk: Chunk, carry):
        old, mix = carry
        softmax, e = old.update(chunk.logits / temperature, chunk.exists)
        new = projection.product("blv,vd->bld", e, chunk.part(embedding))
        return softmax, mix * jnp.exp(old.max - softmax.max)[..., None] + new

    shape, dtype = projection.hidden.shape[:2], projection.dtype
    zeros = OnlineSoftmax.empty(shape, dtype), jnp.zeros((*shape, embedding.shape[1]), dtype)
    local, mix = walk(plan, projection, step, zeros)
    softmax = local.merge(plan.vocab_axis)
    mix = plan.sum_vocab(mix * jnp.exp(local.max - softmax.max)[..., None])
    return softmax.neg_entropy, mix / softmax.sum_exp[..., None], softmax.logsumexp


def _mixture_backward(plan, saved, cotangents):
    specs = plan.specs
    in_specs = specs.projection, specs.replicated, specs.vocab, *(specs.positions,) * 4
    gradient = plan.over_devices(partial(_local_mixture_gradient, plan), in_specs, (specs.replicated, specs.vocab))
    return None, *gradient(*saved, *cotangents)


def _local_mixture_gradient(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array,
                            neg_entropy: jax.Array, logsumexp: jax.Array, d_neg_entropy: jax.Array, d_mix: jax.Array):
    """(d temperature, d embedding): with y = z / T, d neg_entropy / d y_v = p_v (log p_v - neg_entropy) and d mix / d
    y_v = p_v (e_v - mix). Both sum to 0 over v: centring y by its mean changes nothing and keeps the sums small."""
    mean = neg_entropy + logsumexp

    def step(chunk: Chunk, carry):
        slope, d_embedding = carry
        y = chunk.logits / temperature
        p = jnp.where(chunk.exists, jnp.exp(y - logsumexp[..., None]), 0.0)
        centred = jnp.where(chunk.exists, y - mean[..., None], 0.0)
        pull = projection.product("bld,vd->blv", d_mix, chunk.part(embedding)) + d_neg_entropy[..., None] * centred
        d_embedding = chunk.add_part(d_embedding, projection.product("blv,bld->vd", p, d_mix))
        return slope + (p * centred * pull).sum(-1), d_embedding

    zeros = jnp.zeros(neg_entropy.shape, projection.dtype), jnp.zeros(embedding.shape, projection.dtype)
    slope, d_embedding = walk(plan, projection, step, zeros)
    slope = plan.sum_positions(plan.sum_vocab(slope.sum()))
    return -slope / temperature, plan.sum_positions(d_embedding).astype(embedding.dtype)


_mixture.defvjp(_mixture_forward, _mixture_backward)
