"""The mean of all embeddings under a prediction over a large vocabulary, with its entropy."""
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import Head, Plan, Projection, Tile, make_plan, walk
from softmask_jax.diffusion.vocab.online_softmax import OnlineSoftmax
from softmask_jax.diffusion.vocab.positions import Positions


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
    return _mixture(plan, projection, jnp.asarray(temperature, projection.dtype), embedding, where)


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
    """(neg_entropy [B L], mixture [B L D], logsumexp [B L]) of one device's rows; 0 outside `where`."""
    positions = Positions.of(projection.flat.hidden.shape[0], where)
    own = projection.flat.at(positions)

    def step(tile: Tile, rows, columns):
        old, mix = rows
        softmax, e = old.update(tile.logits / temperature, tile.exists)
        new = own.product("pv,vd->pd", e, tile.columns(embedding))
        return (softmax, mix * jnp.exp(old.max - softmax.max)[:, None] + new), columns

    count = len(own.hidden)
    rows = OnlineSoftmax.empty((count,), own.dtype), jnp.zeros((count, embedding.shape[1]), own.dtype)
    (local, mix), _ = walk(plan, own, positions, step, rows)
    softmax = local.merge(plan.vocab_axis)
    mix = plan.sum_vocab(mix * jnp.exp(local.max - softmax.max)[:, None]) / softmax.sum_exp[:, None]
    shape, results = projection.hidden.shape[:2], (softmax.neg_entropy, mix, softmax.logsumexp)
    return tuple(positions.put(x).reshape(*shape, *x.shape[1:]) for x in results)


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
    wanted = jnp.ones(projection.hidden.shape[:2], bool) if where is None else where
    positions = Positions.of(wanted.size, where)
    own = projection.flat.at(positions)
    wanted, mixed = jax.tree.map(lambda x: positions.take(x.reshape(-1, *x.shape[2:])), (wanted, mixed))

    def step(tile: Tile, slope: jax.Array, d_embedding: jax.Array):
        neg_entropy, logsumexp, d_neg_entropy, d_mix = (tile.rows(x) for x in mixed)
        # What nobody wanted may be infinite.
        y, exists = tile.logits / temperature, tile.exists & tile.rows(wanted)[:, None]
        p = jnp.where(exists, jnp.exp(y - logsumexp[:, None]), 0.0)
        centred = jnp.where(exists, y - (neg_entropy + logsumexp)[:, None], 0.0)
        pull = own.product("pd,vd->pv", d_mix, tile.columns(embedding)) + d_neg_entropy[:, None] * centred
        return slope + (p * centred * pull).sum(-1), d_embedding + own.product("pv,pd->vd", p, d_mix)

    zeros = jnp.zeros(len(own.hidden), own.dtype), jnp.zeros(embedding.shape, own.dtype)
    slope, d_embedding = walk(plan, own, positions, step, *zeros)
    slope = plan.sum_positions(plan.sum_vocab(slope.sum()))
    return -slope / temperature, plan.sum_positions(d_embedding).astype(embedding.dtype)


_mixture.defvjp(_mixture_forward, _mixture_backward)
