"""LLaDA's losses with soft-masking (arXiv 2502.09992, and `GUIDELINES.md` of ML-GSAI/LLaDA). B batch, L length.

A row has one t, uniform in [0, 1); a token is masked with probability p = (1 - noise_eps) t + noise_eps and weighs 1/p.
Unlike Dream's, a row may have no mask at all. Logits are not shifted."""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.objective import Batch, Noisy, Objective
from softmask_jax.diffusion.response_loss import ResponseLoss
from softmask_jax.diffusion.soft_masking import SoftMask

WEIGHTINGS, DIVISORS = ("time", "uniform"), ("response", "tokens", "rows")


@dataclasses.dataclass(frozen=True)
class LLaDALoss(ResponseLoss):
    """The loss of chats; the defaults are LLaDA's, the other divisors those of dllm's trainer (ZHZisZZ/dllm)."""

    soft_mask: SoftMask = SoftMask("topk", 1)  # of pass 2
    noise_eps: float = 1e-3
    weighting: str = "time"  # 1/p; or "uniform": 1
    weight_eps: float = 0.0  # added to p in 1/p; dllm: 1e-6
    # Of a row's sum: the tokens of its response, pads included; those of the batch's mean response; 1.
    divisor: str = "response"
    supervise_pads: bool = True  # corrupt and score the pads: they teach the model to stop
    fresh_noise: bool = True
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    def __post_init__(self):
        if not (0 <= self.noise_eps < 1 and self.weight_eps >= 0):
            raise ValueError("objective: wanted 0 <= noise_eps < 1 and weight_eps of at least 0, got "
                             f"{self.noise_eps} and {self.weight_eps}")
        for name, known in (("weighting", WEIGHTINGS), ("divisor", DIVISORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"objective.{name}={getattr(self, name)!r} is not for LLaDA's loss; choose "
                                 f"{' or '.join(known)}")

    def by_row(self) -> "LLaDALoss":
        return dataclasses.replace(self, divisor="response") if self.divisor == "tokens" else self

    def noisy(self, batch: Batch, t: jax.Array, uniforms: jax.Array, *, mask_token_id: int) -> Noisy:
        """See `ResponseLoss.noisy`."""
        tokens, maskable = batch["tokens"], self.maskable(batch)
        masked, weights = _masks(self.probability(t), uniforms, maskable, self.weight_eps, self.weighting == "time")
        count = maskable.sum(-1, keepdims=True)
        divisor = {"response": count, "tokens": count.mean(), "rows": 1}[self.divisor]
        xt = jnp.where(masked, jnp.asarray(mask_token_id, tokens.dtype), tokens)
        return Noisy(tokens, xt, masked, t, weights / jnp.maximum(divisor, 1), batch["segment_ids"])

    def validation_batch(self, batch: Batch, root_key: jax.Array, count: int, *, mask_token_id: int) -> Noisy:
        """See `ResponseLoss.validation_batch`; every response has its own divisor."""
        return ResponseLoss.validation_batch(self.by_row(), batch, root_key, count, mask_token_id=mask_token_id)


@dataclasses.dataclass(frozen=True)
class LLaDATextLoss(Objective):
    """The loss of running text (LLaDA's pre-training), in nats per token."""

    soft_mask: SoftMask  # of pass 2
    noise_eps: float = 1e-3
    short_batches: float = 0.01  # share of the batches whose rows are all cut to one random length

    def __post_init__(self):
        if not (0 <= self.noise_eps < 1 and 0 <= self.short_batches <= 1):
            raise ValueError("objective: wanted 0 <= noise_eps < 1 and 0 <= short_batches <= 1, got "
                             f"{self.noise_eps} and {self.short_batches}")

    def corrupt(self, batch: Batch, root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """A global batch {"tokens" [B L], "rows" [B]}; noise depends on (root_key, step, row) alone."""
        tokens, rows = batch["tokens"], batch["rows"]
        t_keys, mask_keys, length_keys = (noise.stream_key(root_key, stream, step)
                                          for stream in (Stream.T, Stream.MASK, Stream.LENGTH))
        t = jax.vmap(jax.random.uniform)(noise.row_keys(t_keys, rows))
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(noise.row_keys(mask_keys, rows))
        length = None
        if self.short_batches > 0:
            short, how = jax.random.split(length_keys)
            length = jax.random.randint(how, (), 1, tokens.shape[1] + 1)
            length = jnp.where(noise.coin(short, self.short_batches), length, tokens.shape[1])
        return self.noisy(tokens, t, uniforms, length, mask_token_id=mask_token_id)

    def noisy(self, tokens: jax.Array, t: jax.Array, uniforms: jax.Array, length=None, *, mask_token_id: int) -> Noisy:
        """x_t of tokens [B L] from t [B] and uniforms [B L] in [0, 1). length: of the rows if they are cut, or None."""
        kept = jnp.ones(tokens.shape, bool)
        if length is not None:
            kept = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < length, tokens.shape)
        masked, weights = _masks((1 - self.noise_eps) * t + self.noise_eps, uniforms, kept)
        xt = jnp.where(masked, jnp.asarray(mask_token_id, tokens.dtype), tokens)
        segments = None if length is None else kept.astype(jnp.int32)
        return Noisy(tokens, xt, masked, t, weights / (tokens.shape[1] if length is None else length), segments)

    def coins(self, batch: Batch, root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool; the rows of a micro-batch share a coin."""
        return noise.shared_coins(root_key, step, len(batch["rows"]), p_sm=p_sm, micro_batches=micro_batches)


def _masks(p, uniforms, maskable, weight_eps: float = 0.0, by_time: bool = True) -> tuple[jax.Array, jax.Array]:
    """Masked places [B L] and their weights before the divisor, 0 elsewhere."""
    masked = maskable & (uniforms < p[:, None])
    weights = 1 / (p[:, None] + weight_eps) if by_time else jnp.ones(uniforms.shape, jnp.float32)
    return masked, jnp.where(masked, weights, 0.0)
