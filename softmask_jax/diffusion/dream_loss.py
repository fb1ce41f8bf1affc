"""Dream's loss with soft-masking: weighted cross-entropy of a response's masked tokens (arXiv 2510.17206, 2508.15487).

The prompt is never corrupted. The denoiser's trunk returns hidden states that are shifted already
(`models.dream.shift`), and its head does not suppress the mask, which may be among the k tokens that are fed back. Two passes are those of
`objective`, kept within the segments of each row.

Noise comes from the root key, the epoch and the example's number, not from the step: in one epoch an example is corrupted
the same way in every batch, bucket and mesh. Letters: B batch, L length, D width.
"""
import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import nelbo, noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.vocab import head

WEIGHTINGS = ("time", "context_adaptive")
T_PER = ("row", "batch")


@dataclasses.dataclass(frozen=True)
class DreamLoss:
    """The static part of the loss; the defaults are the recipe.

    variant, k: of soft-masking. t_min, t_max: t is uniform between them; a token is masked with probability
    (1 - noise_eps) t + noise_eps. t_per: `row`, or one t for a whole `batch`, that of its first row. weighting: `time`
    is 1/t; `context_adaptive` weighs a masked token by the unmasked ones around it (`context_weights` with cart_p), and
    not by t. supervise_pads: whether the recipe's pads are corrupted and scored. fresh_noise: whether every epoch draws
    t, masks and coins anew, or repeats those of the first. A run begun before this choice repeated them; continued, it
    draws anew in every later epoch, and ends its first epoch as it began. The recipe's pads decide an example's bucket
    and stay the same.
    """

    variant: str = "topk"
    k: int = 1
    noise_eps: float = 1e-3
    t_min: float = 0.2
    t_max: float = 0.8
    t_per: str = "row"
    weighting: str = "time"
    cart_p: float = 0.1
    supervise_pads: bool = True
    fresh_noise: bool = True

    def __post_init__(self):
        if not (0 < self.t_min <= self.t_max <= 1 and 0 <= self.noise_eps < 1 and 0 < self.cart_p <= 1):
            raise ValueError(
                f"objective: wanted 0 < t_min <= t_max <= 1, 0 <= noise_eps < 1 and 0 < cart_p <= 1, got {self.t_min}, "
                f"{self.t_max}, {self.noise_eps} and {self.cart_p}"
            )
        for name, known in (("t_per", T_PER), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"objective.{name}={getattr(self, name)!r} is unknown; choose {' or '.join(known)}")


class Noisy(NamedTuple):
    """A corrupted batch: x_0, x_t, where x_t is masked, and each row's segments, all [B L]; t [B].

    weights [B L] float32: the loss of a row is the sum of weights * cross-entropy; 0 wherever there is no mask.
    """

    tokens: jax.Array
    noisy: jax.Array
    masked: jax.Array
    segment_ids: jax.Array
    t: jax.Array
    weights: jax.Array


def validation_t(spec: DreamLoss, index: jax.Array, count: int) -> jax.Array:
    """t [B] float32 of validation examples `index` [B] of `count`: evenly spaced from t_min to t_max."""
    return jnp.linspace(spec.t_min, spec.t_max, count, dtype=jnp.float32)[index]


def example_keys(root_key: jax.Array, stream: Stream, index: jax.Array, epoch=0) -> jax.Array:
    """A key [B] for each example `index` [B] in its `epoch`, counted from 0: [B], or one for all."""

    def one(number, epoch):
        return jax.random.fold_in(noise.stream_key(root_key, stream, epoch), number)

    return jax.vmap(one)(index, jnp.broadcast_to(epoch, index.shape))


def coins(root_key: jax.Array, index: jax.Array, p_sm: float, epoch=0) -> jax.Array:
    """[B] bool: whether each example gets two passes."""
    return noise.coin(example_keys(root_key, Stream.COIN, index, epoch), p_sm)


