"""Decoding block by block, left to right, with a key/value cache (Fast-dLLM, arXiv 2505.22618); one compiled loop.

A full call at a block's start computes all positions, keeps their keys and values and commits the block's first token
(of LLaDA's algorithms, as many as any step).
Later steps compute only a slice, the block (`dual`) or everything from its start on (`prefix`), and reuse the rest.
Unlike the reference it is soft-masked (arXiv 2510.17206): a mask carries its last prediction."""
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax

from softmask_jax.models.nn.cache import Cache, Window
from softmask_jax.samplers import dream_draw
from softmask_jax.samplers.canvas import BoolBL, FloatBD, Int
from softmask_jax.samplers.decoding import Call, Carry, Decoding
from softmask_jax.samplers.dream import DreamSampler, LLADA

CACHES = ("none", "prefix", "dual")


@dataclasses.dataclass(frozen=True)
class BlockSampler(DreamSampler):
    """`DreamSampler` in blocks, each with a time grid of steps // blocks steps; draws are [most_calls(L) B L ...].

    stop_at_end also finishes a row when its block is done and only masks after an end token are left; they become that
    token at once, in the history too, uncounted and at no cost."""

    steps: int = 512
    alg: str = "confidence_threshold"
    prompt_length: int = 0  # where the first block begins; masks before it stay
    block_length: int = 32  # the last block may be shorter
    # a name from `CACHES`, None: `dual`, but `none` for LLaDA's; `none` computes every position at every call
    cache: str | None = None
    # commits the block's `first` token only, or by the `rule` of all steps; None: as the reference, `rule` for LLaDA's
    full_call: str | None = None
    # Repeat errors of the reference: of Dream's two, see `filters` and `Slices.predict`; of LLaDA's, see `as_llada`.
    compat: bool = False

    algorithms: ClassVar = (
        "confidence_threshold", "confidence_factor", "maskgit_plus", "topk_margin", "entropy", *LLADA,
    )  # fmt: skip
    by_blocks = True

    def __post_init__(self):
        own = {"full_call": "rule", "cache": "none"} if self.alg in LLADA else {"full_call": "first", "cache": "dual"}
        for name in own:
            if getattr(self, name) is None:
                object.__setattr__(self, name, own[name])
        for name, names in (("cache", CACHES), ("full_call", ("first", "rule"))):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(names)}.")
        if self.block_length < 1:
            raise ValueError(f"A block has at least 1 position, block_length cannot be {self.block_length}.")
        if self.prompt_length < 0:
            raise ValueError(f"prompt_length, where the first block begins, cannot be {self.prompt_length}.")
        super().__post_init__()

    @property
    def filters(self) -> dream_draw.Filters:
        """With compat time grids rank by entropy whatever `alg` says."""
        filters = super().filters
        if self.as_llada:
            # With a temperature the reference changes the confidence of the first end token no more.
            return dataclasses.replace(filters, unsure=filters.unsure[self.temperature > 0 :])
        return dataclasses.replace(filters, confidence="entropy") if self.compat and self.grid else filters

    @property
    def as_llada(self) -> bool:
        """Whether errors of LLaDA's `generate`, with a cache of Fast-dLLM's, are repeated.

        The mask may be predicted and then uses up the step's budget. Masks of the prompt, or left by earlier blocks,
        compete with the block's, whose number alone is divided over the steps: as many of it stay. Network calls go on
        without a mask, to the last of a block's steps, or with a cache to the second. Rows of the vocabulary that are
        no tokens may be drawn, and with a temperature `confidence_eos_eot_inf` leaves the first end token alone."""
        return self.compat and self.alg in LLADA

    def rule(self, blocks: int) -> Callable:
        if self.grid and self.steps < blocks:
            raise ValueError(f"{self.steps} steps are too few for {blocks} blocks: every block takes at least one.")
        if self.as_llada and self.grid and self.steps % blocks:
            raise ValueError(f"With compat, steps must be a multiple of the {blocks} blocks, not {self.steps}.")
        rule = super().rule(blocks)
        # Blocks need no further limit.
        return partial(rule, steps=None) if self.committing == "threshold" else rule

    def blocks(self, length: int) -> int:
        return -(-(length - self.prompt_length) // self.block_length)

    def max_steps(self, length: int) -> int:
        # Without a grid every step commits a token; only that of the full call may be the mask.
        if self.grid:
            return self.steps // self.blocks(length)
        return self.block_length + (self.full_call == "first" or self.least_steps(length) > 1)

    def least_steps(self, length: int) -> int:
        if not self.as_llada:
            return 0
        if self.cache != "none":
            return 2
        return self.max_steps(length) if self.grid else 1

    def decode(self, decoding: Decoding, carry: Carry) -> Carry:
        """All blocks, from left to right."""
        def to_fill(state):
            begin, carry = state
            # With `as_llada` every block has its calls.
            left = self.as_llada & (jnp.arange(decoding.length) >= begin)
            return decoding.to_fill(carry, begin, decoding.length) | left

        def body_fn(state):
            # Skip blocks without a mask in any row.
            first, carry = jnp.argmax(to_fill(state).any(0)).astype(jnp.int32), state[1]
            begin = first - (first - self.prompt_length) % self.block_length
            carry, end = self.decode_block(decoding, carry, begin), begin + self.block_length
            # Masks that this block could not fill stay.
            return end, decoding.finish_rows(carry._replace(stuck=jnp.zeros_like(carry.stuck)), end, fill=True)

        return lax.while_loop(lambda state: to_fill(state).any(), body_fn, (jnp.int32(self.prompt_length), carry))[1]

    def decode_block(self, decoding: Decoding, carry: Carry, begin: Int) -> Carry:
        """A full call, then steps until every row has filled or left the block."""
        block = decoding.block(carry, begin, begin + self.block_length)
        if self.cache == "none":
            return decoding.fill(carry, block, decoding.full_call)
        hidden, cache = decoding.network(carry, cache=True)
        carry = decoding.sample_step(carry, jnp.int32(0), block, decoding.full_call(carry, hidden))
        before = None if self.compat else lax.dynamic_index_in_dim(hidden, begin, 1, keepdims=False)
        return decoding.fill(carry, block, Slices(decoding, begin, before, cache), first_step=1)


class Slices(NamedTuple):
    """The network calls of the block from `begin` on, after the full one with this cache."""

    decoding: Decoding
    begin: Int
    before: FloatBD | None  # the full call's hidden state that predicts the first position; None: its slice's own
    cache: Cache

    @property
    def sizes(self) -> list[int]:
        sampler, region = self.decoding.sampler, self.decoding.length - self.decoding.sampler.prompt_length
        if sampler.cache == "prefix":
            return slice_sizes(region, sampler.block_length, every=sampler.as_llada)
        return [min(sampler.block_length, region)]

    def __call__(self, carry: Carry) -> Call:
        sampler, length, sizes = self.decoding.sampler, self.decoding.length, jnp.asarray(self.sizes)
        which, end = jnp.int32(0), self.begin + sampler.block_length
        if sampler.cache == "prefix":
            which, end = jnp.sum(sizes < length - self.begin), length

        def predict(where: BoolBL):
            return lax.switch(which, [partial(self.predict, size) for size in self.sizes], carry, where)

        position = jnp.arange(length)
        return Call((position >= self.begin) & (position < end), sizes[which], predict)

    def predict(self, size: int, carry: Carry, where: BoolBL):
        """`Call.predict` of the slice of `size` positions: network and vocabulary see no others."""
        sampler, length, sizes = self.decoding.sampler, self.decoding.length, self.sizes
        start = jnp.minimum(self.begin, length - size)
        # Where every slice begins at its block, none of its positions needs the cached keys.
        exact = len(sizes) == 1 and (length - sampler.prompt_length) % sizes[0] == 0
        segment_ids = self.decoding.layout.get("segment_ids")
        window = Window(self.cache, start, None if exact else self.begin, segment_ids, self.before)
        return self.decoding.predict(carry, self.decoding.network(carry, window, size)[0], where, start)


def slice_sizes(region: int, block_length: int, *, every: bool = False) -> list[int]:
    """Compiled slice lengths with a cache of the prefix, shortest first: all blocks, half of them, ...; at most twice
    the needed compute, without a program for each block, unless `every` number of blocks has its own."""
    blocks = -(-region // block_length)
    counts = {-(-blocks // 2**halvings) for halvings in range(blocks.bit_length() + 1)}
    counts = range(1, blocks + 1) if every else counts
    return sorted({min(count * block_length, region) for count in counts})
