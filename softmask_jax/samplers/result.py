"""The result of every sampler: tokens, their cost, and on demand a trace of the denoising."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Trace(NamedTuple):
    """The denoising step by step; T is how many steps the sampler may make, `Generated.steps` how many it made.

    A mask's embedding in a step's input was (1 - weight) e_mask + weight * sum_i shares_i e_i; plain masks, as all are
    at the first step and without soft-masking, have weight 0.

    Attributes:
      tokens: [T B L] int32, before each step.
      called: [T] bool, whether the network was called, or its last prediction used again.
      weight: [T B L] float32, lambda of the input's masks.
      token_ids: [T B L k] int32, the likeliest tokens of the prediction before.
      shares: [T B L k] float32, their pi, which sum to 1.
      neg_entropy: [T B L] float32, sum p log p of the step's own prediction, nats; 0 where nothing was predicted.
    """

    tokens: jax.Array
    called: jax.Array
    weight: jax.Array
    token_ids: jax.Array
    shares: jax.Array
    neg_entropy: jax.Array


class Generated(NamedTuple):
    """Filled tokens and what they cost.

    Attributes:
      tokens: [B L] int32.
      history: [T B L] after each step, or None.
      steps: [] int32, steps made.
      calls: [] int32, network calls of the batch.
      row_calls: [B] int32, calls made while a row had something to fill and its prediction was not known.
      positions: [B] float32, sequence positions that these calls computed, which is what a cache makes fewer.
      filled: [B] int32, masks that became tokens.
      finite: [B] bool, False where a logit was NaN or infinite: such a row means nothing.
      trace: or None.
    """

    tokens: jax.Array
    history: jax.Array | None
    steps: jax.Array
    calls: jax.Array
    row_calls: jax.Array
    positions: jax.Array
    filled: jax.Array
    finite: jax.Array
    trace: Trace | None = None

    @property
    def tokens_per_call(self) -> np.ndarray:
        """[B] float: masks filled by one network call, on average; 0 where none was made."""
        calls = np.asarray(self.row_calls)
        return np.asarray(self.filled) / np.maximum(calls, 1) * (calls > 0)

    def first_rows(self, count: int) -> "Generated":
        """The same of the first `count` rows; `steps` and `calls` stay those of the whole batch."""
        trace, history = self.trace, self.history
        if trace is not None:
            trace = Trace(*(x if x.ndim == 1 else x[:, :count] for x in trace))
        return self._replace(
            history=None if history is None else history[:, :count], trace=trace,
            **{name: getattr(self, name)[:count] for name in ("tokens", "row_calls", "positions", "filled", "finite")},
        )  # fmt: skip


def recorded(history: jax.Array | None, step: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """history [T B L] with the tokens after a step written down; None stays None."""
    return None if history is None else history.at[step].set(tokens)


def held(history: jax.Array | None, steps: jax.Array, tokens: jax.Array) -> jax.Array | None:
    """history [T B L] whose steps that were not made show the end result."""
    if history is None:
        return None
    return jnp.where((jnp.arange(len(history)) < steps)[:, None, None], history, tokens)
