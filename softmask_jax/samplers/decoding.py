"""The loop of `DreamSampler` and `BlockSampler`: network calls predict masks, and each step commits some of them."""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.noise import keyed_noise
from softmask_jax.diffusion.soft_masking import Feedback, schedule_factor
from softmask_jax.diffusion.vocab.draw import Draw, gumbel
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.models.nn.cache import Window
from softmask_jax.samplers import commit, dream_draw, guidance
from softmask_jax.samplers.canvas import BoolB, BoolBL, Canvas, FloatBL, FloatBLD, Int, IntB, IntBL, KeysB
from softmask_jax.samplers.draws import Draws
from softmask_jax.samplers.result import Generated, Trace, empty_trace, fill_history, record_step, record_trace

# Streams of keyed noise beside the tokens' own: for committing by a coin, and for ordering the positions.
COIN, ORDER = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)


class Carry(NamedTuple):
    """State of the loop; fields without a comment are as in `Generated`."""

    step: Int  # network calls so far
    tokens: IntBL  # as they stand
    # the last prediction of every mask, with guidance [2B ...]; None where nothing is fed back
    feedback: Feedback | None
    known: BoolBL  # where `feedback` is of a prediction
    finished: BoolB  # rows that came to an end token
    stuck: BoolB  # rows whose every prediction in this block was the mask
    calls: IntB  # its row_calls
    positions: jax.Array
    filled: IntB
    finite: BoolB
    history: jax.Array | None
    trace: Trace | None


class Block(NamedTuple):
    """Positions begin..end-1 that are decoded together."""

    begin: Int | int
    end: Int | int
    at_start: IntB  # masks before the first step


class Call(NamedTuple):
    """One network call, which may compute a slice of the sequence."""

    computed: jax.Array  # [L] bool, the positions that it predicts
    size: Int | int  # positions that the call took
    # (where [B L], with guidance [2B L]) -> what is drawn [B L ...], what is fed back, and hidden states [B L D], None
    # unless the feedback reads them; the last two of as many rows as `where`; valid at `where`, within `computed`
    predict: Callable[[BoolBL], tuple[dream_draw.Predicted, dream_draw.Predicted, FloatBLD | None]]


