"""Rules for committing: how many of a row's surest masks become tokens in a step.

`origin` and grids of shares are Dream's (HKU NLP and Huawei), threshold and factor Fast-dLLM's (arXiv 2505.22618).
A rule is a frozen dataclass called as rule(confidence [B n], masks [B], at_start [B], done [B], step []) -> [B] int32
with each row's confidences sorted, highest first, -inf where there is no mask; it may count more masks than there are.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def unmask_shares(steps: int, eps: float = 1e-3) -> np.ndarray:
    """The share 1 - s / t of the masks that each step unmasks, 1 at the last: [steps] float32."""
    # On the host: an accelerator's division may be off by a bit, and the share decides whole tokens.
    times = np.linspace(1.0, eps, steps + 1).astype(np.float32)
    return np.append(np.float32(1) - times[1:-1] / times[:-2], np.float32(1)).astype(np.float32)


def surest(masked: jax.Array, confidence: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` [B] surest masks of each row: masked, confidence [B n] -> [B n] bool; the first among equals."""
    rank = jnp.argsort(jnp.argsort(-known(masked, confidence), -1, stable=True), -1, stable=True)
    return masked & (rank < count[:, None])


def known(masked: jax.Array, confidence: jax.Array) -> jax.Array:
    """confidence [B n] with -inf where there is no mask."""
    # NaN comes first in no order: a row of NaN is reported, but must not commit anything but masks.
    return jnp.where(masked, jnp.nan_to_num(confidence, nan=jnp.finfo(confidence.dtype).min), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Shares:
    """int(masks * (1 - s / t)) along Dream's time grid, everything at the last of `steps` steps."""

    steps: int
    eps: float = 1e-3

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps, where the time grid ends, must be in (0, 1), not {self.eps}.")

    def share(self, step: jax.Array) -> jax.Array:
        """1 - s / t at a step, []."""
        return jnp.asarray(unmask_shares(self.steps, self.eps))[jnp.minimum(step, self.steps - 1)]

    def __call__(self, confidence, masks, at_start, done, step):
        return (masks.astype(jnp.float32) * self.share(step)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every mask whose confidence is at least `threshold`, and always the surest.

    steps: at most masks / steps of them a step at first, unused ones later (Fast-dLLM without blocks); after `steps`
    steps, or with None, as many as there are.
    """

    threshold: float = 0.9
    steps: int | None = None

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a probability in [0, 1], not {self.threshold}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")

    def __call__(self, confidence, masks, at_start, done, step):
        count = jnp.maximum((confidence >= self.threshold).sum(-1), 1)
        if self.steps is not None:
            number = -(-at_start // self.steps)
            allowed = jnp.where(step < self.steps - 1, number * (step + 1) - done, masks)
            count = jnp.clip(count, 1, jnp.maximum(allowed, 1))
        return count.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Factor:
    """The largest n with (n + 1) (1 - c_n) < factor, c_n the n-th highest confidence; at least one.

    The surer the tokens, the more of them are taken together: n tokens drawn independently are then the arg-max of
    their joint distribution if the factor is below 1 (Fast-dLLM, theorem 1).
    """

    factor: float = 1.0

    def __post_init__(self):
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, not {self.factor}.")

    def __call__(self, confidence, masks, at_start, done, step):
        rank = jnp.arange(1, confidence.shape[-1] + 1)
        sure = (rank + 1) * (1 - confidence) < self.factor
        return jnp.maximum(jnp.cumprod(sure, -1).sum(-1), 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Number:
    """A fixed number of tokens a step."""

    number: int = 1

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"A step must commit at least 1 token, not {self.number}.")

    def __call__(self, confidence, masks, at_start, done, step):
        return jnp.full(masks.shape, self.number, jnp.int32)
