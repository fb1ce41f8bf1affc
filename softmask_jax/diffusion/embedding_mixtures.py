"""Mixtures of a few embedding rows per position, along a line or the unit sphere, never gathered as [B L k D].

On the sphere the rows' inner products determine all angles: spherical mean and slerp are weighted sums of rows, too."""
import functools
import math

import jax
import jax.numpy as jnp

_KARCHER_STEPS = 8
_NO_DIRECTION = 1e-20  # a row of at most this squared length has no direction
# The path to the opposite point is not unique, its weights grow without bound: beyond 162 degrees they stop growing.
_LEAST_COSINE = -0.95
_SERIES_TERMS = 11  # enough for float32 up to an angle of pi


def rows(embedding: jax.Array, ids: jax.Array) -> jax.Array:
    """embedding[ids]: [V D] and [...] to [..., D], float32 at least."""
    return embedding.at[ids].get(mode="clip").astype(jnp.promote_types(embedding.dtype, jnp.float32))


@jax.custom_vjp
def weighted_rows(weights: jax.Array, ids: jax.Array, embedding: jax.Array) -> jax.Array:
    """sum_j weights[..., j] * embedding[ids[..., j]]: [..., n] and [V D] to [..., D].

    Row by row, forward and backward: neither [..., n, D] nor n copies of [V D] are built. Where the first weight is 1
    the result is the first row bit for bit (0 * x + y can lose y's sign of zero)."""
    first = rows(embedding, ids[..., 0])
    total = weights[..., :1] * first
    for j in range(1, ids.shape[-1]):
        total += weights[..., j, None] * rows(embedding, ids[..., j])
    return jnp.where(weights[..., :1] == 1, first, total)


def _weighted_rows_backward(saved, g):
    weights, ids, embedding = saved
    d_weights = []
    d_embedding = jnp.zeros(embedding.shape, g.dtype)
    for j in range(ids.shape[-1]):
        d_weights.append(jnp.sum(g * rows(embedding, ids[..., j]), axis=-1))
        d_embedding = d_embedding.at[ids[..., j]].add(weights[..., j, None] * g)
    return jnp.stack(d_weights, axis=-1).astype(weights.dtype), None, d_embedding.astype(embedding.dtype)


weighted_rows.defvjp(lambda *args: (weighted_rows(*args), args), _weighted_rows_backward)


@jax.custom_vjp
def gram(ids: jax.Array, embedding: jax.Array) -> jax.Array:
    """Inner products of the rows embedding[ids]: [..., n] and [V D] to [..., n, n], one pair at a time."""
    n = ids.shape[-1]
    upper = {}
    for i in range(n):
        left = rows(embedding, ids[..., i])
        for j in range(i, n):
            upper[i, j] = jnp.sum(left * rows(embedding, ids[..., j]), axis=-1)
    return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(n)], axis=-1) for i in range(n)], axis=-2)


def _gram_backward(saved, g):
    ids, embedding = saved
    both = g + jnp.swapaxes(g, -1, -2)
    d_embedding = jnp.zeros(embedding.shape, g.dtype)
    for i in range(ids.shape[-1]):
        d_embedding = d_embedding.at[ids[..., i]].add(weighted_rows(both[..., i, :], ids, embedding))
    return None, d_embedding.astype(embedding.dtype)


gram.defvjp(lambda *args: (gram(*args), args), _gram_backward)


