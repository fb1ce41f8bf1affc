"""Soft-masking in samplers: the feedback of a step to the next, and its trace for pictures."""
import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask
from softmask_jax.diffusion.vocab import head
from softmask_jax.samplers.result import Trace


# Candidates that a picture shows of a model without soft-masking, or with the full vocabulary.
SHOWN = 3


def shown(soft_mask: SoftMask) -> int:
    """How many candidates a trace keeps."""
    return soft_mask.reads or SHOWN


def empty_trace(steps: int, tokens: jax.Array, k: int) -> Trace:
    """A `Trace` of `steps` steps of tokens [B L] with k candidates, to be filled."""
    shape = (steps, *tokens.shape)
    return Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(steps, bool), jnp.zeros(shape), jnp.zeros((*shape, k), jnp.int32),
                 jnp.zeros((*shape, k)), jnp.zeros(shape))


def traced(trace: Trace | None, soft_mask: SoftMask, denoiser, params: dict, step, tokens, given: Feedback, scale,
           neg_entropy, masked, *, called=True) -> Trace | None:
    """The trace with a step written down.

    Args:
      given, scale: the feedback that the step's input carried, [B] the factor on its lambda. neg_entropy: [B L] of its own
        prediction, read where `masked`. called: [] bool, whether the network was.
    """
    if trace is None:
        return None
    k = trace.token_ids.shape[-1]
    weight = _weight(soft_mask, denoiser, params, tokens, given, scale)
    shares = jax.nn.softmax(given.top_logits[..., :k].astype(jnp.float32), -1)
    now = Trace(tokens, jnp.asarray(called), weight, given.token_ids[..., :k], shares,
                jnp.where(masked, neg_entropy, 0.0))
    return Trace(*(every.at[step].set(one) for every, one in zip(trace, now)))


def _weight(soft_mask: SoftMask, denoiser, params: dict, tokens, given: Feedback, scale) -> jax.Array:
    """lambda [B L] as `soft_masking.blend` uses it: 0 but at masks."""
    if not soft_mask.on:
        return jnp.zeros(tokens.shape, jnp.float32)
    if soft_mask.variant == "full":
        temperature = soft_masking.effective(params["soft_mask"]).temperature
        found = head.sweep(given.hidden, denoiser.head(params["backbone"]), k=1, temperature=temperature)
        sure = found.neg_entropy if given.certain is None else jnp.where(given.certain >= 0, 0.0, found.neg_entropy)
        given = given._replace(neg_entropy=sure)
    return soft_masking.blend_weight(tokens, given, params["soft_mask"], mask_token_id=denoiser.mask_token_id, scale=scale)


def read(soft_mask: SoftMask, given: Feedback | None) -> Feedback | None:
    """The feedback as soft-masking reads it: a trace may keep more candidates."""
    if given is None or not soft_mask.on:
        return None
    k = soft_mask.reads or given.token_ids.shape[-1]
    return given._replace(token_ids=given.token_ids[..., :k], top_logits=given.top_logits[..., :k])


def found(soft_mask: SoftMask, before: Feedback | None, predicted, hidden: jax.Array) -> Feedback | None:
    """What `predicted` (a `dream_draw.Predicted`) tells the next step; None where nothing is fed back."""
    if before is None:
        return None
    hidden = hidden if soft_mask.variant == "full" else None
    if predicted.token_ids is None:
        return before._replace(hidden=hidden)
    return Feedback(predicted.token_ids, predicted.top_logits, predicted.neg_entropy, hidden)


def check_masks(tokens, attention_mask, mask_token_id: int) -> None:
    """ValueError unless some token that is not padding is the mask; says nothing of arrays that are being traced."""
    if any(isinstance(x, jax.core.Tracer) for x in (tokens, attention_mask)):
        return
    attended = True if attention_mask is None else np.asarray(attention_mask) != 0
    if not ((np.asarray(tokens) == mask_token_id) & attended).any():
        raise ValueError(f"Nothing to generate: no token is the mask ({mask_token_id}).")
