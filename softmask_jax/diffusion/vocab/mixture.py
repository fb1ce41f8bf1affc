"""The mean of all embeddings under a prediction over a large vocabulary, with its entropy."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Chunk, Head, Plan, Projection, make_plan, walk
from softmask_jax.diffusion.vocab.online_softmax import OnlineSoftmax
from softmask_jax.diffusion.vocab.positions import at_positions, over_positions


def mixture(hidden: jax.Array, head: Head, temperature: jax.Array | float, embedding: jax.Array, *,
            where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The full-vocabulary variant: p = softmax(z / temperature) -> (sum p log p [B L], sum_v p_v e_v [B L D]).

    hidden [B L D], embedding [Vpad D]. where [B L] bool: positions to compute; others are 0 and cost nothing. Gradients
    flow to the temperature and the embedding, not to hidden states and head. The entropy is as in `sweep`.
    ValueError if shapes do not fit."""
    plan = make_plan(hidden, head)
    if embedding.ndim != 2 or embedding.shape[0] != plan.size or jnp.ndim(temperature) != 0:
        raise ValueError(f"embedding must be [{plan.size} D] as the head's weight and the temperature a scalar, got "
                         f"{embedding.shape} and {jnp.shape(temperature)}")
    plan.check_where(where, hidden)
    projection = lax.stop_gradient(Projection(hidden, head.weight, head.bias))
    neg_entropy, mix = _mixture(plan, projection, jnp.asarray(temperature, projection.dtype), embedding, where)
    if where is None:
        return neg_entropy, mix
    return jnp.where(where, neg_entropy, 0.0), jnp.where(where[..., None], mix, 0.0)


class _Mixed(NamedTuple):
    """Results of the forward pass, and their cotangents."""

    neg_entropy: jax.Array  # [B L]
    logsumexp: jax.Array  # [B L]
    d_neg_entropy: jax.Array  # [B L]
    d_mix: jax.Array  # [B L D]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array,
             where: jax.Array | None):
    return _mixture_forward(plan, projection, temperature, embedding, where)[0]


def _mixture_forward(plan, projection, temperature, embedding, where):
    specs, args = plan.specs, (projection, temperature, embedding, where)
    in_specs = specs.projection, specs.replicated, specs.vocab, specs.positions
    neg_entropy, mix, logsumexp = plan.over_devices(partial(_local_mixture, plan), in_specs, specs.positions)(*args)
    return (neg_entropy, mix), (args, neg_entropy, logsumexp)


def _local_mixture(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array,
                   where: jax.Array | None):
    """(neg_entropy [B L], mixture [B L D], logsumexp [B L]) of one device's rows; undefined outside `where`."""
    flat = projection.flat

    def at(positions):
        own = flat.at(positions)

        def step(chunk: Chunk, carry):
            old, mix = carry
            softmax, e = old.update(chunk.logits / temperature, chunk.exists)
            new = own.product("pv,vd->pd", e, chunk.part(embedding))
            return softmax, mix * jnp.exp(old.max - softmax.max)[:, None] + new

        count = len(own.hidden)
        zeros = OnlineSoftmax.empty((count,), own.dtype), jnp.zeros((count, embedding.shape[1]), own.dtype)
        return walk(plan, own, step, zeros)

    local, mix = at_positions(at, None if where is None else where.reshape(-1))
    softmax = local.merge(plan.vocab_axis)
    mix = plan.sum_vocab(mix * jnp.exp(local.max - softmax.max)[:, None]) / softmax.sum_exp[:, None]
    shape = projection.hidden.shape[:2]
    return tuple(x.reshape(*shape, *x.shape[1:]) for x in (softmax.neg_entropy, mix, softmax.logsumexp))


def _mixture_backward(plan, saved, cotangents):
    (projection, temperature, embedding, where), *results = saved
    mixed, specs = _Mixed(*results, *cotangents), plan.specs
    in_specs = specs.projection, specs.replicated, specs.vocab, _Mixed(*(specs.positions,) * 4), specs.positions
    gradient = plan.over_devices(partial(_local_mixture_gradient, plan), in_specs, (specs.replicated, specs.vocab))
    return None, *gradient(projection, temperature, embedding, mixed, where), None


def _local_mixture_gradient(plan: Plan, projection: Projection, temperature: jax.Array, embedding: jax.Array,
                            mixed: _Mixed, where: jax.Array | None):
    """(d temperature, d embedding): with y = z / T, d neg_entropy / d y_v = p_v (log p_v - neg_entropy) and d mix / d
    y_v = p_v (e_v - mix). Both sum to 0 over v: centring y by its mean changes nothing and keeps the sums small."""
    flat, flat_mixed = projection.flat, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mixed)
    flat_where = jnp.ones(projection.hidden.shape[:2], bool) if where is None else where
    flat_where = flat_where.reshape(-1)

    def at(positions, carry):
        own = flat.at(positions)
        neg_entropy, logsumexp, d_neg_entropy, d_mix = (
            x.at[positions].get(mode="fill", fill_value=0) for x in flat_mixed)
        # What nobody wanted may be infinite.
        wanted = flat_where.at[positions].get(mode="fill", fill_value=False)[:, None]

        def step(chunk: Chunk, carry):
            slope, d_embedding = carry
            y, exists = chunk.logits / temperature, chunk.exists & wanted
            p = jnp.where(exists, jnp.exp(y - logsumexp[:, None]), 0.0)
            centred = jnp.where(exists, y - (neg_entropy + logsumexp)[:, None], 0.0)
            pull = own.product("pd,vd->pv", d_mix, chunk.part(embedding)) + d_neg_entropy[:, None] * centred
            d_embedding = chunk.add_part(d_embedding, own.product("pv,pd->vd", p, d_mix))
            return slope + (p * centred * pull).sum(), d_embedding

        return walk(plan, own, step, carry)

    zeros = jnp.zeros((), flat.dtype), jnp.zeros(embedding.shape, flat.dtype)
    slope, d_embedding = over_positions(at, zeros, None if where is None else where.reshape(-1))
    slope = plan.sum_positions(plan.sum_vocab(slope))
    return -slope / temperature, plan.sum_positions(d_embedding).astype(embedding.dtype)


_mixture.defvjp(_mixture_forward, _mixture_backward)
