"""Everything that touches the vocabulary: top-k, entropy, cross-entropy, mixtures and draws, never B x L x V.

Formulas: "Soft-Masked Diffusion Language Models" (arXiv 2510.17206), equations for lambda and the feedback mixture;
MDLM (arXiv 2406.07524) for the likelihood. Logits are hidden @ weight.T + bias with operands in the hidden states'
dtype, accumulated in float32; everything after is float32 (float64 for float64 hidden states). Columns that do not
exist (padding, the suppressed mask) are left out of every sum. Small vocabularies take one dense window. With a
`VocabSharding`, all of it runs on local shards of rows and columns, and draws the same noise.
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from softmask_jax.diffusion.vocab.chunks import (
    LANES, Chunk, Columns, Head, Mass, VocabSharding, columns, logits_of, product, top_k, walk, wide,
)
from softmask_jax.diffusion.vocab.draw import Best, Draw, add_chunk, check_draw, keyed_noise, nucleus_draw

__all__ = ["Draw", "Head", "Sweep", "VocabSharding", "cross_entropy", "mixture", "sweep"]

# Positions of a sweep over wanted positions that are looked at together, at least.
FEWEST = 256


class Sweep(NamedTuple):
    """What one pass over the vocabulary finds, all [B L ...]: the k largest logits (unscaled, largest first, the lower
    id first between equals) and their ids; sum_v p_v log p_v and logsumexp of z / temperature (nats); the drawn token,
    its log p + Gumbel score and its log p under what it was drawn from (None without a draw)."""
    token_ids: jax.Array
    top_logits: jax.Array
    neg_entropy: jax.Array
    logsumexp: jax.Array
    drawn: jax.Array | None
    drawn_score: jax.Array | None
    drawn_log_p: jax.Array | None


def sweep(hidden: jax.Array, head: Head, *, k: int, temperature: jax.Array | float = 1.0, draw: Draw | None = None,
          wanted: jax.Array | None = None, places: jax.Array | None = None) -> Sweep:
    """hidden [B L D] -> top-k, entropy, logsumexp and, if asked, one exact draw a position. No gradient flows.

    p = softmax(z / temperature) over the columns that exist; the draw is from softmax((z + draw.bias) / (temperature *
    draw.temperature)), nucleus-filtered and renormalised if nucleus_p < 1. The reference adds 1e-10 inside the
    entropy's logarithm; leaving it out changes neg_entropy by less than V * 1e-10. wanted: [B L] bool, the positions
    whose results are needed: the others' are undefined, no time is spent on them. places: [B L], of keyed noise; 0..L-1.
    ValueError if shapes do not fit, k exceeds the columns that exist, or the draw is malformed.
    """
    cols = columns(hidden, head)
    if not 1 <= k <= cols.count:
        raise ValueError(f"k must be between 1 and the {cols.count} tokens that exist, got {k}")
    if wanted is not None and wanted.shape != hidden.shape[:2]:
        raise ValueError(f"wanted must be {hidden.shape[:2]} [B L], got {wanted.shape}")
    keys = gumbel = tilt = None
    heat = jnp.ones((), wide(hidden))
    weight, bias = head.weight, head.bias
    if draw is not None:
        check_draw(draw, cols, hidden)
        keys, heat, tilt = draw.keys, draw.temperature, draw.bias
        if draw.gumbel is not None:
            gumbel = jnp.pad(draw.gumbel, ((0, 0), (0, 0), (0, cols.size - cols.vocab_size))).astype(wide(hidden))
    if keys is not None and draw.nucleus_p == 1 and cols.size % (LANES * cols.shards):
        # Blocks of noise are cut from column 0 on; no shard may begin inside one.
        extra = -cols.size % (LANES * cols.shards)
        weight = jnp.pad(weight, ((0, extra), (0, 0)))
        bias, tilt = (None if x is None else jnp.pad(x, (0, extra)) for x in (bias, tilt))
    kind = None if draw is None else _Kind(keys is not None, draw.nucleus_p)

    def body(hidden, weight, bias, tilt, keys, gumbel, wanted, places, temperature, heat):
        rows, length = hidden.shape[:2]
        over = partial(_swept, cols, k, kind, weight, bias, tilt, temperature, heat)
        rows_of, places = jnp.indices((rows, length))[0].reshape(-1), places.reshape(-1)

        def at(chosen):
            """The results at chosen positions [P] of the flattened rows: leaves [P ...]."""
            noise = None if gumbel is None else gumbel.reshape(rows * length, -1)[chosen]
            if keys is not None:
                noise = keyed_noise(keys[rows_of[chosen]], places[chosen], cols.size, wide(hidden))
            return over(hidden.reshape(rows * length, -1)[chosen], noise)

        out = at(slice(None)) if wanted is None else _where_wanted(at, wanted.reshape(-1))
        return tuple(x.reshape(rows, length, *x.shape[1:]) for x in out)

    scales = (jnp.asarray(x, wide(hidden)) for x in (temperature, heat))
    places = jnp.broadcast_to(jnp.arange(hidden.shape[1]) if places is None else places, hidden.shape[:2])
    args = jax.tree.map(lax.stop_gradient, (hidden, weight, bias, tilt, keys, gumbel, wanted, places, *scales))
    found = cols.over_devices(body, args, "rvvvkgrraa", "rrrr" if draw is None else "rrrrrrr")
    return Sweep(*found, *(() if draw is not None else (None,) * 3))


class _Kind(NamedTuple):
    keyed: bool
    nucleus_p: float


def _swept(cols: Columns, k: int, kind: _Kind | None, weight, bias, tilt, temperature, heat, hidden, noise) -> tuple:
    """The fields of `Sweep` [P ...] for hidden [P D] on one device's columns; noise [P n] as `keyed_noise` or recorded."""
    # As one row of P positions, which is what a walk takes.
    hidden = hidden[None]
    shape, dtype, size = hidden.shape[:2], wide(hidden), weight.shape[0] * cols.shards
    keyed, nucleus = kind is not None and kind.keyed, kind is not None and kind.nucleus_p < 1
    inside = across = noise = None if noise is None else noise[None]
    if keyed:
        inside, across = noise[..., :LANES], noise[..., LANES:]
        across = jnp.pad(across, ((0, 0), (0, 0), (0, max(0, size // LANES - across.shape[-1]))))
    streamed = kind is not None and not nucleus

    def step(chunk: Chunk, carry):
        top, ids, mass, best = carry
        mass, _ = mass.add(chunk.logits / temperature, chunk.exists)
        new, at = top_k(jnp.where(chunk.exists, chunk.logits, -jnp.inf), min(k, chunk.ids.shape[0]))
        top, which = lax.top_k(jnp.concatenate([top, new], -1), k)
        ids = jnp.take_along_axis(jnp.concatenate([ids, chunk.ids[0] + at], -1), which, -1)
        if streamed:
            z = chunk.logits if tilt is None else chunk.logits + chunk.part(tilt)
            best = add_chunk(best, z / (temperature * heat), chunk, across)
        return top, ids, mass, best

    top, ids, mass, best = walk(cols, hidden, weight, bias, step, (
        jnp.full((*shape, k), -jnp.inf, dtype), jnp.zeros((*shape, k), jnp.int32), Mass.empty(shape, dtype),
        Best.empty(shape, dtype, keyed) if streamed else None))
    if cols.shards > 1:
        # Shards come in the order of their ids, so the lower id still comes first between equals.
        top, ids = (lax.all_gather(x, cols.sharding.vocab_axis, axis=2, tiled=True) for x in (top, ids))
        top, which = lax.top_k(top, k)
        ids = jnp.take_along_axis(ids, which, -1)
    mass = mass.merged(cols)
    drawn = ()
    if streamed:
        drawn = best.finish(cols, inside)
    elif nucleus:
        tilted = bias if tilt is None else tilt if bias is None else bias + tilt
        drawn = nucleus_draw(cols, hidden, weight, tilted, noise, temperature * heat, kind.nucleus_p, keyed)
    return tuple(x[0] for x in (ids, top, mass.neg_entropy, mass.logsumexp, *drawn))


def _where_wanted(at: Callable[[jax.Array], tuple], wanted: jax.Array) -> tuple:
    """`at` of all wanted positions [n], some at a time, zeros elsewhere: leaves [n ...]."""
    total = wanted.shape[0]
    # Few enough to skip much, enough that reading the weights again for each does not dominate.
    per = min(total, max(FEWEST, total // 8))
    order, count = jnp.argsort(~wanted, stable=True), wanted.sum()

    def step(carry):
        start, out = carry
        # The last ones are shifted back to fit: the same positions give the same results again.
        chosen = lax.dynamic_slice_in_dim(order, start, per)
        return start + per, tuple(o.at[chosen].set(x) for o, x in zip(out, at(chosen)))

    shapes = jax.eval_shape(at, order[:per])
    empty = tuple(jnp.zeros((total, *x.shape[1:]), x.dtype) for x in shapes)
    return lax.while_loop(lambda carry: carry[0] < count, step, (jnp.zeros((), count.dtype), empty))[1]


def cross_entropy(hidden: jax.Array, head: Head, targets: jax.Array, *, train_head: bool = True) -> jax.Array:
    """-log softmax(logits)[target]: hidden [B L D], targets [B L] integer -> [B L], nats.

    Gradients for hidden and, if `train_head`, the head's weight and bias, accumulated in float32; the backward pass
    computes the logits again, chunk by chunk. A target that does not exist (padding, the suppressed mask, negative)
    has probability 0: +inf and no gradient; leave such positions out with `jnp.where`, not by a weight of 0.
    """
    cols = columns(hidden, head)
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers {hidden.shape[:2]} [B L], got {targets.dtype} {targets.shape}")
    weight, bias = head.weight, head.bias
    if not train_head:
        weight, bias = jax.tree.map(lax.stop_gradient, (weight, bias))
    targets = targets.astype(jnp.int32)
    if cols.mapped or not cols.dense:
        nll = _nll(cols, train_head, hidden, weight, bias, targets)
    else:
        logits = jnp.where(cols.exist(jnp.arange(cols.size)), logits_of(hidden, weight, bias), -jnp.inf)
        at_target = jnp.take_along_axis(logits, jnp.clip(targets, 0, cols.size - 1)[..., None], -1)[..., 0]
        nll = jax.nn.logsumexp(logits, -1) - at_target
    return jnp.where(cols.exist(targets), nll, jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(cols: Columns, train_head: bool, hidden, weight, bias, targets):
    return _nll_forward(cols, train_head, hidden, weight, bias, targets)[0]


def _nll_forward(cols: Columns, train_head: bool, hidden, weight, bias, targets):
    def body(hidden, weight, bias, targets):
        shape, dtype = targets.shape, wide(hidden)

        def step(chunk: Chunk, carry):
            mass, at_target = carry
            hit = (chunk.ids == targets[..., None]) & chunk.exists
            return mass.add(chunk.logits, chunk.exists)[0], at_target + jnp.where(hit, chunk.logits, 0.0).sum(-1)

        mass, at_target = walk(cols, hidden, weight, bias, step, (Mass.empty(shape, dtype), jnp.zeros(shape, dtype)))
        logsumexp = mass.merged(cols).logsumexp
        return logsumexp - cols.sum_shards(at_target), logsumexp

    nll, logsumexp = cols.over_devices(body, (hidden, weight, bias, targets), "rvvr", "rr")
    return nll, (hidden, weight, bias, targets, logsumexp)


def _nll_backward(cols: Columns, train_head: bool, saved, cotangent):
    def body(hidden, weight, bias, targets, logsumexp, cotangent):
        dtype = wide(hidden)

        def step(chunk: Chunk, carry):
            d_hidden, d_weight, d_bias = carry
            p = jnp.exp(chunk.logits - logsumexp[..., None]) - (chunk.ids == targets[..., None])
            d_logits = jnp.where(chunk.exists, p * cotangent[..., None], 0.0)
            d_hidden = d_hidden + product("blv,vd->bld", d_logits, chunk.part(weight), hidden)
            if train_head:
                d_weight = _add_part(d_weight, chunk, product("blv,bld->vd", d_logits, hidden, hidden))
                d_bias = None if bias is None else _add_part(d_bias, chunk, d_logits.sum((0, 1)))
            return d_hidden, d_weight, d_bias

        start = jnp.zeros(hidden.shape, dtype), None, None
        if train_head:
            start = start[0], jnp.zeros(weight.shape, dtype), None if bias is None else jnp.zeros(bias.shape, dtype)
        d_hidden, *d_head = walk(cols, hidden, weight, bias, step, start)
        return cols.sum_shards(d_hidden).astype(hidden.dtype), *(
            None if d is None else cols.sum_rows(d).astype(x.dtype) for d, x in zip(d_head, (weight, bias)))

    hidden, weight, bias, targets, logsumexp = saved
    # A target that does not exist has no gradient.
    cotangent = jnp.where(cols.exist(targets), cotangent, 0.0).astype(wide(hidden))
    return *cols.over_devices(body, (*saved, cotangent), "rvvrrr", "rvv"), None


_nll.defvjp(_nll_forward, _nll_backward)


def _add_part(array: jax.Array, chunk: Chunk, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, chunk.part(array) + part, chunk.start, 0)


def mixture(hidden: jax.Array, head: Head, temperature: jax.Array | float,
            embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The full-vocabulary variant: p = softmax(z / temperature) -> (sum p log p [B L], sum_v p_v e_v [B L D]).

    hidden [B L D], embedding [Vpad D]. Gradients flow to the temperature (through both results) and the embedding;
    the hidden states and the head are cut off. The entropy is as in `sweep`. ValueError if shapes do not fit.
    """
    cols = columns(hidden, head)
    if embedding.ndim != 2 or embedding.shape[0] != cols.size or jnp.ndim(temperature) != 0:
        raise ValueError(f"embedding must be [{cols.size} D] as the head's weight and the temperature a scalar, got "
                         f"{embedding.shape} and {jnp.shape(temperature)}")
    hidden, weight, bias = jax.tree.map(lax.stop_gradient, (hidden, head.weight, head.bias))
    return _mixture(cols, hidden, weight, bias, jnp.asarray(temperature, wide(hidden)), embedding)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(cols: Columns, hidden, weight, bias, temperature, embedding):
    return _mixture_forward(cols, hidden, weight, bias, temperature, embedding)[0]


def _mixture_forward(cols: Columns, hidden, weight, bias, temperature, embedding):
    def body(hidden, weight, bias, temperature, embedding):
        shape, dtype = hidden.shape[:2], wide(hidden)

        def step(chunk: Chunk, carry):
            old, mix = carry
            mass, e = old.add(chunk.logits / temperature, chunk.exists)
            return mass, (mix * jnp.exp(old.m - mass.m)[..., None]
                          + product("blv,vd->bld", e, chunk.part(embedding), hidden))

        start = Mass.empty(shape, dtype), jnp.zeros((*shape, embedding.shape[1]), dtype)
        local, mix = walk(cols, hidden, weight, bias, step, start)
        mass = local.merged(cols)
        mix = cols.sum_shards(mix * jnp.exp(local.m - mass.m)[..., None])
        return mass.neg_entropy, mix / mass.s[..., None], mass.logsumexp

    args = hidden, weight, bias, temperature, embedding
    neg_entropy, mix, logsumexp = cols.over_devices(body, args, "rvvav", "rrr")
    return (neg_entropy, mix), (*args, neg_entropy, logsumexp)


def _mixture_backward(cols: Columns, saved, cotangents):
    def body(hidden, weight, bias, temperature, embedding, neg_entropy, logsumexp, d_neg_entropy, d_mix):
        # With y = z / T: d neg_entropy / d y_v = p_v (log p_v - neg_entropy) and d mix / d y_v = p_v (e_v - mix).
        # Both sum to 0 over v, so centring y by its mean changes nothing and keeps the sums small.
        mean = neg_entropy + logsumexp

        def step(chunk: Chunk, carry):
            slope, d_embedding = carry
            y = chunk.logits / temperature
            p = jnp.where(chunk.exists, jnp.exp(y - logsumexp[..., None]), 0.0)
            above = jnp.where(chunk.exists, y - mean[..., None], 0.0)
            pull = product("bld,vd->blv", d_mix, chunk.part(embedding), hidden) + d_neg_entropy[..., None] * above
            d_embedding = _add_part(d_embedding, chunk, product("blv,bld->vd", p, d_mix, hidden))
            return slope + (p * above * pull).sum(-1), d_embedding

        start = jnp.zeros(neg_entropy.shape, wide(hidden)), jnp.zeros(embedding.shape, wide(hidden))
        slope, d_embedding = walk(cols, hidden, weight, bias, step, start)
        slope = cols.sum_rows(cols.sum_shards(slope.sum()))
        return -slope / temperature, cols.sum_rows(d_embedding).astype(embedding.dtype)

    d_temperature, d_embedding = cols.over_devices(body, (*saved, *cotangents), "rvvavrrrr", "av")
    return None, None, None, d_temperature, d_embedding


_mixture.defvjp(_mixture_forward, _mixture_backward)
