"""The result of every sampler: tokens, their cost, and on demand a history and a trace of the denoising."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.samplers.trace import Trace


class Generated(NamedTuple):
    """Filled tokens and what they cost."""

    tokens: jax.Array  # [B L] int32
    history: jax.Array | None  # [T B L] after each step
    steps: jax.Array  # [] int32, steps made
    calls: jax.Array  # [] int32, network calls of the batch
    row_calls: jax.Array  # [B] int32, calls made while a row had something to fill and its prediction was not known
    positions: jax.Array  # [B] float32, sequence positions that these calls computed; a cache makes them fewer
    filled: jax.Array  # [B] int32, masks that became tokens
    finite: jax.Array  # [B] bool, False where a logit was NaN or infinite: such a row means nothing
    trace: Trace | None = None

    @property
    def tokens_per_call(self) -> np.ndarray:
        """[B] float: masks filled by one network call, on average; 0 where none was made."""
        calls = np.asarray(self.row_calls)
        return np.asarray(self.filled) / np.maximum(calls, 1) * (calls > 0)

    def first_rows(self, count: int) -> "Generated":
        """The first `count` rows; `steps` and `calls` stay those of the whole batch."""
        history, trace = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :count], (self.history, self.trace))
        names = "tokens", "row_calls", "positions", "filled", "finite"
        by_row = {name: getattr(self, name)[:count] for name in names}
        return self._replace(history=history, trace=trace, **by_row)


def record_step(history: jax.Array | None, step: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """history [T B L] with the tokens after a step in it; None stays None."""
    return None if history is None else history.at[step].set(tokens)


def fill_history(history: jax.Array | None, steps: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """history [T B L] with `tokens` in the steps that were not made; None stays None."""
    if history is None:
        return None
    return jnp.where((jnp.arange(len(history)) < steps)[:, None, None], history, tokens)
