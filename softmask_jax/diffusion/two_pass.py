"""The two passes of soft-masking (arXiv 2510.17206, Algorithm 1), for objectives and samplers alike.

Pass 1 reads plain masks; its prediction is the feedback, cut from the gradient. Pass 2 reads the masks blended with it.
A denoiser is three functions of parameters (`models.denoiser.Denoiser`); params is {"backbone", "soft_mask"}.
B rows, L positions, D width, k candidates."""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head


def within(denoiser, segment_ids: jax.Array | None):
    """The denoiser with attention kept within segments [B L]; itself for None."""
    if segment_ids is None:
        return denoiser
    return dataclasses.replace(denoiser, trunk=functools.partial(denoiser.trunk, segment_ids=segment_ids))


def pass_1(denoiser, soft_mask: SoftMask, params: dict, tokens: jax.Array, *, dropout_keys=None) -> Feedback:
    """Run pass 1 on plain masks, tokens [B L]; return its feedback under `stop_gradient`, zeros elsewhere."""
    backbone = params["backbone"]
    hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, tokens), dropout_keys=dropout_keys)
    return feedback_of(denoiser, soft_mask, params, hidden, tokens == denoiser.mask_token_id)


def feedback_of(denoiser, soft_mask: SoftMask, params: dict, hidden: jax.Array, masked: jax.Array) -> Feedback:
    """The feedback of a pass with last hidden states [B L D] at the masks [B L] bool, under `stop_gradient`: one sweep
    over the vocabulary; zeros elsewhere."""
    full = soft_mask.variant == "full"
    temperature = soft_masking.effective(params["soft_mask"]).temperature if full else 1.0
    head = denoiser.head(params["backbone"])
    sweep = vocab_head.sweep(hidden, head, k=soft_mask.k, temperature=temperature, where=masked)
    hidden = hidden if soft_mask.reads_hidden else None
    return jax.lax.stop_gradient(Feedback(sweep.token_ids, sweep.top_logits, sweep.neg_entropy, hidden))


def empty_feedback(denoiser, soft_mask: SoftMask, params: dict, tokens: jax.Array, k: int | None = None) -> Feedback:
    """Zeros of the feedback's shapes with k or soft_mask.k candidates, for steps without pass 1, where lambda is 0."""
    candidates = (*tokens.shape, soft_mask.k if k is None else k)
    hidden = empty_hidden(denoiser, params, tokens) if soft_mask.reads_hidden else None
    return Feedback(jnp.zeros(candidates, jnp.int32), jnp.zeros(candidates), jnp.zeros(tokens.shape), hidden)


def empty_hidden(denoiser, params: dict, tokens: jax.Array) -> jax.Array:
    """Zeros of the last hidden states' shape and dtype."""
    like = jax.eval_shape(lambda b: denoiser.trunk(b, denoiser.embed(b, tokens))[0], params["backbone"])
    return jnp.zeros(like.shape, like.dtype)


def soft_embed(denoiser, soft_mask: SoftMask, params: dict, tokens, feedback: Feedback | None, scale=1.0) -> jax.Array:
    """Input embeddings [B L D]: plain without feedback, else soft-masked, lambda times `scale` (see `blend`)."""
    backbone = params["backbone"]
    if feedback is None or not soft_mask.on:
        return denoiser.embed(backbone, tokens)
    return soft_masking.blend(tokens, feedback, params["soft_mask"], denoiser.embedding(backbone), scale=scale,
                              mask_token_id=denoiser.mask_token_id, variant=soft_mask.variant,
                              head=denoiser.head(backbone))


def feedback_if(coin, denoiser, soft_mask: SoftMask, params: dict, noisy: Noisy, *,
                dropout_keys=None) -> Feedback | None:
    """The feedback of pass 1, run only where `coin` (a scalar) is True; None without soft-masking."""
    if not soft_mask.on:
        return None
    denoiser = within(denoiser, noisy.segment_ids)
    return jax.lax.cond(
        coin,
        lambda: pass_1(denoiser, soft_mask, params, noisy.xt, dropout_keys=dropout_keys),
        lambda: empty_feedback(denoiser, soft_mask, params, noisy.xt),
    )


def token_nll(denoiser, soft_mask: SoftMask, params: dict, noisy: Noisy, feedback, scale=1.0, *, dropout_keys=None):
    """Pass 2: -log p(x_0) at masked positions, 0 elsewhere: [B L] float32, nats, unweighted. feedback: of pass 1, or
    None. scale: of lambda, a scalar or [B], 0 where a row has a single pass."""
    denoiser = within(denoiser, noisy.segment_ids)
    x = soft_embed(denoiser, soft_mask, params, noisy.xt, feedback, scale)
    hidden, _ = denoiser.trunk(params["backbone"], x, dropout_keys=dropout_keys)
    return _masked_nll(denoiser, params, noisy, hidden)


def _masked_nll(denoiser, params: dict, noisy: Noisy, hidden: jax.Array) -> jax.Array:
    # A frozen head, or one that is a frozen embedding, needs no gradient [Vpad D].
    train_head = ("head" if "head" in params["backbone"] else "embed") not in denoiser.frozen
    head = denoiser.head(params["backbone"])
    return vocab_head.cross_entropy(hidden, head, noisy.x0, where=noisy.masked, train_head=train_head)


class RowScores(NamedTuple):
    """Scores of rows on one draw of masks; by pass: "one_pass" and, with soft-masking, "two_pass"."""

    masked: jax.Array  # [B] int32 masked tokens
    cross_entropy: dict[str, jax.Array]  # by pass, [B] float32 unweighted sums over masked tokens, nats
    loss: dict[str, jax.Array]  # by pass, [B] float32 sums of weights * cross-entropy


def row_scores(denoiser, soft_mask: SoftMask, params: dict, noisy: Noisy) -> RowScores:
    """Score rows with one pass and with two on the same masks, without dropout, for the cost of two passes; every
    estimated loss comes from here."""
    denoiser, backbone = within(denoiser, noisy.segment_ids), params["backbone"]
    hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, noisy.xt))
    by_pass = {"one_pass": hidden}
    if soft_mask.on:
        feedback = feedback_of(denoiser, soft_mask, params, hidden, noisy.xt == denoiser.mask_token_id)
        x = soft_embed(denoiser, soft_mask, params, noisy.xt, feedback)
        by_pass["two_pass"], _ = denoiser.trunk(backbone, x)
    nll = {name: _masked_nll(denoiser, params, noisy, hidden) for name, hidden in by_pass.items()}
    return RowScores(
        noisy.masked.sum(-1, dtype=jnp.int32),
        {name: values.sum(-1) for name, values in nll.items()},
        {name: (values * noisy.weights).sum(-1) for name, values in nll.items()},
    )
