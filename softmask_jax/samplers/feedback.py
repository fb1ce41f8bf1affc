"""Soft-masking in samplers: the feedback from step to step, and the trace of it."""
import dataclasses

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.samplers.canvas import BoolBL, FloatBL, FloatBLD, Int, IntBL
from softmask_jax.samplers.result import Trace


# Candidates that a picture shows of a model without soft-masking, or with the full vocabulary.
SHOWN = 3


def shown(soft_mask: SoftMask) -> int:
    """How many candidates a trace keeps."""
    return soft_mask.reads or SHOWN


def empty_feedback(denoiser, soft_mask: SoftMask, params: dict, tokens: IntBL, k: int) -> Feedback:
    """Feedback of no prediction, with room for k candidates."""
    soft_mask = dataclasses.replace(soft_mask, k=max(k, 1))
    return two_pass.empty_feedback(denoiser, soft_mask, params["backbone"], tokens)


def soft_embed(denoiser, soft_mask: SoftMask, params: dict, tokens: IntBL, feedback: Feedback | None,
               scale: FloatBL) -> FloatBLD:
    """Input embeddings, soft-masked by the feedback with lambda times `scale`; a trace may keep more candidates."""
    if feedback is not None and soft_mask.on:
        k = soft_mask.reads or feedback.token_ids.shape[-1]
        feedback = feedback._replace(token_ids=feedback.token_ids[..., :k], top_logits=feedback.top_logits[..., :k])
    return two_pass.soft_embed(denoiser, soft_mask, params, tokens, feedback, scale)


def of_prediction(soft_mask: SoftMask, old: Feedback | None, predicted, hidden: FloatBLD) -> Feedback | None:
    """The feedback of `predicted` (a `dream_draw.Predicted`); None where nothing is fed back."""
    if old is None:
        return None
    hidden = hidden if soft_mask.variant == "full" else None
    if predicted.token_ids is None:
        return old._replace(hidden=hidden)
    return Feedback(predicted.token_ids, predicted.top_logits, predicted.neg_entropy, hidden)


def empty_trace(steps: int, tokens: IntBL, k: int) -> Trace:
    """A `Trace` of `steps` steps with k candidates, to be filled."""
    shape = (steps, *tokens.shape)
    return Trace(tokens=jnp.zeros(shape, jnp.int32), called=jnp.zeros(steps, bool), weight=jnp.zeros(shape),
                 token_ids=jnp.zeros((*shape, k), jnp.int32), shares=jnp.zeros((*shape, k)),
                 neg_entropy=jnp.zeros(shape))


def traced(trace: Trace | None, soft_mask: SoftMask, denoiser, params: dict, step: Int, tokens: IntBL,
           feedback: Feedback, scale: FloatBL, neg_entropy: FloatBL, masked: BoolBL, *, called=True) -> Trace | None:
    """The trace with a step written down.

    Args:
      feedback, scale: carried by the step's input, and the factor on its lambda.
      neg_entropy: of the step's own prediction, read where `masked`.
      called: [] bool, whether the network was.
    """
    if trace is None:
        return None
    k = trace.token_ids.shape[-1]
    weight = _weight(soft_mask, denoiser, params, tokens, feedback, scale)
    shares = jax.nn.softmax(feedback.top_logits[..., :k].astype(jnp.float32), -1)
    now = Trace(tokens, jnp.asarray(called), weight, feedback.token_ids[..., :k], shares,
                jnp.where(masked, neg_entropy, 0.0))
    return Trace(*(steps.at[step].set(one) for steps, one in zip(trace, now)))


def _weight(soft_mask: SoftMask, denoiser, params: dict, tokens: IntBL, feedback: Feedback, scale) -> FloatBL:
    """lambda as `soft_masking.blend` uses it: 0 but at masks."""
    if not soft_mask.on:
        return jnp.zeros(tokens.shape, jnp.float32)
    if soft_mask.variant == "full":
        temperature = soft_masking.effective(params["soft_mask"]).temperature
        sweep = vocab_head.sweep(feedback.hidden, denoiser.head(params["backbone"]), k=1, temperature=temperature)
        certain = False if feedback.certain is None else feedback.certain >= 0
        feedback = feedback._replace(neg_entropy=jnp.where(certain, 0.0, sweep.neg_entropy))
    return soft_masking.blend_weight(tokens, feedback, params["soft_mask"], mask_token_id=denoiser.mask_token_id,
                                     scale=scale)
