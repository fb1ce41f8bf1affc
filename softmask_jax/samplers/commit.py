"""Rules for committing: how many of a row's surest masks become tokens in a step.

rule(confidence [B n], masks [B], at_start [B], step []) -> [B] int32, confidences sorted, highest first, -inf where
there is no mask; it may count more masks than there are. Sources: Dream (HKU NLP and Huawei) for `origin` and shares,
LLaDA (arXiv 2502.09992) for even, Fast-dLLM (arXiv 2505.22618) for threshold and factor."""
import jax
import jax.numpy as jnp
import numpy as np


def unmask_shares(steps: int, eps: float = 1e-3) -> np.ndarray:
    """The share 1 - s / t of the masks that each step unmasks, 1 at the last: [steps] float32."""
    # On the host: an accelerator's division may be off by a bit, and the share decides whole tokens.
    times = np.linspace(1.0, eps, steps + 1).astype(np.float32)
    return np.append(np.float32(1) - times[1:-1] / times[:-2], np.float32(1)).astype(np.float32)


def unmask_share(step: jax.Array, steps: int, eps: float) -> jax.Array:
    """The share of the masks that one step unmasks, []."""
    return jnp.asarray(unmask_shares(steps, eps))[jnp.minimum(step, steps - 1)]


def surest(masked: jax.Array, confidence: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [B] surest masks of each row: masked, confidence [B n] -> [B n] bool; the first among equals."""
    rank = jnp.argsort(jnp.argsort(-known(masked, confidence), -1, stable=True), -1, stable=True)
    return masked & (rank < count[:, None])


def known(masked: jax.Array, confidence: jax.Array) -> jax.Array:
    """confidence [B n] with -inf where there is no mask."""
    # NaN has no rank: a row of NaN is reported, but must not commit anything but masks.
    return jnp.where(masked, jnp.nan_to_num(confidence, nan=jnp.finfo(confidence.dtype).min), -jnp.inf)


def shares(confidence, masks, at_start, step, *, steps: int, eps: float):
    """int(masks * (1 - s / t)) along Dream's time grid, everything at the last of `steps` steps."""
    return (masks.astype(jnp.float32) * unmask_share(step, steps, eps)).astype(jnp.int32)


def even(confidence, masks, at_start, step, *, steps: int):
    """The masks at the start divided over `steps` steps, what is left over one by one to the first of them (LLaDA)."""
    return (at_start // steps + (step < at_start % steps)).astype(jnp.int32)


def threshold(confidence, masks, at_start, step, *, threshold: float, steps: int | None = None):
    """Every mask with confidence of at least `threshold`, at least one. steps: at most masks / steps of them a step at
    first, unused ones later (Fast-dLLM without blocks); no limit from the last of `steps` steps on, or with None."""
    count = jnp.maximum((confidence >= threshold).sum(-1), 1)
    if steps is not None:
        by_now = -(-at_start // steps) * (step + 1)
        allowed = jnp.where(step < steps - 1, by_now - (at_start - masks), masks)
        count = jnp.clip(count, 1, jnp.maximum(allowed, 1))
    return count.astype(jnp.int32)


def factor(confidence, masks, at_start, step, *, factor: float):
    """The largest n, at least 1, with (n + 1) (1 - c_n) < factor, c_n the n-th highest confidence. For factor < 1 the n
    independent arg-maxes are the arg-max of the joint distribution (Fast-dLLM, theorem 1)."""
    rank = jnp.arange(1, confidence.shape[-1] + 1)
    sure = (rank + 1) * (1 - confidence) < factor
    return jnp.maximum(jnp.cumprod(sure, -1).sum(-1), 1).astype(jnp.int32)


def number(confidence, masks, at_start, step, *, number: int):
    """The same number of tokens in every step."""
    return jnp.full(masks.shape, number, jnp.int32)
