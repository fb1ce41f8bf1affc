"""A lower bound on log p(continuation | context) under a masked diffusion model, averaged over masks.

Only the continuation is masked. With l of its n tokens masked, l uniform on 1..n and the masked set uniform among those
of its size, n / l times the summed log-probability of the masked tokens is in expectation

    the mean over all orders of the n tokens of  sum_i log p(token_i | context, tokens before it in the order)
      <= log p(continuation | context)

(LLaDA, arXiv 2502.09992, algorithm 3; its and Dream's evaluations report this number). With soft-masking a prediction takes
two passes over the same masked input, as in training: still a function of what is not masked, so the bound holds.
"""
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import settled
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.objective import Noisy
from softmask_jax.generate.batches import FAILED, MULTIPLE
from softmask_jax.samplers import SoftMask


class Span(NamedTuple):
    """Tokens [n] int32 of which those from `start` on are scored; key: what its masks are drawn from, below 2**64."""

    tokens: np.ndarray
    start: int
    key: int


def key_of(*parts) -> int:
    """64 bits that the parts (texts and numbers) decide: the same in every process, order and batch."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def masks(count: int, draws: int, seed: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` tokens each draw masks, and by what its summed log-probabilities are weighted.

    All 2^count - 1 sets, and so the exact expectation, where these are no more than `draws`; else `draws` sets, their
    sizes stratified: an unbiased estimate.

    Returns:
      masked [D count] bool, at least one in each row; weights [D] float64.
    """
    if count <= draws.bit_length() and 2**count - 1 <= draws:
        masked = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1 == 1
        sizes = masked.sum(1)
        return masked, np.array([1 / (size * math.comb(count, size)) for size in sizes.tolist()])
    random = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
    places = (np.arange(draws) + random.random()) / draws
    sizes = np.minimum((places * count).astype(np.int64), count - 1) + 1
    ranks = random.random((draws, count)).argsort(1).argsort(1)
    return ranks < sizes[:, None], count / (sizes * draws)


@functools.partial(jax.jit, static_argnums=(0, 1))
def masked_log_probs(denoiser, soft_mask: SoftMask, params: dict, tokens, masked, real, counts) -> jax.Array:
    """log p of the masked tokens given all others, summed over them: [B] float32, nats.

    Args:
      soft_mask: of the second pass; its schedule follows the share of a row's scored tokens that is masked.
      tokens: [B L] ids. masked, real: [B L] bool, which are masked, and which are not padding. counts: [B] scored tokens.
    """
    xt = jnp.where(masked, jnp.asarray(denoiser.mask_token_id, tokens.dtype), tokens)
    noisy = Noisy(tokens, xt, masked, t=None, weights=None, segment_ids=real.astype(jnp.int32))
    feedback = two_pass.feedback_if(True, denoiser, soft_mask, params, noisy)
    nll = two_pass.token_nll(denoiser, soft_mask, params, noisy, feedback, soft_mask.scale(masked.sum(-1), counts))
    return -nll.sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """Called with spans, it gives (index, nats) of each, those of one padded length after another, the longest first.

    A span's number depends on its tokens, its key, `draws` and `seed` alone, but for the rounding of bfloat16.

    model: its `denoiser`, `params`, `soft_mask`, `max_length` and `row_shards` are used. draws: masks of each span at
    most, see `masks`. batch_size: rows of a network call, each with one of the masks of a span. soft_mask: settings
    instead of the model's own.
    """

    model: object
    draws: int = 128
    batch_size: int = 8
    seed: int = 0
    soft_mask: SoftMask | None = None

    def __call__(self, spans: Sequence[Span]) -> Iterator[tuple[int, float]]:
        """Raises ValueError for a span that is longer than the model, or of whose tokens it makes NaN."""
        by_length: dict[int, list[int]] = {}
        for index, span in enumerate(spans):
            if len(span.tokens) > self.model.max_length:
                longest = f"{self.model.max_length:,} positions"
                raise ValueError(f"A text of {len(span.tokens):,} tokens is longer than the model's {longest}.")
            rounded = math.ceil(len(span.tokens) / MULTIPLE) * MULTIPLE
            by_length.setdefault(min(rounded, self.model.max_length), []).append(index)
        for length in sorted(by_length, reverse=True):
            yield from self._of_length(spans, by_length[length], length)

    def _of_length(self, spans: Sequence[Span], indices: Sequence[int], length: int) -> Iterator[tuple[int, float]]:
        rows: list[tuple[int, np.ndarray, float]] = []
        sums, left = dict.fromkeys(indices, 0.0), {}
        size = math.ceil(self.batch_size / self.model.row_shards) * self.model.row_shards
        for index in indices:
            span = spans[index]
            if len(span.tokens) == span.start:
                yield index, 0.0
                continue
            masked, weights = masks(len(span.tokens) - span.start, self.draws, self.seed, span.key)
            left[index] = len(weights)
            rows += [(index, mask, weight) for mask, weight in zip(masked, weights.tolist())]
            while len(rows) >= size:
                yield from self._batch(spans, rows[:size], size, length, sums, left)
                rows = rows[size:]
        if rows:
            yield from self._batch(spans, rows, size, length, sums, left)

    def _batch(self, spans, rows, size: int, length: int, sums: dict, left: dict) -> Iterator[tuple[int, float]]:
        """One network call over `rows`, repeated until there are `size`; gives the spans that it completes."""
        tokens, counts = np.zeros((size, length), np.int32), np.ones(size, np.int32)
        masked, real = np.zeros((2, size, length), bool)
        for row in range(size):
            index, mask, _ = rows[row % len(rows)]
            span = spans[index]
            end = len(span.tokens)
            tokens[row, :end], real[row, :end], counts[row] = span.tokens, True, len(mask)
            masked[row, span.start:end] = mask
        soft_mask = self.model.soft_mask if self.soft_mask is None else self.soft_mask
        with settled():
            found = masked_log_probs(self.model.denoiser, soft_mask, self.model.params, tokens, masked, real, counts)
        for (index, _, weight), value in zip(rows, np.asarray(found, np.float64).tolist()):
            if not math.isfinite(value):
                raise ValueError(f"{FAILED}: there is no likelihood; check the checkpoint.")
            sums[index] += weight * value
            left[index] -= 1
            if not left[index]:
                yield index, sums[index]
