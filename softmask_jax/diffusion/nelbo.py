"""The two-pass NELBO of soft-masked diffusion (arXiv 2510.17206, Algorithm 1; MDLM, arXiv 2406.07524, eq. 10).

Pure functions of a denoiser's parameters. Pass 1 reads plain masks and is cut from the gradient; soft-masking turns
its prediction into embeddings; pass 2 reads those, and the loss is taken there.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import noise, soft_masking
from softmask_jax.diffusion.noise import Stream
from softmask_jax.diffusion.vocab import head as vocab_head


@dataclasses.dataclass(frozen=True)
class Nelbo:
    """The static part of the objective.

    variant, k: of soft-masking. noise_eps: alpha_1. t_eps: the smallest t. stratified: t over the global batch.
    """

    variant: str = "topk"
    k: int = 3
    noise_eps: float = 1e-3
    t_eps: float = 1e-3
    stratified: bool = True

    @property
    def schedule(self) -> noise.LogLinear:
        return noise.LogLinear(self.noise_eps)


class Corrupted(NamedTuple):
    """One corrupted batch: x_0 [B L], x_t [B L], t [B]; `weight` [B] is -alpha'/(1 - alpha)."""

    tokens: jax.Array
    noisy: jax.Array
    t: jax.Array
    weight: jax.Array


def corrupt(spec: Nelbo, tokens, rows, n: int, root_key, step, *, mask_token_id: int, strata=None) -> Corrupted:
    """Draw t and x_t; a row's noise depends on (root_key, step, row) alone, so it is the same on any mesh.

    Args:
      tokens: [B L] ids. rows: [B] index of each row within the global batch of `n` rows. n: the number of strata, an
        int or [B].
      strata: [B] which of the n strata of t each row draws from; its index by default, which is right where rows come
        in random order.
    """
    t = noise.stratified_t(
        noise.row_keys(noise.stream_key(root_key, Stream.T, step), rows),
        rows if strata is None else strata, n, spec.t_eps, stratified=spec.stratified,
    )  # fmt: skip
    keys = noise.row_keys(noise.stream_key(root_key, Stream.MASK, step), rows)
    noisy = noise.corrupt(tokens, spec.schedule.alpha(t), keys, mask_token_id)
    return Corrupted(tokens, noisy, t, spec.schedule.loss_weight(t))


def pass_1(denoiser, spec: Nelbo, params, tokens, *, dropout_keys=None) -> soft_masking.Feedback:
    """What a plain pass over `tokens` [B L] tells the next one: one sweep, cut from the gradient."""
    backbone = params["backbone"]
    hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, tokens), dropout_keys=dropout_keys)
    return feedback_of(denoiser, spec, params, hidden)


def feedback_of(denoiser, spec: Nelbo, params, hidden) -> soft_masking.Feedback:
    """What a pass that ended in `hidden` [B L D] tells the next one; see `pass_1`."""
    full = spec.variant == "full"
    temperature = soft_masking.effective(params["soft_mask"]).temperature if full else 1.0
    sweep = vocab_head.sweep(hidden, denoiser.head(params["backbone"]), k=spec.k, temperature=temperature)
    return jax.lax.stop_gradient(
        soft_masking.Feedback(sweep.token_ids, sweep.top_logits, sweep.neg_entropy, hidden if full else None)
    )


def empty_feedback(denoiser, spec: Nelbo, backbone, tokens) -> soft_masking.Feedback:
    """A feedback of the right shapes for steps without pass 1; lambda is multiplied by 0 there."""
    shape, hidden = tokens.shape, None
    if spec.variant == "full":
        like = jax.eval_shape(lambda b: denoiser.trunk(b, denoiser.embed(b, tokens))[0], backbone)
        hidden = jnp.zeros(like.shape, like.dtype)
    return soft_masking.Feedback(
        jnp.zeros((*shape, spec.k), jnp.int32),
        jnp.zeros((*shape, spec.k), jnp.float32),
        jnp.zeros(shape, jnp.float32),
        hidden,
    )


def soft_embed(denoiser, spec: Nelbo, params, tokens, given: soft_masking.Feedback | None, scale=1.0):
    """Input embeddings [B L D]: plain without feedback, else soft-masked with lambda times `scale`."""
    backbone = params["backbone"]
    if given is None or spec.variant == "none":
        return denoiser.embed(backbone, tokens)
    return soft_masking.blend(
        tokens, given, params["soft_mask"], denoiser.embedding(backbone),
        mask_token_id=denoiser.mask_token_id, scale=scale, variant=spec.variant, head=denoiser.head(backbone),
    )  # fmt: skip


def token_nll(denoiser, spec: Nelbo, params, noisy: Corrupted, given, scale=1.0, *, dropout_keys=None):
    """-log p(x_0) at masked positions, 0 elsewhere (SUBS copies those).

    Returns:
      [B L] float32, nats, unweighted.
    """
    x = soft_embed(denoiser, spec, params, noisy.noisy, given, scale)
    hidden, _ = denoiser.trunk(params["backbone"], x, dropout_keys=dropout_keys)
    nll = vocab_head.cross_entropy(hidden, denoiser.head(params["backbone"]), noisy.tokens)
    return jnp.where(noisy.noisy == denoiser.mask_token_id, nll, 0.0)


def nelbo_per_row(denoiser, spec: Nelbo, params, noisy: Corrupted, *, two_pass: bool):
    """The NELBO of each row in nats, summed over its positions: [B] float32. No dropout."""
    given = None
    if two_pass and spec.variant != "none":
        given = pass_1(denoiser, spec, params, noisy.noisy)
    return token_nll(denoiser, spec, params, noisy, given).sum(-1) * noisy.weight


def nll_by_passes(denoiser, spec: Nelbo, params, noisy, targets) -> dict[str, jax.Array]:
    """-log p(targets) [B L] float32, at every position: "one_pass" over noisy [B L], and "two_pass" with soft-masking.

    What `token_nll` finds, for both at the price of two passes. No dropout.
    """
    backbone, head = params["backbone"], denoiser.head(params["backbone"])
    hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, noisy))
    found = {"one_pass": vocab_head.cross_entropy(hidden, head, targets)}
    if spec.variant != "none":
        x = soft_embed(denoiser, spec, params, noisy, feedback_of(denoiser, spec, params, hidden))
        found["two_pass"] = vocab_head.cross_entropy(denoiser.trunk(backbone, x)[0], head, targets)
    return found


class RowScores(NamedTuple):
    """masked: tokens that are masked, [B] int32. cross_entropy: by pass, their unweighted sums [B] float32, nats; times
    the weight of the row they are its NELBO."""

    masked: jax.Array
    cross_entropy: dict[str, jax.Array]


def row_scores(denoiser, spec: Nelbo, params, noisy: Corrupted) -> RowScores:
    """Rows under one pass and, with soft-masking, under two on the same masks. No dropout."""
    masked = noisy.noisy == denoiser.mask_token_id
    found = nll_by_passes(denoiser, spec, params, noisy.noisy, noisy.tokens)
    sums = {name: jnp.where(masked, nll, 0.0).sum(-1) for name, nll in found.items()}
    return RowScores(masked.sum(-1, dtype=jnp.int32), sums)
