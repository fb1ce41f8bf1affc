"""Soft-masking: the input embedding of masked positions in the next denoising step (arXiv 2510.17206, section 3).

    x = (1 - lambda) e_mask + lambda * sum_i pi_i e_i,      lambda = w_s * sigmoid(w_a * (-H(p) - w_b))

with pi the prediction p renormalised over its k likeliest tokens (`topk`), or all of softmax(z / temperature) (`full`).
`slerp` goes from e_mask to the mixture along a great circle: a straight line would shorten the vector. `hidden` feeds
no tokens back, but the previous pass's last hidden state h, as self-conditioning: x = e_mask + lambda * h P, with a
trained P. Scalars are stored raw (unconstrained float32, `params["soft_mask"]`), see `effective`. B batch, L length,
D width, k candidates."""
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion.embedding_mixtures import gram, rows, slerp_weights, weighted_rows
from softmask_jax.diffusion.soft_mask import SCHEDULES as SCHEDULES, VARIANTS, SoftMask as SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head

RAW_NAMES = ("raw_scale", "raw_centre", "raw_steepness", "raw_temperature")
PROJECTION = "projection"  # P [D D] beside them, of the variant `hidden`

# Keeps centre, steepness and temperature off zero however far their raw values go.
_OFFSET = 1e-6
_SCALE_EPS = np.float32(1e-6)
# exp(-1e6) is 0 in any float, while -inf would turn into NaN when multiplied by 0.
_IMPOSSIBLE = -1e6


class Scalars(NamedTuple):
    """Effective scalars."""

    scale: jax.Array  # w_s in (0, 1)
    centre: jax.Array  # w_b < 0, nats
    steepness: jax.Array  # w_a > 0
    temperature: jax.Array  # > 0, of the `full` variant


class Feedback(NamedTuple):
    """One pass's prediction, as far as soft-masking needs it."""

    token_ids: jax.Array  # [B L k] int32, the k likeliest tokens, likeliest first
    top_logits: jax.Array  # [B L k] float32, their logits
    neg_entropy: jax.Array  # [B L] float32, sum_v p_v log p_v over the full vocabulary, nats
    hidden: jax.Array | None = None  # [B L D], only for the variants `full` and `hidden`
    certain: jax.Array | None = None  # [B L] int32, for `full` what `one_hot_feedback` is for the others; -1: no token

    def where(self, chosen: jax.Array, other: "Feedback") -> "Feedback":
        """This feedback at the positions `chosen` [B L] bool, the other one elsewhere."""
        return jax.tree.map(lambda a, b: jnp.where(chosen if a.ndim == 2 else chosen[..., None], a, b), self, other)


def init_scalars(scale: float = 0.0, centre: float = -0.75, steepness: float = 6.66,
                 temperature: float = 1.0) -> dict[str, jax.Array]:
    """Raw float32 scalars at the start of training, by the reference's formulas. ValueError out of range.

    A scale of 0 or 1 is kept 1e-6 away from it; as in the reference, `effective` returns the other values 1e-6 further
    from 0 (`raw_from_effective` is exact)."""
    _check_ranges(scale, centre, steepness, temperature)
    # The clamp is rounded to float32 before the logit, as in the reference: logit(1) is 13.802, not 13.816.
    clamped = float(np.clip(np.float32(scale), _SCALE_EPS, np.float32(1) - _SCALE_EPS))
    return _raw(math.log(clamped / (1 - clamped)), -centre, steepness, temperature)


def raw_from_effective(scale: float, centre: float, steepness: float, temperature: float = 1.0) -> dict[str, jax.Array]:
    """Raw float32 scalars with these `effective` values; -80 or 80 for a scale of 0 or 1. ValueError out of range."""
    _check_ranges(scale, centre, steepness, temperature)
    if min(-centre, steepness, temperature) <= _OFFSET:
        raise ValueError(f"soft_mask: centre {centre}, steepness {steepness} and temperature {temperature} must be "
                         f"further than {_OFFSET} from 0; use init_scalars for smaller values")
    logit = math.inf if scale == 1 else -math.inf if scale == 0 else math.log(scale) - math.log1p(-scale)
    return _raw(min(max(logit, -80.0), 80.0), -centre - _OFFSET, steepness - _OFFSET, temperature - _OFFSET)


def _check_ranges(scale: float, centre: float, steepness: float, temperature: float) -> None:
    for name, value, fits, bounds in (
        ("scale", scale, 0 <= scale <= 1, "lie between 0 and 1"),
        ("centre", centre, -math.inf < centre < 0, "be below 0 and finite (it is minus an entropy)"),
        ("steepness", steepness, 0 < steepness < math.inf, "be above 0 and finite"),
        ("temperature", temperature, 0 < temperature < math.inf, "be above 0 and finite"),
    ):
        if not fits:
            raise ValueError(f"soft_mask.{name} must {bounds}, got {value}")


def _raw(logit: float, *positive: float) -> dict[str, jax.Array]:
    """Raw scalars from the scale's logit and, by the inverse of softplus, from -centre, steepness and temperature."""
    # log(expm1(x)) would overflow from x = 89 in float32.
    values = logit, *(x + math.log(-math.expm1(-x)) for x in positive)
    return {name: jnp.asarray(value, jnp.float32) for name, value in zip(RAW_NAMES, values, strict=True)}


def effective(raw: Mapping[str, jax.Array]) -> Scalars:
    """The scalars inside their ranges; ValueError unless `raw` holds the four raw scalars and at most a projection."""
    if set(raw) - {PROJECTION} != set(RAW_NAMES):
        raise ValueError(f"soft_mask parameters must be {sorted(RAW_NAMES)}, got {sorted(raw)}")
    return Scalars(
        scale=jax.nn.sigmoid(raw["raw_scale"]),
        centre=-jax.nn.softplus(raw["raw_centre"]) - _OFFSET,
        steepness=jax.nn.softplus(raw["raw_steepness"]) + _OFFSET,
        temperature=jax.nn.softplus(raw["raw_temperature"]) + _OFFSET,
    )


