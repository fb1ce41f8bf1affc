"""Cross-entropy over a large vocabulary, with a backward pass that computes the logits again by chunks."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Chunk, Head, Plan, Projection, make_plan, walk
from softmask_jax.diffusion.vocab.online_softmax import OnlineSoftmax
from softmask_jax.diffusion.vocab.positions import at_positions, over_positions


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
    """(nll, logsumexp) [B L] of one device's rows; undefined outside `where`."""
    flat, flat_targets = projection.flat, targets.reshape(-1)

    def at(positions):
        own, target = flat.at(positions), flat_targets[positions]

        def step(chunk: Chunk, carry):
            softmax, at_target = carry
            hit = (chunk.ids == target[:, None]) & chunk.exists
            return softmax.update(chunk.logits, chunk.exists)[0], at_target + jnp.where(hit, chunk.logits, 0.0).sum(-1)

        return walk(plan, own, step, (OnlineSoftmax.empty(target.shape, own.dtype), jnp.zeros(target.shape, own.dtype)))

    softmax, at_target = at_positions(at, None if where is None else where.reshape(-1))
    logsumexp = softmax.merge(plan.vocab_axis).logsumexp
    return tuple(x.reshape(targets.shape) for x in (logsumexp - plan.sum_vocab(at_target), logsumexp))


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
    flat, flat_scored = projection.flat, jax.tree.map(jnp.ravel, scored)

    def at(positions, d: Projection) -> Projection:
        own = flat.at(positions)
        targets, logsumexp, cotangent = (x.at[positions].get(mode="fill", fill_value=0)[:, None] for x in flat_scored)

        def step(chunk: Chunk, d: Projection) -> Projection:
            p = jnp.exp(chunk.logits - logsumexp) - (chunk.ids == targets)
            # Not a product with a cotangent of 0: where nothing is wanted, p may be infinite.
            d_logits = jnp.where(chunk.exists & (cotangent != 0), p * cotangent, 0.0)
            d_hidden = d.hidden + own.product("pv,vd->pd", d_logits, chunk.part(own.weight))
            if not train_head:
                return d._replace(hidden=d_hidden)
            d_weight = chunk.add_part(d.weight, own.product("pv,pd->vd", d_logits, own.hidden))
            return Projection(d_hidden, d_weight, None if d.bias is None else chunk.add_part(d.bias, d_logits.sum(0)))

        block = walk(plan, own, step, d._replace(hidden=jnp.zeros(own.hidden.shape, own.dtype)))
        return block._replace(hidden=d.hidden.at[positions].set(block.hidden, mode="drop"))

    trained = flat if train_head else Projection(flat.hidden, None, None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, flat.dtype), trained)
    d_hidden, *d_head = over_positions(at, zeros, None if where is None else where.reshape(-1))
    summed = Projection(plan.sum_vocab(d_hidden).reshape(projection.hidden.shape), *plan.sum_positions(d_head))
    return jax.tree.map(lambda d, x: d.astype(x.dtype), summed, trained)


_nll.defvjp(_nll_forward, _nll_backward)
