"""The result of every sampler: tokens, their cost, and on demand a history and a trace of the denoising."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.samplers.canvas import BoolBL, FloatBL, Int, IntBL

# Candidates in the trace of a model without soft-masking, or with the full vocabulary.
SHOWN = 3


class Trace(NamedTuple):
    """The denoising step by step; T is how many steps the sampler may make, `Generated.steps` how many it made.

    A mask's input embedding was (1 - weight) e_mask + weight * sum_i shares_i e_i; weight 0 is a plain mask."""

    tokens: jax.Array  # [T B L] int32, before each step
    called: jax.Array  # [T] bool, whether the network was called, or its last prediction used again
    weight: jax.Array  # [T B L] float32, lambda of the input's masks
    token_ids: jax.Array  # [T B L k] int32, the likeliest tokens of the prediction before
    shares: jax.Array  # [T B L k] float32, their pi, which sum to 1
    neg_entropy: jax.Array  # [T B L] float32, sum p log p of the step's prediction, nats; 0 where nothing was predicted


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


def candidates(soft_mask: SoftMask, trace: bool) -> int:
    """How many candidates of a prediction a sampler keeps."""
    return soft_mask.reads or (SHOWN if trace else 0)


def empty_trace(steps: int, tokens: IntBL, k: int) -> Trace:
    """A `Trace` of `steps` steps with k candidates, all zeros."""
    shape = (steps, *tokens.shape)
    return Trace(tokens=jnp.zeros(shape, jnp.int32), called=jnp.zeros(steps, bool), weight=jnp.zeros(shape),
                 token_ids=jnp.zeros((*shape, k), jnp.int32), shares=jnp.zeros((*shape, k)),
                 neg_entropy=jnp.zeros(shape))


def record_trace(carry, sampler, params: dict, step: Int | int, scale: FloatBL, neg_entropy: FloatBL, masked: BoolBL,
                 called: jax.Array | bool = True) -> Trace | None:
    """The carry's trace with a step added; None stays None. carry: state before the step; scale: factor on its input's
    lambda; neg_entropy: of the step's prediction, read where `masked`; called []: whether the network was."""
    if carry.trace is None:
        return None
    tokens, feedback = carry.tokens, carry.feedback
    shares = jax.nn.softmax(feedback.top_logits.astype(jnp.float32), -1)
    weight = _weight(sampler, params, tokens, feedback, scale)
    now = Trace(tokens, jnp.asarray(called), weight, feedback.token_ids, shares, jnp.where(masked, neg_entropy, 0.0))
    return jax.tree.map(lambda steps, one: steps.at[step].set(one), carry.trace, now)


def _weight(sampler, params: dict, tokens: IntBL, feedback: Feedback, scale: FloatBL) -> FloatBL:
    """lambda as `soft_masking.blend` uses it: 0 but at masks."""
    denoiser, variant, neg_entropy = sampler.denoiser, sampler.soft_mask.variant, feedback.neg_entropy
    if variant == "none":
        return jnp.zeros(tokens.shape, jnp.float32)
    if variant == "full":
        temperature = soft_masking.effective(params["soft_mask"]).temperature
        sweep = vocab_head.sweep(feedback.hidden, denoiser.head(params["backbone"]), k=1, temperature=temperature)
        certain = False if feedback.certain is None else feedback.certain >= 0
        neg_entropy = jnp.where(certain, 0.0, sweep.neg_entropy)
    return soft_masking.masked_weight(tokens, neg_entropy, params["soft_mask"], mask_token_id=denoiser.mask_token_id,
                                      scale=scale)