def mix_weight(neg_entropy: jax.Array, scalars: Scalars) -> jax.Array:
    """lambda in (0, scale), of neg_entropy's shape: near `scale` where the prediction is sure, else near 0."""
    return scalars.scale * jax.nn.sigmoid(scalars.steepness * (neg_entropy - scalars.centre))


def schedule_factor(schedule: str, masks: jax.Array, at_start: jax.Array) -> jax.Array:
    """The factor on lambda [B] of a `SoftMask.schedule`, from the masks left [B] and those at the start: `none`: 1;
    `linear`: the share left; `stepwise`: 1 above a share of one half, else 0."""
    share = jnp.asarray(masks / jnp.maximum(at_start, 1), jnp.float32)
    if schedule == "linear":
        return share
    return jnp.ones_like(share) if schedule == "none" else (share > 0.5).astype(jnp.float32)


def masked_weight(tokens: jax.Array, neg_entropy: jax.Array, raw: Mapping[str, jax.Array], *, mask_token_id: int,
                  scale: jax.Array | float = 1.0) -> jax.Array:
    """lambda times `scale` (see `blend`) where tokens [B L] are the mask, 0 elsewhere: [B L] float32."""
    scale = jnp.asarray(scale, jnp.float32)
    scale = scale[:, None] if scale.ndim == 1 else scale
    return jnp.where(tokens == mask_token_id, scale * mix_weight(neg_entropy, effective(raw)), 0.0)


def one_hot_feedback(tokens: jax.Array, k: int) -> Feedback:
    """The prediction that is certain of `tokens` [B L]: what a re-masked position remembers of its token."""
    rest = [(0, 0)] * tokens.ndim + [(0, k - 1)]
    token_ids = jnp.pad(tokens.astype(jnp.int32)[..., None], rest)
    top_logits = jnp.pad(jnp.zeros((*tokens.shape, 1), jnp.float32), rest, constant_values=_IMPOSSIBLE)
    return Feedback(token_ids, top_logits, jnp.zeros(tokens.shape, jnp.float32))


def blend(tokens: jax.Array, feedback: Feedback | None, raw: Mapping[str, jax.Array], embedding: jax.Array, *,
          mask_token_id: int, scale: jax.Array | float = 1.0, variant: str = "topk",
          head: vocab_head.Head | None = None) -> jax.Array:
    """Input embeddings [B L D] (at least float32) of tokens [B L], soft-masked by the previous pass's prediction.

    Positions without a mask get exactly their token's row. Only `raw` and the embedding get gradients.

    Args:
      raw: the raw scalars, `params["soft_mask"]`, with a projection for `hidden`.
      embedding: [Vpad D].
      scale: factor on lambda (coin, schedule), a scalar, [B], [B 1] or [B L]; where it is 0 the result is exactly the
        mask embedding and no gradient reaches the scalars.
      variant: `full` needs `feedback.hidden` and `head`, `hidden` the former and a projection; `none` ignores the
        feedback. ValueError if unknown or lacking.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown soft-masking variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    if variant == "none":
        return rows(embedding, tokens)
    if feedback is None or feedback.neg_entropy.shape != tokens.shape:
        shape = None if feedback is None else feedback.neg_entropy.shape
        raise ValueError(f"soft-masking tokens of shape {tokens.shape} needs feedback of that shape, got {shape}")
    feedback = jax.lax.stop_gradient(feedback)
    if variant == "full":
        return _blend_full(tokens, feedback, raw, embedding, mask_token_id, scale, head)
    weight = masked_weight(tokens, feedback.neg_entropy, raw, mask_token_id=mask_token_id, scale=scale)
    if variant == "hidden":
        return rows(embedding, tokens) + weight[..., None] * _projected(feedback.hidden, raw.get(PROJECTION))
    shares = jax.nn.softmax(feedback.top_logits.astype(jnp.float32), axis=-1)
    ids = jnp.concatenate([tokens[..., None].astype(jnp.int32), feedback.token_ids], axis=-1)
    if variant == "slerp":
        weights = slerp_weights(gram(ids, embedding), shares, weight)
    else:
        weights = jnp.concatenate([1 - weight[..., None], weight[..., None] * shares], axis=-1)
    return weighted_rows(weights, ids, embedding)


def _projected(hidden: jax.Array | None, projection: jax.Array | None) -> jax.Array:
    """hidden [B L D] times the projection: float32."""
    if hidden is None or projection is None:
        raise ValueError("the soft-masking variant 'hidden' needs feedback.hidden and a projection beside the scalars")
    return jnp.matmul(hidden, projection.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _blend_full(tokens, feedback, raw, embedding, mask_token_id, scale, head):
    if feedback.hidden is None or head is None:
        raise ValueError("the soft-masking variant 'full' needs feedback.hidden and head")
    masked, temperature = tokens == mask_token_id, effective(raw).temperature
    neg_entropy, mix = vocab_head.mixture(feedback.hidden, head, temperature, embedding, where=masked)
    if feedback.certain is not None:
        certain = feedback.certain >= 0
        neg_entropy = jnp.where(certain, 0.0, neg_entropy)
        mix = jnp.where(certain[..., None], rows(embedding, feedback.certain.clip(0)), mix)
    weight = masked_weight(tokens, neg_entropy, raw, mask_token_id=mask_token_id, scale=scale)[..., None]
    plain = rows(embedding, tokens)
    return jnp.where(masked[..., None], (1 - weight) * plain + weight * mix, plain)