class Decoding(NamedTuple):
    """One call of a sampler: all that stays the same from step to step."""

    sampler: object  # a `DreamSampler` or `BlockSampler`
    canvas: Canvas  # the tokens at the start
    params: dict  # {"backbone", "soft_mask"}
    keys: KeysB | None  # one a row, or None
    draws: Draws  # recorded random numbers
    rule: Callable  # how many tokens a step commits, see `commit`
    max_steps: int  # the most steps of a block
    head: Head  # the output layer
    bias: jax.Array | None  # [Vpad] on the logits of the draw, or None

    @property
    def length(self) -> int:
        return self.canvas.tokens.shape[1]

    @property
    def guided(self) -> bool:
        return self.sampler.cfg_scale > 0

    def rows(self, x: jax.Array) -> jax.Array:
        """x [B ...] for every row of a network call."""
        return guidance.twice(x) if self.guided else x

    def inputs(self, tokens: IntBL) -> IntBL:
        """The tokens of a network call."""
        return guidance.both(self.canvas, tokens) if self.guided else tokens

    @property
    def layout(self) -> dict:
        return jax.tree.map(self.rows, self.canvas.layout)

    def start(self, steps: int) -> Carry:
        """The state before the first of at most `steps` calls."""
        sampler, tokens = self.sampler, self.canvas.tokens
        rows, no_row, zero = len(tokens), jnp.zeros(len(tokens), bool), jnp.zeros(len(tokens), jnp.int32)
        empty = None
        if sampler.soft_mask.on or sampler.trace:
            k = max(sampler.reads, 1)
            empty = two_pass.empty_feedback(sampler.denoiser, sampler.soft_mask, self.params, self.rows(tokens), k)
        known = self.rows(jnp.zeros(tokens.shape, bool))
        return Carry(
            step=jnp.int32(0), tokens=tokens, feedback=empty, known=known, finished=no_row,
            stuck=no_row, calls=zero, positions=jnp.zeros(rows, jnp.float32), filled=zero, finite=~no_row,
            history=jnp.zeros((steps, *tokens.shape), jnp.int32) if sampler.history else None,
            trace=empty_trace(steps, tokens, sampler.reads) if sampler.trace else None,
        )  # fmt: skip

    def result(self, carry: Carry) -> Generated:
        tokens = self.finish_rows(carry, 0, fill=True).tokens
        history = fill_history(carry.history, carry.step, carry.tokens)
        return Generated(tokens, history, carry.step, carry.step, carry.calls, carry.positions, carry.filled,
                         carry.finite, carry.trace)

    def to_fill(self, carry: Carry, begin: Int | int, end: Int | int) -> BoolBL:
        """Masks at positions begin..end-1 of rows that still work on them."""
        position = jnp.arange(self.length)
        inside = (position >= begin) & (position < end)
        return self.canvas.masks(carry.tokens) & inside & ~(carry.finished | carry.stuck)[:, None]

    def block(self, carry: Carry, begin: Int | int, end: Int | int) -> Block:
        return Block(begin, end, self.to_fill(carry, begin, end).sum(-1))

    def fill(self, carry: Carry, block: Block, call: Callable[[Carry], Call], first_step: int = 0) -> Carry:
        """Steps until every row has filled the block or is stuck in it."""
        def cond_fn(state):
            index, carry = state
            wanted = self.to_fill(carry, block.begin, block.end).any() | (index < self.sampler.least_steps(self.length))
            return (index < self.max_steps) & wanted

        def body_fn(state):
            index, carry = state
            return index + 1, self.sample_step(carry, index, block, call(carry))

        return lax.while_loop(cond_fn, body_fn, (jnp.int32(first_step), carry))[1]

    def full_call(self, carry: Carry, hidden: FloatBLD | None = None) -> Call:
        """The call of the whole sequence; hidden: its last states, if it was made."""
        hidden = self.network(carry)[0] if hidden is None else hidden
        return Call(jnp.ones(self.length, bool), self.length, partial(self.predict, carry, hidden))

    def predict(self, carry: Carry, hidden: FloatBLD, where: BoolBL, start: Int | None = None):
        """`Call.predict` of hidden states [B S D] from position `start` on, or of all positions."""
        sampler, size = self.sampler, hidden.shape[1]

        def cut(x):
            return x if start is None or x is None else lax.dynamic_slice_in_dim(x, start, size, 1)

        def put(x, fill=0):
            if start is None:
                return x
            whole = jnp.full((x.shape[0], self.length, *x.shape[2:]), fill, x.dtype)
            return lax.dynamic_update_slice_in_dim(whole, x, start, 1)

        recorded = self.recorded("gumbel", carry)
        draw = Draw(self.row_keys(carry) if recorded is None else None, cut(recorded), bias=self.bias)
        drawn_from = guidance.combined(hidden, sampler.cfg_scale) if self.guided else hidden
        new = dream_draw.predict(
            drawn_from, self.head, cut(where[: len(carry.tokens)]), sampler.filters, draw=draw,
            k=0 if self.guided else sampler.reads, positions=cut(self.canvas.positions),
            suppress_mask=sampler.suppress_mask or sampler.never_masks,
        )  # fmt: skip
        plain = new
        if self.guided and sampler.reads:
            plain = dream_draw.predict(hidden, self.head, cut(where), dream_draw.Filters(), k=sampler.reads)
        whole, finite = jax.tree.map(put, (new, plain)), put(new.finite, True)
        hidden = put(hidden) if sampler.soft_mask.reads_hidden else None
        return whole[0]._replace(finite=finite), whole[1], hidden

    def network(self, carry: Carry, cache: Window | bool | None = None, size: int | None = None):
        """Hidden states and cache of the whole sequence, or of a window's `size` positions."""
        sampler = self.sampler

        def cut(x):
            return x if size is None else lax.dynamic_slice_in_dim(x, cache.start, size, 1)

        tokens, feedback, scale = jax.tree.map(cut, (self.inputs(carry.tokens), carry.feedback, self.scale(carry)))
        x = two_pass.soft_embed(sampler.denoiser, sampler.soft_mask, self.params, tokens, feedback, scale)
        return sampler.denoiser.trunk(self.params["backbone"], x, cache=cache, **jax.tree.map(cut, self.layout))

    def scale(self, carry: Carry) -> FloatBL:
        """The schedule's factor on lambda, 0 where nothing was predicted yet."""
        masks = self.canvas.masks(carry.tokens).sum(-1)
        factor = schedule_factor(self.sampler.soft_mask.schedule, masks, self.canvas.at_start)
        return jnp.where(carry.known, self.rows(factor)[:, None], 0.0)

    def sample_step(self, carry: Carry, index: Int, block: Block, call: Call) -> Carry:
        """Predict masks of a block and commit some; index: of the step in its block."""
        sampler, masks = self.sampler, self.to_fill(carry, block.begin, block.end)
        active, candidates, only_first = masks.any(-1), masks, False
        if sampler.as_llada:
            # Every row takes part in every call, and masks that an earlier block or the prompt left compete again.
            active, candidates = ~carry.finished, self.to_fill(carry, 0, block.end) & call.computed
        if sampler.full_call == "first" and not (sampler.grid and self.max_steps == 1):
            only_first = index == 0
            candidates = masks & (~only_first | (jnp.cumsum(masks, -1) == 1))
        reach = call.computed & (jnp.arange(self.length) >= block.begin)
        predicted, waiting = candidates, reach & active[:, None]
        if sampler.soft_mask.on:
            predicted = candidates | (self.canvas.masks(carry.tokens) & waiting)
        if self.guided:
            waiting = call.computed & active[:, None]
            predicted = jnp.concatenate([predicted, guidance.masks(self.canvas, carry.tokens) & waiting])
        new, plain, hidden = call.predict(predicted)
        if not sampler.grid:
            # A drawn mask changes nothing: only a grid counts it, elsewhere it must not displace a token.
            candidates &= new.drawn != self.canvas.mask_token_id
        chosen = self.choose(carry, index, block, candidates, new.confidence, masks.sum(-1), only_first)
        tokens = jnp.where(chosen, new.drawn, carry.tokens)
        filled, stuck = (tokens != carry.tokens).sum(-1), carry.stuck
        if not sampler.grid:
            stuck |= active & (filled == 0) & jnp.logical_not(only_first)
        carry = Carry(
            step=carry.step + 1, tokens=tokens, feedback=self.feed_back(carry.feedback, plain, hidden, predicted),
            known=carry.known | predicted, finished=carry.finished, stuck=stuck, calls=carry.calls + active,
            positions=carry.positions + jnp.where(active, call.size, 0), filled=carry.filled + filled,
            finite=carry.finite & new.finite.all(-1), history=record_step(carry.history, carry.step, tokens),
            trace=self.traced(carry, reach, plain, predicted),
        )  # fmt: skip
        if not sampler.by_blocks:
            return self.finish_rows(carry, 0, fill=False)
        # A stuck row waits for none of the block's masks.
        return self.finish_rows(carry, jnp.where(stuck, block.end, block.begin), fill=True)

    def traced(self, carry: Carry, reach: BoolBL, plain: dream_draw.Predicted, predicted: BoolBL) -> Trace | None:
        """The trace with a step from the state `carry` on; with guidance that of the conditional half."""
        if carry.trace is None:
            return None
        rows = len(carry.tokens)
        own = carry._replace(feedback=jax.tree.map(lambda x: x[:rows], carry.feedback))
        scale, neg_entropy = jnp.where(reach, self.scale(carry)[:rows], 0.0), plain.neg_entropy[:rows]
        return record_trace(own, self.sampler, self.params, carry.step, scale, neg_entropy, predicted[:rows])

    def choose(self, carry: Carry, index: Int, block: Block, candidates: BoolBL, confidence: FloatBL, masks: IntB,
               only_first: Int | bool) -> BoolBL:
        """Which candidates a step commits; masks: how many masks are left."""
        if self.sampler.alg == "origin":
            share = commit.unmask_share(index, self.max_steps, self.sampler.eps)
            return candidates & (self.noise("coins", jax.random.uniform, COIN, carry) < share)
        if self.sampler.alg == "random":
            confidence = self.noise("coins", jax.random.uniform, COIN, carry)
        sorted_first = -jnp.sort(-commit.known(candidates, confidence), -1)
        count = jnp.where(only_first, 1, self.rule(sorted_first, masks, block.at_start, index))
        if self.sampler.alg_temp:
            # The largest of log-weight + Gumbel noise, in order, are draws without replacement.
            confidence = confidence / self.sampler.alg_temp + self.noise("order", gumbel, ORDER, carry)
        return commit.surest(candidates, confidence, count)

    def row_keys(self, carry: Carry) -> KeysB | None:
        return None if self.keys is None else jax.vmap(jax.random.fold_in)(self.keys, carry.calls)

    def recorded(self, name: str, carry: Carry) -> jax.Array | None:
        """The numbers of `Draws` for each row's next call."""
        numbers = getattr(self.draws, name)
        return None if numbers is None else numbers[carry.calls, jnp.arange(len(carry.calls))]

    def noise(self, name: str, law: Callable, stream: np.uint32, carry: Carry) -> FloatBL:
        """One number a position: recorded, or keyed."""
        recorded = self.recorded(name, carry)
        if recorded is not None:
            return recorded
        return keyed_noise(law, self.row_keys(carry), self.canvas.positions, stream=stream)

    def feed_back(self, old: Feedback | None, new: dream_draw.Predicted, hidden: FloatBLD | None, where: BoolBL):
        """The feedback with the new predictions in it; None where nothing is fed back."""
        if old is None:
            return None
        feedback = old if new.token_ids is None else Feedback(new.token_ids, new.top_logits, new.neg_entropy)
        if self.sampler.soft_mask.reads_hidden:
            feedback = feedback._replace(hidden=hidden)
        return feedback.where(where, old)

    def finish_rows(self, carry: Carry, begin: Int | IntB, *, fill: bool) -> Carry:
        """With stop_at_end, finish rows without a mask from `begin` to their first end token; fill: masks after it
        become it, in the history too."""
        if not self.sampler.stop_at_end:
            return carry
        masked, position = self.canvas.masks(carry.tokens), jnp.arange(self.length)
        ends = self.canvas.fillable & jnp.isin(carry.tokens, jnp.asarray(self.sampler.constraints.end_token_ids))
        end = jnp.argmax(ends, -1)[:, None]
        waiting = masked & (position >= jnp.expand_dims(begin, -1)) & (position < end)
        carry = carry._replace(finished=carry.finished | (ends.any(-1) & ~waiting.any(-1)))
        if not fill:
            return carry
        behind, end_token = masked & (position > end), jnp.take_along_axis(carry.tokens, end, 1)
        tokens = jnp.where(carry.finished[:, None] & behind, end_token, carry.tokens)
        return carry._replace(tokens=tokens, history=record_step(carry.history, carry.step - 1, tokens))
