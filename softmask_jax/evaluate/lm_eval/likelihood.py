"""A lower bound on log p(continuation | context), averaged over masks (LLaDA, arXiv 2502.09992, algorithm 3).

With l of the continuation's n tokens masked, l uniform on 1..n and then the masked set uniform, n / l times the summed
log-probability of the masked tokens is in expectation

    the mean over all orders of the n tokens of  sum_i log p(token_i | context, tokens before it in the order)
      <= log p(continuation | context)

A soft-masked prediction, two passes over the same masked input, depends on unmasked tokens alone: the bound holds.
With guidance (`samplers.guidance`) the predictions are the guided ones; the context is what the other half lacks."""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import settled
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.diffusion.soft_masking import schedule_factor
from softmask_jax.evaluate.lm_eval.masks import masks
from softmask_jax.generate.batches import FAILED, MULTIPLE
from softmask_jax.samplers import SoftMask, guidance


class Span(NamedTuple):
    """A continuation to score, behind its context."""

    tokens: np.ndarray  # [n] int32
    start: int  # of the continuation
    key: int  # seeds its masks, below 2**64


def key_of(*parts) -> int:
    """64-bit hash of texts and numbers, the same in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def masked_log_probs(denoiser, soft_mask: SoftMask, cfg_scale: float, params: dict, tokens, masked, real, context,
                     counts) -> jax.Array:
    """Summed log p of the masked tokens given all others, [B] float32, nats; tokens [B L] ids, masked [B L], real [B L]
    (False for padding), context [B L] (tokens before the scored ones). soft_mask's schedule follows the masked share of
    each row's `counts` [B] scored tokens."""
    mask = jnp.asarray(denoiser.mask_token_id, tokens.dtype)
    xt, segment_ids = jnp.where(masked, mask, tokens), real.astype(jnp.int32)
    scale, scoring = schedule_factor(soft_mask.schedule, masked.sum(-1), counts), denoiser
    if cfg_scale:
        xt = jnp.concatenate([xt, jnp.where(context, mask, xt)])
        segment_ids, scale = guidance.twice(segment_ids), guidance.twice(scale)
        scoring = dataclasses.replace(denoiser, trunk=guidance.guided(denoiser.trunk, cfg_scale))
    noisy = Noisy(tokens, xt, masked, t=None, weights=None, segment_ids=segment_ids)
    feedback = two_pass.feedback_if(True, denoiser, soft_mask, params, noisy)
    return -two_pass.token_nll(scoring, soft_mask, params, noisy, feedback, scale).sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihoods of spans: called with them, it yields (index, nats), by padded length, the longest first.

    Nats depend on the span, `draws` and `seed` alone, but for the rounding of bfloat16."""

    model: object  # a `softmask_jax.Model`
    draws: int = 128  # masks of a span at most, see `masks`
    batch_size: int = 8  # rows of a network call, each a span under one mask
    seed: int = 0
    soft_mask: SoftMask | None = None  # in place of the model's
    cfg_scale: float = 0.0  # of guidance
    # (tokens of a continuation, draws, seed, its key) -> masks and weights
    masks: Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]] = masks

    def __call__(self, spans: Sequence[Span]) -> Iterator[tuple[int, float]]:
        """ValueError for a span that is longer than the model, or whose likelihood is NaN."""
        longest, by_length = self.model.max_length, {}
        for index, span in enumerate(spans):
            if len(span.tokens) > longest:
                size = f"{len(span.tokens):,} tokens"
                raise ValueError(f"A text of {size} is longer than the model's {longest:,} positions.")
            rounded = math.ceil(len(span.tokens) / MULTIPLE) * MULTIPLE
            by_length.setdefault(min(rounded, longest), []).append(index)
        for length in sorted(by_length, reverse=True):
            yield from self._of_length(spans, by_length[length], length)

    def _of_length(self, spans: Sequence[Span], indices: Sequence[int], length: int) -> Iterator[tuple[int, float]]:
        sums, left = dict.fromkeys(indices, 0.0), {}

        def rows() -> Iterator[tuple[int, np.ndarray, float]]:
            for index in indices:
                span = spans[index]
                masked, weights = self.masks(len(span.tokens) - span.start, self.draws, self.seed, span.key)
                left[index] = len(weights)
                yield from ((index, mask, weight) for mask, weight in zip(masked, weights.tolist()))

        yield from ((index, 0.0) for index in indices if len(spans[index].tokens) == spans[index].start)
        size, waiting = math.ceil(self.batch_size / self.model.row_shards) * self.model.row_shards, rows()
        while batch := list(itertools.islice(waiting, size)):
            for (index, _, weight), value in zip(batch, self._log_probs(spans, batch, size, length)):
                sums[index] += weight * value
                left[index] -= 1
                if not left[index]:
                    yield index, sums[index]

    def _log_probs(self, spans: Sequence[Span], rows: Sequence, size: int, length: int) -> list[float]:
        """One network call over `rows`, repeated until there are `size`."""
        tokens, counts = np.zeros((size, length), np.int32), np.ones(size, np.int32)
        masked, real, context = np.zeros((3, size, length), bool)
        for row in range(size):
            index, mask, _ = rows[row % len(rows)]
            span = spans[index]
            end = len(span.tokens)
            tokens[row, :end], real[row, :end], counts[row] = span.tokens, True, len(mask)
            masked[row, span.start:end], context[row, : span.start] = mask, True
        soft_mask = self.model.soft_mask if self.soft_mask is None else self.soft_mask
        arrays = tokens, masked, real, context, counts
        with settled():
            sums = masked_log_probs(self.model.denoiser, soft_mask, self.cfg_scale, self.model.params, *arrays)
        values = np.asarray(sums, np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{FAILED}: there is no likelihood; check the checkpoint.")
        return values.tolist()
