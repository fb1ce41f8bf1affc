"""Dream's loss with soft-masking: weighted cross-entropy of a response's masked tokens (arXiv 2510.17206, 2508.15487).

The trunk's hidden states are already shifted (`models.nn.dream.shift`); the head does not suppress the mask, which may
be fed back among the top k. B batch, L length."""
import dataclasses

import jax
import jax.numpy as jnp

from softmask_jax.diffusion.objective import Batch, Noisy
from softmask_jax.diffusion.response_loss import ResponseLoss
from softmask_jax.diffusion.soft_masking import SoftMask


@dataclasses.dataclass(frozen=True)
class DreamLoss(ResponseLoss):
    """Dream's loss; the defaults are the recipe."""

    soft_mask: SoftMask = SoftMask("topk", 1)  # of pass 2
    noise_eps: float = 1e-3  # a token is masked with probability (1 - noise_eps) t + noise_eps
    t_min: float = 0.2  # t is uniform between t_min and t_max
    t_max: float = 0.8
    t_per: str = "row"  # or one t for a whole `batch`, that of its first row
    weighting: str = "time"  # 1/t; `context_adaptive` instead: see `context_weights`
    cart_p: float = 0.1  # p of `context_weights`
    supervise_pads: bool = True  # corrupt and score the recipe's pads
    fresh_noise: bool = True  # draw t, masks and coins anew in every epoch, or repeat those of the first

    def __post_init__(self):
        if not (0 < self.t_min <= self.t_max <= 1 and 0 <= self.noise_eps < 1 and 0 < self.cart_p <= 1):
            raise ValueError("objective: wanted 0 < t_min <= t_max <= 1, 0 <= noise_eps < 1 and 0 < cart_p <= 1, got "
                             f"{self.t_min}, {self.t_max}, {self.noise_eps} and {self.cart_p}")
        for name, known in (("t_per", ("row", "batch")), ("weighting", ("time", "context_adaptive"))):
            if getattr(self, name) not in known:
                raise ValueError(f"objective.{name}={getattr(self, name)!r} is unknown; choose {' or '.join(known)}")

    def by_row(self) -> "DreamLoss":
        return dataclasses.replace(self, t_per="row")

    def noisy(self, batch: Batch, t: jax.Array, uniforms: jax.Array, *, mask_token_id: int) -> Noisy:
        """See `ResponseLoss.noisy`; at least one mask a row."""
        tokens, position, maskable = batch["tokens"], jnp.arange(batch["tokens"].shape[1]), self.maskable(batch)
        if self.t_per == "batch":
            t = jnp.broadcast_to(t[:1], t.shape)
        u = jnp.where(maskable, uniforms, jnp.inf)
        # Where no token falls below the probability, the one with the lowest draw is masked.
        lowest = position == jnp.argmin(u, axis=1)[:, None]
        masked = maskable & ((u < self.probability(t)[:, None]) | lowest)
        xt = jnp.where(masked, jnp.asarray(mask_token_id, tokens.dtype), tokens)
        if self.weighting == "time":
            weights = jnp.broadcast_to(1 / t[:, None], tokens.shape)
        else:
            weights = context_weights((position < batch["lengths"][:, None]) & ~masked, self.cart_p)
        weights = jnp.where(masked, weights, 0.0) / jnp.maximum(masked.sum(-1, keepdims=True), 1)
        return Noisy(tokens, xt, masked, t, weights, batch["segment_ids"])


def context_weights(known: jax.Array, p: float) -> jax.Array:
    """Dream's context-adaptive weights (CART, arXiv 2508.15487, section 3; `context_adaptive_reweight` of its code).

    known [B L] bool -> w_i = sum over known j != i of p (1 - p)^(|i - j| - 1) / 2, [B L] float32: near 1 amid known
    tokens, near 0 far from any."""
    position = jnp.arange(known.shape[1])
    distance = jnp.abs(position[:, None] - position)
    share = jnp.where(distance > 0, 0.5 * p * (1.0 - p) ** jnp.maximum(distance - 1, 0), 0.0)
    return jnp.einsum("bj,ji->bi", known.astype(jnp.float32), share, precision="highest")