def corrupt(
    spec: DreamLoss, batch: Mapping[str, jax.Array], root_key: jax.Array, *, mask_token_id: int, t=None, epoch=0
) -> Noisy:
    """Draw t and x_t, at least one mask to a row, and weigh the masked tokens.

    Args:
      batch: as `data.buckets` makes it: tokens, segment_ids [B L]; prompt_lengths, lengths, real_lengths, index [B].
      t: [B]; None draws it.
      epoch: see `example_keys`.
    """
    tokens, index = batch["tokens"], batch["index"]
    if t is None:
        uniforms = jax.vmap(jax.random.uniform)(example_keys(root_key, Stream.T, index, epoch))
        t = spec.t_min + (spec.t_max - spec.t_min) * uniforms
    if spec.t_per == "batch":
        t = jnp.broadcast_to(t[:1], t.shape)
    place = jnp.arange(tokens.shape[1])
    last = batch["lengths"] if spec.supervise_pads else batch["real_lengths"]
    maskable = (place >= batch["prompt_lengths"][:, None]) & (place < last[:, None])
    # A key for each position: the draws do not depend on the length of the bucket.
    at_place = jax.vmap(lambda key: jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(place))
    u = jnp.where(maskable, at_place(example_keys(root_key, Stream.MASK, index, epoch)), jnp.inf)
    # Where no token falls below the probability the lowest draw is masked: any of them alike.
    first = place == jnp.argmin(u, axis=1)[:, None]
    masked = maskable & ((u < ((1 - spec.noise_eps) * t + spec.noise_eps)[:, None]) | first)
    noisy = jnp.where(masked, jnp.asarray(mask_token_id, tokens.dtype), tokens)
    if spec.weighting == "time":
        weights = jnp.broadcast_to(1 / t[:, None], tokens.shape)
    else:
        weights = context_weights((place < batch["lengths"][:, None]) & ~masked, spec.cart_p)
    weights = jnp.where(masked, weights, 0.0) / jnp.maximum(masked.sum(-1, keepdims=True), 1)
    return Noisy(tokens, noisy, masked, batch["segment_ids"], t, weights)


def context_weights(known: jax.Array, p: float) -> jax.Array:
    """Dream's context-adaptive weights (CART, arXiv 2508.15487, section 3; `context_adaptive_reweight` of its code).

    known: [B L] bool, tokens that stand there unmasked. Each adds half a geometric distribution of its distance:
    w_i = sum over known j != i of p (1 - p)^(|i - j| - 1) / 2. Near 1 amid known tokens, near 0 far from any.

    Returns:
      [B L] float32.
    """
    place = jnp.arange(known.shape[1])
    distance = jnp.abs(place[:, None] - place)
    share = jnp.where(distance > 0, 0.5 * p * (1.0 - p) ** jnp.maximum(distance - 1, 0), 0.0)
    return jnp.einsum("bj,ji->bi", known.astype(jnp.float32), share, precision="highest")


def within(denoiser, segment_ids: jax.Array):
    """The denoiser, its attention kept within segments [B L]."""
    return dataclasses.replace(denoiser, trunk=functools.partial(denoiser.trunk, segment_ids=segment_ids))


def feedback(denoiser, spec: DreamLoss, params, noisy: Noisy, coin=True, *, dropout_keys=None):
    """What pass 1 tells pass 2, cut from the gradient; without running it where `coin` (a scalar) is False.

    dropout_keys: [B], of an adapter with dropout.
    """
    if spec.variant == "none":
        return None
    denoiser = within(denoiser, noisy.segment_ids)
    return jax.lax.cond(
        coin,
        lambda: nelbo.pass_1(denoiser, spec, params, noisy.noisy, dropout_keys=dropout_keys),
        lambda: nelbo.empty_feedback(denoiser, spec, params["backbone"], noisy.noisy),
    )


def token_nll(
    denoiser, spec: DreamLoss, params, noisy: Noisy, given, scale=1.0, *, dropout_keys=None
) -> jax.Array:
    """Cross-entropy of the masked tokens, 0 elsewhere: [B L] float32, nats, unweighted.

    given: of `feedback`, or None for a single pass. scale: 0 where a row has a single pass all the same; a scalar or
    [B].
    """
    denoiser = within(denoiser, noisy.segment_ids)
    x = nelbo.soft_embed(denoiser, spec, params, noisy.noisy, given, scale)
    hidden, _ = denoiser.trunk(params["backbone"], x, dropout_keys=dropout_keys)
    # A frozen head needs no gradient [Vpad D].
    train_head = "head" not in denoiser.frozen
    nll = head.cross_entropy(hidden, denoiser.head(params["backbone"]), noisy.tokens, train_head=train_head)
    return jnp.where(noisy.masked, nll, 0.0)


def row_losses(denoiser, spec: DreamLoss, params, noisy: Noisy, given, scale=1.0) -> jax.Array:
    """The loss of each row, [B] float32; as `token_nll`."""
    return (token_nll(denoiser, spec, params, noisy, given, scale) * noisy.weights).sum(-1)


def validation_losses(
    denoiser, spec: DreamLoss, params, batch: Mapping[str, jax.Array], root_key, count: int, p_sm: float
) -> jax.Array:
    """The loss of each validation example, [B] float32: fixed t, masks and coins, whatever the batch.

    batch: see `corrupt`; count: all validation examples, over which t is spread.
    """
    t = validation_t(spec, batch["index"], count)
    noisy = corrupt(spec, batch, root_key, mask_token_id=denoiser.mask_token_id, t=t)
    flips = coins(root_key, batch["index"], p_sm)
    given = feedback(denoiser, spec, params, noisy, flips.any())
    return row_losses(denoiser, spec, params, noisy, given, flips.astype(jnp.float32))
