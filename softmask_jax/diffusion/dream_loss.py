"""Dream's loss with soft-masking: weighted cross-entropy of a response's masked tokens (arXiv 2510.17206, 2508.15487).

The prompt is never corrupted. The trunk's hidden states are already shifted (`models.nn.dream.shift`); the head does
not suppress the mask, which may be fed back among the top k. Noise depends on the root key, the epoch and the example's
number, not on the step: within an epoch it is the same in every batch, bucket and mesh. B batch, L length."""
import dataclasses

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Batch, Noisy, Objective
from softmask_jax.diffusion.soft_masking import SoftMask


@dataclasses.dataclass(frozen=True)
class DreamLoss(Objective):
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

    def epoch(self, batch: Batch):
        return batch["epoch"] if self.fresh_noise else 0

    def corrupt(self, batch: Batch, root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """See `draw`; the noise depends on the batch's epoch, not on the step."""
        return self.draw(batch, root_key, mask_token_id=mask_token_id, epoch=self.epoch(batch))

    def coins(self, batch: Batch, root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool: every example has its own coin, however rows are grouped."""
        return example_coins(root_key, batch["index"], p_sm, self.epoch(batch))

    def draw(self, batch: Batch, root_key: jax.Array, *, mask_token_id: int, t=None, epoch=0) -> Noisy:
        """Draw t [B] unless given, and x_t, at least one mask a row; weigh the masks. epoch: see `example_keys`.

        batch: of `data.chat.buckets`: tokens, segment_ids [B L]; prompt_lengths, lengths, real_lengths, index [B]."""
        tokens, index = batch["tokens"], batch["index"]
        t_keys, mask_keys = (example_keys(root_key, stream, index, epoch) for stream in (Stream.T, Stream.MASK))
        if t is None:
            t = self.t_min + (self.t_max - self.t_min) * jax.vmap(jax.random.uniform)(t_keys)
        if self.t_per == "batch":
            t = jnp.broadcast_to(t[:1], t.shape)
        position = jnp.arange(tokens.shape[1])
        last = batch["lengths"] if self.supervise_pads else batch["real_lengths"]
        maskable = (position >= batch["prompt_lengths"][:, None]) & (position < last[:, None])
        # A key for each position: the draws do not depend on the length of the bucket.
        u = noise.keyed_noise(jax.random.uniform, mask_keys, jnp.broadcast_to(position, tokens.shape))
        u = jnp.where(maskable, u, jnp.inf)
        # Where no token falls below the probability, the one with the lowest draw is masked.
        lowest = position == jnp.argmin(u, axis=1)[:, None]
        masked = maskable & ((u < ((1 - self.noise_eps) * t + self.noise_eps)[:, None]) | lowest)
        xt = jnp.where(masked, jnp.asarray(mask_token_id, tokens.dtype), tokens)
        if self.weighting == "time":
            weights = jnp.broadcast_to(1 / t[:, None], tokens.shape)
        else:
            weights = context_weights((position < batch["lengths"][:, None]) & ~masked, self.cart_p)
        weights = jnp.where(masked, weights, 0.0) / jnp.maximum(masked.sum(-1, keepdims=True), 1)
        return Noisy(tokens, xt, masked, t, weights, batch["segment_ids"])

    def validation_t(self, index: jax.Array, count: int) -> jax.Array:
        """t [B] float32 of validation examples `index` [B] of `count`: evenly spaced from t_min to t_max."""
        return jnp.linspace(self.t_min, self.t_max, count, dtype=jnp.float32)[index]

    def validation_batch(self, batch: Batch, root_key: jax.Array, count: int, *, mask_token_id: int) -> Noisy:
        """Validation examples with the same t and masks in any batch; t is spread over all `count` examples."""
        return self.draw(batch, root_key, mask_token_id=mask_token_id, t=self.validation_t(batch["index"], count))


def example_keys(root_key: jax.Array, stream: Stream, index: jax.Array, epoch=0) -> jax.Array:
    """A key [B] for each example `index` [B] in its `epoch`, counted from 0: [B], or one for all."""

    def one(number, epoch):
        return jax.random.fold_in(noise.stream_key(root_key, stream, epoch), number)

    return jax.vmap(one)(index, jnp.broadcast_to(epoch, index.shape))


def example_coins(root_key: jax.Array, index: jax.Array, p_sm: float, epoch=0) -> jax.Array:
    """[B] bool: whether each example gets two passes."""
    return noise.coin(example_keys(root_key, Stream.COIN, index, epoch), p_sm)


def context_weights(known: jax.Array, p: float) -> jax.Array:
    """Dream's context-adaptive weights (CART, arXiv 2508.15487, section 3; `context_adaptive_reweight` of its code).

    known [B L] bool -> w_i = sum over known j != i of p (1 - p)^(|i - j| - 1) / 2, [B L] float32: near 1 amid known
    tokens, near 0 far from any."""
    position = jnp.arange(known.shape[1])
    distance = jnp.abs(position[:, None] - position)
    share = jnp.where(distance > 0, 0.5 * p * (1.0 - p) ** jnp.maximum(distance - 1, 0), 0.0)
    return jnp.einsum("bj,ji->bi", known.astype(jnp.float32), share, precision="highest")