def slerp_weights(products: jax.Array, shares: jax.Array, amount: jax.Array) -> jax.Array:
    """Weights [..., n] of rows: from row 0 go `amount` of the way along the great circle to the mean of the others.

    products: [..., n, n] inner products of the rows. shares: [..., n-1] weights in the mean, the weighted Karcher mean
    of the normalised rows 1.., without those of length 0. amount: [...] in [0, 1]; 0 gives exactly row 0. The result
    has row 0's length, and is row 0 where no point is defined (no mean, half-way to the opposite). Finite gradients."""
    squared = jnp.diagonal(products, axis1=-2, axis2=-1)
    directed = squared > _NO_DIRECTION
    inverse = jnp.where(directed, jax.lax.rsqrt(jnp.where(directed, squared, 1.0)), 0.0)
    cosines = products * inverse[..., :, None] * inverse[..., None, :]

    shares = jnp.where(directed[..., 1:], shares, 0.0)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    shares = shares / jnp.where(total > 0, total, 1.0)
    mean = _karcher_mean(cosines[..., 1:, 1:], shares)

    cosine = jnp.sum(cosines[..., 0, 1:] * mean, axis=-1)
    angle2 = _squared_angle(cosine)
    # sin(x angle) / sin(angle), as smooth functions of the squared angle.
    stay = (1 - amount) * _sinc((1 - amount) ** 2 * angle2) / _sinc(angle2)
    go = amount * _sinc(amount**2 * angle2) / _sinc(angle2)
    length2 = stay**2 + go**2 + 2 * stay * go * cosine
    defined = (amount > 0) & (total[..., 0] > 0) & directed[..., 0] & (length2 > 1e-3 * (stay**2 + go**2))
    shrink = jax.lax.rsqrt(jnp.where(defined, length2, 1.0))[..., None]

    rescaled = mean * inverse[..., 1:] * (squared * inverse)[..., :1]
    weights = jnp.concatenate([stay[..., None], go[..., None] * rescaled], axis=-1) * shrink
    row0 = jnp.zeros_like(weights).at[..., 0].set(1.0)
    return jnp.where(defined[..., None], weights, row0)


def _karcher_mean(cosines, shares):
    """Coefficients [..., k] of the weighted Karcher mean of unit vectors with these cosines [..., k, k]."""

    def apply(coefficients):
        # A product and a sum, not a dot: on a TPU small dots would be rounded to bfloat16.
        return jnp.sum(cosines * coefficients[..., None, :], axis=-1)

    def normalised(coefficients):
        length2 = jnp.sum(coefficients * apply(coefficients), axis=-1, keepdims=True)
        defined = length2 > 1e-4
        top1 = jax.nn.one_hot(jnp.argmax(shares, axis=-1), shares.shape[-1], dtype=shares.dtype)
        return jnp.where(defined, coefficients * jax.lax.rsqrt(jnp.where(defined, length2, 1.0)), top1)

    def step(mean, _):
        cosine = apply(mean)
        # An opposite point pulls nowhere: without the fade, equal and opposite coefficients would pile up.
        fade = jnp.clip((1 + cosine) / (1 + _LEAST_COSINE), 0.0, 1.0)
        pull = fade * shares / _sinc(_squared_angle(cosine))
        tangent = pull - jnp.sum(pull * cosine, axis=-1, keepdims=True) * mean
        # The series needs a squared length in [0, pi^2]; rounding can leave it below 0.
        length2 = jnp.clip(jnp.sum(tangent * apply(tangent), axis=-1, keepdims=True), 0.0, math.pi**2)
        return normalised(_cos(length2) * mean + _sinc(length2) * tangent), None

    return jax.lax.scan(step, normalised(shares), None, length=_KARCHER_STEPS)[0]


def _squared_angle(cosine):
    """arccos(cosine)^2, whose slope stays finite at cosine 1, where arccos's own does not."""
    cosine = jnp.clip(cosine, _LEAST_COSINE, 1.0)
    y = 1 - cosine
    near, series = y < 0.01, y * (2 + y * (1 / 3 + y * (4 / 45 + y / 35)))
    return jnp.where(near, series, jnp.arccos(jnp.where(near, 0.0, cosine)) ** 2)


def _series(squared, *, odd):
    """sin(x) / x (odd = 1) or cos(x) (odd = 0) from x squared, for x in [0, pi]."""
    total = 0.0
    for n in reversed(range(_SERIES_TERMS + 1)):
        total = total * -squared + 1 / math.factorial(2 * n + odd)
    return total


_sinc, _cos = functools.partial(_series, odd=1), functools.partial(_series, odd=0)
