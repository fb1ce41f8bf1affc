"""Soft-masking: what stands at a masked position of the next denoising step, as pure functions.

Source: «Soft-Masked Diffusion Language Models» (arXiv 2510.17206), section 3. A position that is still masked gets

    x = (1 - lambda) e_mask + lambda * sum_i pi_i e_i,      lambda = w_s * sigmoid(w_a * (-H(p) - w_b))

with pi the prediction p renormalised over its k likeliest tokens (`topk`), or all of softmax(z / temperature) (`full`).
`slerp` goes from e_mask to the mixture along a great circle instead of a straight line, which would shorten the vector.

The learned scalars are stored raw (unconstrained float32, `params["soft_mask"]`); `effective` puts them into range.
"""
import dataclasses
import math
from typing import Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion.embedding_mixtures import gram, rows, slerp_weights, weighted_rows
from softmask_jax.diffusion.vocab import head as vocab_head

VARIANTS = ("topk", "full", "slerp", "none")
SCHEDULES = ("none", "linear", "stepwise")
RAW_NAMES = ("raw_scale", "raw_centre", "raw_steepness", "raw_temperature")

_OFFSET = 1e-6  # keeps centre, steepness and temperature off zero however far their raw values go
_SCALE_EPS = 1e-6
# exp(-1e6) is 0 in any float, while -inf would turn into NaN when multiplied by 0
_IMPOSSIBLE = -1e6


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """How predictions are fed back at masked positions; the default is not at all.

    Attributes:
      variant: of the mixture, see `blend`; `none` is plain masked diffusion.
      k: tokens that are fed back.
      schedule: factor on lambda while decoding, by the share of a row's masks that are left.
    """

    variant: str = "none"
    k: int = 1
    schedule: str = "none"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is '{self.variant}'; choose one of {', '.join(VARIANTS)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is '{self.schedule}'; choose one of {', '.join(SCHEDULES)}.")
        if self.k < 1:
            raise ValueError(f"soft-masking feeds back at least 1 token, k cannot be {self.k}.")

    @classmethod
    def from_config(cls, section) -> "SoftMask":
        """From the section `soft_mask` of a config."""
        return cls(section.variant, section.k)

    @property
    def on(self) -> bool:
        return self.variant != "none"

    @property
    def reads(self) -> int:
        """How many of the largest logits the feedback needs; the full vocabulary is read from the hidden states."""
        return self.k if self.variant in ("topk", "slerp") else 0

    def scale(self, masks: jax.Array, at_start: jax.Array) -> jax.Array:
        """The schedule's factor on lambda [B], of masks left and masks at the start [B]."""
        return schedule_scale(self.schedule, masks / jnp.maximum(at_start, 1))


class Scalars(NamedTuple):
    """Effective scalars: scale w_s in (0, 1), centre w_b < 0 (nats), steepness w_a > 0, temperature > 0."""

    scale: jax.Array
    centre: jax.Array
    steepness: jax.Array
    temperature: jax.Array


class Feedback(NamedTuple):
    """One pass's prediction, as far as soft-masking needs it.

    token_ids [B L k] int32 and top_logits [B L k] float32: the k likeliest tokens, likeliest first; neg_entropy [B L]
    float32: sum_v p_v log p_v over the full vocabulary, in nats; hidden [B L D]: only the `full` variant reads it.
    certain [B L] int32, for the `full` variant: a token that the prediction is certain of instead, -1 where it is not;
    the others say so by `one_hot_feedback`.
    """

    token_ids: jax.Array
    top_logits: jax.Array
    neg_entropy: jax.Array
    hidden: jax.Array | None = None
    certain: jax.Array | None = None


def init_scalars(
    scale: float = 0.0, centre: float = -0.75, steepness: float = 6.66, temperature: float = 1.0
) -> dict[str, jax.Array]:
    """Raw float32 scalars at the start of training, by the reference's formulas.

    `scale` may be 0 or 1 and is then kept 1e-6 away from it. `effective` of the result lies 1e-6 beyond the centre,
    steepness and temperature given here, as in the reference; `raw_from_effective` is the exact inverse.
    Raises ValueError for values outside their ranges.
    """
    _check(scale, centre, steepness, temperature)
    # the clamp is rounded to float32 before the logit, as in the reference: logit(1) is 13.802, not 13.816
    clamped = float(np.clip(np.float32(scale), np.float32(_SCALE_EPS), np.float32(1) - np.float32(_SCALE_EPS)))
    return _as_raw(
        math.log(clamped / (1 - clamped)),
        _inverse_softplus(-centre),
        _inverse_softplus(steepness),
        _inverse_softplus(temperature),
    )


def raw_from_effective(
    scale: float, centre: float, steepness: float, temperature: float = 1.0
) -> dict[str, jax.Array]:
    """Raw float32 scalars whose `effective` values are the ones given, for example those of a finished model.

    A scale of exactly 0 or 1 is stored as a raw value of -80 or 80. Raises ValueError for values outside their ranges.
    """
    _check(scale, centre, steepness, temperature)
    if min(-centre, steepness, temperature) <= _OFFSET:
        raise ValueError(
            f"soft_mask: centre {centre}, steepness {steepness} and temperature {temperature} must be further than "
            f"{_OFFSET} from 0; use init_scalars for smaller values"
        )
    logit = math.inf if scale == 1 else -math.inf if scale == 0 else math.log(scale) - math.log1p(-scale)
    return _as_raw(
        min(max(logit, -80.0), 80.0),
        _inverse_softplus(-centre - _OFFSET),
        _inverse_softplus(steepness - _OFFSET),
        _inverse_softplus(temperature - _OFFSET),
    )


def effective(raw: Mapping[str, jax.Array]) -> Scalars:
    """The scalars inside their ranges. Raises ValueError if `raw` does not hold exactly the four raw scalars."""
    if set(raw) != set(RAW_NAMES):
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


def schedule_scale(schedule: str, ratio: jax.Array | float) -> jax.Array:
    """Factor on lambda while decoding; ratio = masks left after this step / masks at the start, one per row.

    `none` 1, `linear` ratio, `stepwise` 1 above a ratio of 0.5 and 0 from there on. Raises ValueError for other names.
    """
    ratio = jnp.asarray(ratio, jnp.float32)
    if schedule == "none":
        return jnp.ones_like(ratio)
    if schedule == "linear":
        return ratio
    if schedule == "stepwise":
        return (ratio > 0.5).astype(jnp.float32)
    raise ValueError(f"unknown soft-masking schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")


def feedback_from_logits(logits: jax.Array, *, k: int, suppress: int | None = None) -> Feedback:
    """Feedback from dense logits [B L V], for small vocabularies and tests; differentiable (`blend` stops it).

    `suppress`: a token (the mask) that the prediction leaves out. Raises ValueError if k is not in 1..V.
    """
    vocab_size = logits.shape[-1]
    if not 1 <= k <= vocab_size - (suppress is not None):
        raise ValueError(f"soft_mask: k = {k} must lie between 1 and the number of tokens that can be predicted")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if suppress is not None:
        logits = jnp.where(jnp.arange(vocab_size) == suppress, jnp.finfo(logits.dtype).min / 2, logits)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    top_logits, token_ids = jax.lax.top_k(logits, k)
    neg_entropy = jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
    return Feedback(token_ids.astype(jnp.int32), top_logits, neg_entropy)


def one_hot_feedback(tokens: jax.Array, k: int) -> Feedback:
    """The prediction that is certain of `tokens` [B L]: what a re-masked position remembers of its token."""
    rest = [(0, 0)] * tokens.ndim + [(0, k - 1)]
    top_logits = jnp.pad(jnp.zeros((*tokens.shape, 1), jnp.float32), rest, constant_values=_IMPOSSIBLE)
    return Feedback(
        jnp.pad(tokens.astype(jnp.int32)[..., None], rest), top_logits, jnp.zeros(tokens.shape, jnp.float32)
    )


def topk_weights(
    tokens: jax.Array,
    feedback: Feedback,
    scalars: Mapping[str, jax.Array],
    *,
    mask_token_id: int,
    scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The `topk` mixture as sparse rows: token ids [B L k+1] and their weights [B L k+1] float32, which sum to 1.

    The token itself comes first, with weight 1 - lambda where it is the mask and 1 elsewhere.
    """
    weight, shares = _weight_and_shares(tokens, feedback, scalars, mask_token_id, scale)
    ids = jnp.concatenate([tokens[..., None].astype(jnp.int32), feedback.token_ids], axis=-1)
    return ids, jnp.concatenate([1 - weight[..., None], weight[..., None] * shares], axis=-1)


def blend(
    tokens: jax.Array,
    feedback: Feedback | None,
    scalars: Mapping[str, jax.Array],
    embedding: jax.Array,
    *,
    mask_token_id: int,
    scale: jax.Array | float = 1.0,
    variant: str = "topk",
    head: vocab_head.Head | None = None,
) -> jax.Array:
    """Input embeddings [B L D] (float32 at least) for tokens [B L], soft-masked by the previous pass's prediction.

    scalars: the raw scalars, `params["soft_mask"]`. embedding: [Vpad D]. scale: factor on lambda (coin, schedule): a
    scalar, [B], [B 1] or [B L]; where it is 0 the result is exactly the mask embedding and no gradient reaches the
    scalars. Positions other than the mask token get exactly their token's row. `feedback` is a constant here: gradients
    flow into the scalars and the embedding only. `full` needs `feedback.hidden` and `head`; `none` ignores feedback.
    Raises ValueError for an unknown variant or feedback that lacks what the variant needs.
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
        if feedback.hidden is None or head is None:
            raise ValueError("the soft-masking variant 'full' needs feedback.hidden and head")
        values = effective(scalars)
        neg_entropy, mix = vocab_head.mixture(feedback.hidden, head, values.temperature, embedding)
        if feedback.certain is not None:
            certain = feedback.certain >= 0
            neg_entropy = jnp.where(certain, 0.0, neg_entropy)
            mix = jnp.where(certain[..., None], rows(embedding, feedback.certain.clip(0)), mix)
        weight = _masked_weight(tokens, neg_entropy, values, mask_token_id, scale)[..., None]
        plain = rows(embedding, tokens)
        return jnp.where((tokens == mask_token_id)[..., None], (1 - weight) * plain + weight * mix, plain)

    if variant == "slerp":
        weight, shares = _weight_and_shares(tokens, feedback, scalars, mask_token_id, scale)
        ids = jnp.concatenate([tokens[..., None].astype(jnp.int32), feedback.token_ids], axis=-1)
        weights = slerp_weights(gram(ids, embedding), shares, weight)
    else:
        ids, weights = topk_weights(tokens, feedback, scalars, mask_token_id=mask_token_id, scale=scale)
    return weighted_rows(weights, ids, embedding)


def blend_weight(
    tokens: jax.Array,
    feedback: Feedback,
    scalars: Mapping[str, jax.Array],
    *,
    mask_token_id: int,
    scale: jax.Array | float = 1.0,
) -> jax.Array:
    """lambda [B L] float32 of the feedback's entropy where tokens [B L] are the mask, 0 elsewhere; arguments as `blend`."""
    return _masked_weight(tokens, feedback.neg_entropy, effective(scalars), mask_token_id, scale)


def _weight_and_shares(tokens, feedback, scalars, mask_token_id, scale):
    weight = blend_weight(tokens, feedback, scalars, mask_token_id=mask_token_id, scale=scale)
    return weight, jax.nn.softmax(feedback.top_logits.astype(jnp.float32), axis=-1)


def _masked_weight(tokens, neg_entropy, values, mask_token_id, scale):
    scale = jnp.asarray(scale, jnp.float32)
    scale = scale[:, None] if scale.ndim == 1 else scale
    return jnp.where(tokens == mask_token_id, scale * mix_weight(neg_entropy, values), 0.0)


def _check(scale, centre, steepness, temperature):
    if not 0 <= scale <= 1:
        raise ValueError(f"soft_mask.scale must lie between 0 and 1, got {scale}")
    if not -math.inf < centre < 0:
        raise ValueError(f"soft_mask.centre must be below 0 and finite (it is minus an entropy), got {centre}")
    if not 0 < steepness < math.inf:
        raise ValueError(f"soft_mask.steepness must be above 0 and finite, got {steepness}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"soft_mask.temperature must be above 0 and finite, got {temperature}")


def _inverse_softplus(x: float) -> float:
    # log(expm1(x)) overflows from x = 89 in float32
    return x + math.log(-math.expm1(-x))


def _as_raw(*values: float) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in zip(RAW_NAMES, values, strict=True)}
