"""Cross-entropy over a large vocabulary, with a backward pass that computes the logits again by chunks."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Head, Plan, Projection, Tile, make_plan, walk
from softmask_jax.diffusion.vocab.online_softmax import OnlineSoftmax
from softmask_jax.diffusion.vocab.positions import Positions


def cross_entropy(hidden: jax.Array, head: Head, targets: jax.Array, *, where: jax.Array | None = None,
                  train_head: bool = True) -> jax.Array:
    """-log softmax(logits)[target]: hidden [B L D], targets [B L] integer -> [B L], nats.

    where [B L] bool: positions to compute; others are 0 and cost nothing, forward and backward. Gradients for hidden
    and, if `train_head`, the head's weight and bias, accumulated in float32. A target that does not exist (padding, the
    suppressed mask, negative) gives +inf and no gradient; leave such positions out by `where`, not by a weight of 0."""
    plan = make_plan(hidden, head)
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers {hidden.shape[:2]} [B L], got {targets.dtype} {targets.shape}")
    plan.check_where(where, hidden)
    weight, bias = (head.weight, head.bias) if train_head else lax.stop_gradient((head.weight, head.bias))
    projection, targets = Projection(hidden, weight, bias), jnp.asarray(targets, jnp.int32)
    if plan.mesh or not plan.dense:
        nll = _nll(plan, train_head, projection, targets, where)
    else:
        logits = plan.dense_logits(projection)
        at_target = jnp.take_along_axis(logits, jnp.clip(targets, 0, plan.size - 1)[..., None], -1)[..., 0]
        nll = jax.nn.logsumexp(logits, -1) - at_target
    nll = jnp.where(plan.exists(targets), nll, jnp.inf)
    return nll if where is None else jnp.where(where, nll, 0.0)


class _Scored(NamedTuple):
    """Targets of a device's positions, and what the forward pass leaves to the backward pass."""

    targets: jax.Array  # [B L]
    logsumexp: jax.Array  # [B L]
    cotangent: jax.Array  # [B L], 0 where nothing is wanted


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(plan: Plan, train_head: bool, projection: Projection, targets: jax.Array, where: jax.Array | None):
    return _nll_forward(plan, train_head, projection, targets, where)[0]


def _nll_forward(plan, train_head, projection, targets, where):
    specs = plan.specs
    in_specs = specs.projection, specs.positions, specs.positions
    nll, logsumexp = plan.over_devices(partial(_local_nll, plan), in_specs, specs.positions)(projection, targets, where)
    return nll, (projection, targets, where, logsumexp)


def _local_nll(plan: Plan, projection: Projection, targets: jax.Array, where: jax.Array | None):
    """(nll, logsumexp) [B L] of one device's rows; 0 outside `where`."""
    positions = Positions.of(targets.size, where)
    own, own_targets = projection.flat.at(positions), positions.take(targets.reshape(-1))

    def step(tile: Tile, rows, columns):
        softmax, at_target = rows
        hit = (tile.ids == tile.rows(own_targets)[:, None]) & tile.exists
        softmax, _ = softmax.update(tile.logits, tile.exists)
        return (softmax, at_target + jnp.where(hit, tile.logits, 0.0).sum(-1)), columns

    shape, dtype = own_targets.shape, own.dtype
    rows = OnlineSoftmax.empty(shape, dtype), jnp.zeros(shape, dtype)
    (softmax, at_target), _ = walk(plan, own, positions, step, rows)
    logsumexp = softmax.merge(plan.vocab_axis).logsumexp
    results = logsumexp - plan.sum_vocab(at_target), logsumexp
    return tuple(positions.put(x).reshape(targets.shape) for x in results)


def _nll_backward(plan, train_head, saved, cotangent):
    projection, targets, where, logsumexp = saved
    # A target that does not exist has no gradient.
    scored = plan.exists(targets) if where is None else where & plan.exists(targets)
    cotangent = jnp.where(scored, cotangent, 0.0).astype(projection.dtype)
    specs = plan.specs
    in_specs = specs.projection, _Scored(*(specs.positions,) * 3), specs.positions
    gradient = plan.over_devices(partial(_local_nll_gradient, plan, train_head), in_specs, specs.projection)
    return gradient(projection, _Scored(targets, logsumexp, cotangent), where), None, None


def _local_nll_gradient(plan: Plan, train_head: bool, projection: Projection, scored: _Scored,
                        where: jax.Array | None) -> Projection:
    positions = Positions.of(scored.targets.size, where)
    own, scored = projection.flat.at(positions), jax.tree.map(lambda x: positions.take(x.reshape(-1)), scored)

    def step(tile: Tile, d_hidden: jax.Array, d_head):
        targets, logsumexp, cotangent = (tile.rows(x)[:, None] for x in scored)
        p = jnp.exp(tile.logits - logsumexp) - (tile.ids == targets)
        # Not a product with a cotangent of 0: where nothing is wanted, p may be infinite.
        d_logits = jnp.where(tile.exists & (cotangent != 0), p * cotangent, 0.0)
        product = tile.projection.product
        d_hidden += product("pv,vd->pd", d_logits, tile.projection.weight)
        if train_head:
            new = product("pv,pd->vd", d_logits, tile.projection.hidden), d_logits.sum(0)
            d_head = jax.tree.map(jnp.add, d_head, new[: len(d_head)])
        return d_hidden, d_head

    trained = [x for x in projection[1:] if train_head and x is not None]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, own.dtype), (own.hidden, tuple(trained)))
    d_hidden, d_head = walk(plan, own, positions, step, *zeros)
    d_hidden = plan.sum_vocab(positions.put(d_hidden).reshape(projection.hidden.shape)).astype(projection.hidden.dtype)
    d_head = [d.astype(x.dtype) for d, x in zip(plan.sum_positions(d_head), trained)]
    return Projection(d_hidden, *d_head, *[None] * (2 - len(d_head)))


_nll.defvjp(_nll_forward, _nll_backward)
