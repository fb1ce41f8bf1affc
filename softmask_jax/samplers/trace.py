"""The trace of a sampler: what the masks of every step carried, and how sure the step's prediction was."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.samplers.canvas import BoolBL, FloatBL, Int, IntBL

# Candidates in the trace of a model without soft-masking, or with the full vocabulary.
SHOWN = 3


class Trace(NamedTuple):
    """The denoising step by step; T is how many steps the sampler may make, `Generated.steps` how many it made.

    A mask's embedding in a step's input was (1 - weight) e_mask + weight * sum_i shares_i e_i; plain masks, as all are
    at the first step and without soft-masking, have weight 0.
    """

    tokens: jax.Array  # [T B L] int32, before each step
    called: jax.Array  # [T] bool, whether the network was called, or its last prediction used again
    weight: jax.Array  # [T B L] float32, lambda of the input's masks
    token_ids: jax.Array  # [T B L k] int32, the likeliest tokens of the prediction before
    shares: jax.Array  # [T B L k] float32, their pi, which sum to 1
    neg_entropy: jax.Array  # [T B L] float32, sum p log p of the step's prediction, nats; 0 where nothing was predicted


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
    """The carry's trace with a step in it; None stays None.

    Args:
      carry: state before the step: its tokens, and the feedback of its input.
      scale: factor on the input's lambda.
      neg_entropy: of the step's own prediction, read where `masked`.
      called: [] bool, whether the network was called.
    """
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
