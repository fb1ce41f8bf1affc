"""The loop of `BlockSampler`: blocks, the calls within one, and what a call does to the tokens."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.models.nn.cache import Window
from softmask_jax.samplers import commit, dream_draw, feedback as feeding
from softmask_jax.samplers.result import Trace, recorded

# A row's key is folded with a place for the token's draw; with this first for choosing the positions.
_ORDER = np.uint32(0xFFFFFFFE)


class Carry(NamedTuple):
    """step: [] calls so far. known: [B L] where `feedback` is of a prediction. finished: [B] rows that came to an end
    token. stuck: [B] rows whose every prediction in this block was the mask. The rest: see `Generated`."""

    step: jax.Array
    tokens: jax.Array
    feedback: soft_masking.Feedback | None
    known: jax.Array
    finished: jax.Array
    stuck: jax.Array
    calls: jax.Array
    positions: jax.Array
    filled: jax.Array
    finite: jax.Array
    history: jax.Array | None
    trace: Trace | None


class Run(NamedTuple):
    """What stays as it is from call to call.

    options: the `BlockSampler`. rule: see `commit`. most: calls that a block can take. fillable: [B L] masks at the
    start, at_start [B] how many. places: [B L] positions from a row's first token. layout: what the trunk is told of
    padding, or nothing. bias: [Vpad] on the logits of the draw, or None.
    """

    options: object
    rule: object
    most: int
    params: dict
    keys: jax.Array | None
    draws: object
    fillable: jax.Array
    at_start: jax.Array
    places: jax.Array
    layout: dict
    bias: jax.Array | None

    @property
    def at(self) -> jax.Array:
        return jnp.arange(self.fillable.shape[1])

    def masked(self, tokens: jax.Array) -> jax.Array:
        return (tokens == self.options.denoiser.mask_token_id) & self.fillable

    def to_fill(self, carry: Carry, begin, end) -> jax.Array:
        """The masks [B L] from position `begin` to before `end` that rows still work on."""
        inside = (self.at >= begin) & (self.at < end)
        return self.masked(carry.tokens) & inside & ~(carry.finished | carry.stuck)[:, None]

    def blocks(self, carry: Carry) -> Carry:
        """All blocks, from the left to the right."""
        options, length = self.options, self.fillable.shape[1]

        def block(state):
            after, carry = state
            # Blocks where no row has a mask are passed over.
            first = jnp.argmax(self.to_fill(carry, after, length).any(0)).astype(jnp.int32)
            begin = first - (first - options.prompt_length) % options.block_length
            return begin + options.block_length, self.block(carry, begin)

        def remains(state):
            return self.to_fill(state[1], state[0], length).any()

        return lax.while_loop(remains, block, (jnp.int32(options.prompt_length), carry))[1]

    def block(self, carry: Carry, begin: jax.Array) -> Carry:
        """One block: a full call, then steps until every row has filled or left it."""
        options, length, end = self.options, self.fillable.shape[1], begin + self.options.block_length
        at_start, everywhere = self.to_fill(carry, begin, end).sum(-1), jnp.ones(length, bool)

        def committed(carry, index, hidden, computed, size):
            masks, computed = self.to_fill(carry, begin, end), computed & (self.at >= begin)
            return self.ended(self.step(carry, index, masks, at_start, hidden, computed, size), begin, end)

        def loop(index, carry, call):
            def step(state):
                return state[0] + 1, committed(state[1], state[0], *call(state[1]))

            def going(state):
                return (state[0] < self.most) & self.to_fill(state[1], begin, end).any()

            carry = lax.while_loop(going, step, (jnp.int32(index), carry))[1]
            # What this block could not fill is left behind.
            return self.ended(carry._replace(stuck=jnp.zeros_like(carry.stuck)), end, end)

        if options.cache == "none":
            return loop(0, carry, lambda carry: (self.network(carry)[0], everywhere, length))
        whole, kept = self.network(carry, True)
        carry = committed(carry, jnp.int32(0), whole, everywhere, length)
        before = None if options.compat else lax.dynamic_index_in_dim(whole, begin, 1, keepdims=False)
        prefix, region = options.cache == "prefix", length - options.prompt_length
        sizes = slice_sizes(region, options.block_length) if prefix else [min(options.block_length, region)]
        # Where every slice begins exactly at its block, none of its positions needs the cached keys.
        exact = len(sizes) == 1 and region % sizes[0] == 0

        def sliced(size, carry):
            start = jnp.minimum(begin, length - size)
            window = Window(kept, start, None if exact else begin, self.layout.get("segment_ids"), before)
            hidden = self.network(carry, window, size)[0]
            return lax.dynamic_update_slice_in_dim(jnp.zeros_like(whole), hidden, start, 1)

        def call(carry):
            which = jnp.sum(jnp.asarray(sizes) < length - begin) if prefix else jnp.int32(0)
            hidden = lax.switch(which, [lambda carry, size=size: sliced(size, carry) for size in sizes], carry)
            return hidden, everywhere if prefix else self.at < end, jnp.asarray(sizes)[which]

        return loop(1, carry, call)

    def network(self, carry: Carry, cache: Window | bool | None = None, size: int | None = None):
        """Hidden states and cache of the whole sequence, or of a window's `size` positions."""
        options = self.options

        def cut(x):
            return x if size is None else lax.dynamic_slice_in_dim(x, cache.start, size, 1)

        given = feeding.read(options.soft_mask, carry.feedback)
        tokens, given, scale = jax.tree.map(cut, (carry.tokens, given, self.scale(carry)))
        x = two_pass.soft_embed(options.denoiser, options.soft_mask, self.params, tokens, given, scale)
        return options.denoiser.trunk(self.params["backbone"], x, cache=cache, **jax.tree.map(cut, self.layout))

    def scale(self, carry: Carry) -> jax.Array:
        """The factor on lambda [B L]: 0 where nothing was predicted yet."""
        left = self.masked(carry.tokens).sum(-1)
        return jnp.where(carry.known, self.options.soft_mask.scale(left, self.at_start)[:, None], 0.0)

    def step(self, carry: Carry, index, masks, at_start, hidden, computed, size) -> Carry:
        """What one call does.

        index: [] of the call in its block. masks: [B L] of the block; rows without any are left as they are. at_start:
        [B] how many there were. hidden: [B L D], right where `computed` [L] is true. size: [] positions that were
        computed.
        """
        options, mask = self.options, self.options.denoiser.mask_token_id
        active, grid = masks.any(-1), isinstance(self.rule, commit.Shares)
        drawing, first_only = masks, jnp.bool_(False)
        if options.full_call == "first" and not (grid and self.most == 1):
            first_only = index == 0
            drawing = masks & (~first_only | (jnp.cumsum(masks, -1) == 1))
        wanted = drawing
        if options.soft_mask.on:
            wanted = drawing | (self.masked(carry.tokens) & computed & active[:, None])
        found, noise = self.predict(carry, hidden, wanted)
        # A mask that is drawn changes nothing: but on a grid, which counts it, it must not take a token's place.
        chance = drawing if grid else drawing & (found.drawn != mask)
        left, sure = masks.sum(-1), commit.known(chance, found.confidence)
        count = jnp.where(first_only, 1, self.rule(-jnp.sort(-sure, -1), left, at_start, at_start - left, index))
        # The largest of log-weight + Gumbel noise, in order, are draws without replacement.
        order = found.confidence if noise is None else found.confidence / options.alg_temp + noise
        tokens = jnp.where(commit.surest(chance, order, count), found.drawn, carry.tokens)
        new = (tokens != carry.tokens).sum(-1)
        given = feeding.found(options.soft_mask, carry.feedback, found, hidden)
        if given is not None:
            given = jax.tree.map(lambda a, b: jnp.where(wanted if a.ndim == 2 else wanted[..., None], a, b), given,
                                 carry.feedback)
        return Carry(
            carry.step + 1, tokens, given, carry.known | wanted, carry.finished,
            carry.stuck if grid else carry.stuck | (active & ~first_only & (new == 0)), carry.calls + active,
            carry.positions + jnp.where(active, size, 0), carry.filled + new, carry.finite & found.finite.all(-1),
            recorded(carry.history, carry.step, tokens),
            feeding.traced(carry.trace, options.soft_mask, options.denoiser, self.params, carry.step, carry.tokens,
                           carry.feedback, jnp.where(computed, self.scale(carry), 0.0), found.neg_entropy, wanted),
        )  # fmt: skip

    def predict(self, carry: Carry, hidden, wanted) -> tuple[dream_draw.Predicted, jax.Array | None]:
        """What the wanted positions [B L] predict, and the noise [B L] for choosing among them."""
        options, rows = self.options, jnp.arange(len(wanted))
        gumbel, order = (x if x is None else x[carry.calls, rows] for x in (self.draws.gumbel, self.draws.order))
        keys = None if self.keys is None else jax.vmap(jax.random.fold_in)(self.keys, carry.calls)
        if options.alg_temp and order is None:
            def draw(key, places):
                key = jax.random.fold_in(key, _ORDER)
                return jax.vmap(lambda at: jax.random.gumbel(jax.random.fold_in(key, at), mode="high"))(places)

            order = jax.vmap(draw)(keys, self.places)
        found = dream_draw.predict(
            hidden, options.denoiser.head(self.params["backbone"]), wanted, options.filters,
            k=options.reads, keys=keys if gumbel is None else None, places=self.places, gumbel=gumbel, bias=self.bias,
            suppress_mask=options.suppress_mask,
        )  # fmt: skip
        return found, order if options.alg_temp else None

    def ended(self, carry: Carry, begin, end) -> Carry:
        """Finishes rows where nothing from `begin` on is to be filled before an end token; `end`: of the block."""
        if not self.options.stop_at_end:
            return carry
        stops = self.fillable & jnp.isin(carry.tokens, jnp.asarray(self.options.constraints.end_token_ids))
        stop = jnp.argmax(stops, -1)
        behind = self.at > stop[:, None]
        waiting = self.masked(carry.tokens) & (self.at >= begin) & ~behind & ~(carry.stuck[:, None] & (self.at < end))
        finished = carry.finished | (stops.any(-1) & ~waiting.any(-1))
        token = jnp.take_along_axis(carry.tokens, stop[:, None], 1)
        tokens = jnp.where(finished[:, None] & behind & self.masked(carry.tokens), token, carry.tokens)
        return carry._replace(tokens=tokens, finished=finished, history=recorded(carry.history, carry.step - 1, tokens))


def slice_sizes(region: int, block_length: int) -> list[int]:
    """The lengths of slices that are compiled with a cache of the prefix, shortest first: all blocks, half of them, ...

    One for each block would be exact, but the program would grow with them; these compute at most twice as much.
    """
    blocks = -(-region // block_length)
    counts = {-(-blocks // 2**halvings) for halvings in range(blocks.bit_length() + 1)}
    return sorted({min(count * block_length, region) for count in counts})
