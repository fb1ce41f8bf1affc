"""MDLM's sampler and ReMDM's, with soft-masking, one compiled loop (arXiv 2406.07524, section 4; arXiv 2503.00307).

From t = 1 down the grid, each masked position takes a token drawn from the prediction or stays masked; `transitions` say
how likely each is, and whether a token may be masked again. The prediction of a step is fed back into the next one's
masks; a token that was just masked again is remembered as a prediction that was certain of it.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import noise as diffusion, soft_masking, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.diffusion.vocab.head import Draw
from softmask_jax.samplers import feedback, transitions
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.result import Generated, Trace, recorded

REUSE = ("exact", "compat", "never")
# A row key's numbers beside the positions' own: the mask's Gumbel noise, and that of tokens that may be masked again.
_MASK, _OWN = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)


class _Carry(NamedTuple):
    """known: [B] the prediction of `hidden` is that of the row's input. confidence: [B L] of a token when it was drawn."""

    tokens: jax.Array
    hidden: jax.Array
    given: soft_masking.Feedback
    known: jax.Array
    scale: jax.Array
    confidence: jax.Array
    row_calls: jax.Array
    finite: jax.Array
    history: jax.Array | None
    trace: Trace | None


@dataclasses.dataclass(frozen=True)
class MDLMSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None, gumbel=None) -> Generated`; pure, jit it with the
    sampler closed over.

    soft_mask: settings; its schedule follows the share of a row's masks that are left. steps: of the grid, before a last
    arg-max pass. transition: see `transitions`. temperature, nucleus_p: of the draws; the feedback stays unfiltered.
    reuse: the prediction of the step before is used again, and a network call saved, "exact" where a row's input is the
    same, or nothing in it is masked; "compat" as the PyTorch reference: whenever no token of the whole batch changed,
    even if soft-masking would have changed the input, and never otherwise; "never". history, trace: keep every step, the
    last pass included. ValueError for options that make no sense.
    """

    denoiser: object
    soft_mask: SoftMask = SoftMask()
    steps: int = 128
    transition: object = transitions.Mdlm()
    temperature: float = 1.0
    nucleus_p: float = 1.0
    eps: float = 1e-5
    reuse: str = "exact"
    constraints: Constraints = Constraints()
    history: bool = False
    trace: bool = False

    def __post_init__(self):
        if self.reuse not in REUSE:
            raise ValueError(f"reuse is '{self.reuse}'; choose one of {', '.join(REUSE)}.")
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        if not (0 < self.nucleus_p <= 1 and 0 < self.eps < 1):
            raise ValueError(f"nucleus_p ({self.nucleus_p}) must be in (0, 1] and eps ({self.eps}) in (0, 1).")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {self.temperature}.")

    def __call__(self, params: dict, keys: jax.Array, tokens: jax.Array, attention_mask: jax.Array | None = None,
                 gumbel: jax.Array | None = None) -> Generated:
        """Fill the masks of `tokens`; what is not a mask is given and stays.

        Args:
          keys: [B] one key per row: a row's text depends neither on the rows beside it nor on its padding.
          tokens: [B L] ids, the mask where text is wanted.
          attention_mask: [B L] 1 for tokens and 0 for padding, which is neither seen nor filled; positions count from
            the first token.
          gumbel: [steps B L V] recorded noise instead of `keys` (`recorded_gumbel`), to replay a reference exactly.
        """
        self._check(keys, tokens, attention_mask, gumbel)
        tokens, steps, denoiser = jnp.asarray(tokens, jnp.int32), self.steps, self.denoiser
        attended = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        wanted = (tokens == denoiser.mask_token_id) & attended
        places = jnp.where(attended, jnp.cumsum(attended, -1) - 1, 1)
        layout = {} if attention_mask is None else {"positions": places, "segment_ids": attended.astype(jnp.int32)}
        head = denoiser.head(params["backbone"])
        # Where a network may predict the mask, Dream's for one: here a mask is what the schedule leaves.
        never = () if head.suppress_mask else (head.mask_token_id,)
        bias = dataclasses.replace(self.constraints, forbidden=(*self.constraints.forbidden, *never)).bias(head)
        rates = self.transition(diffusion.sampling_times(steps, self.eps)[:-1], (1.0 - self.eps) / steps)

        def step(carry: _Carry, given):
            index, rates, noise = given
            carry, called, before = self._predicted(params, carry, index, wanted, layout)
            masked = wanted & (carry.tokens == denoiser.mask_token_id)
            row_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            sweep = vocab_head.sweep(
                carry.hidden, head, k=max(self.soft_mask.reads, self._shown, 1), wanted=masked, places=places,
                draw=Draw(None if noise is not None else row_keys, noise, self.nucleus_p, self.temperature, bias),
            )  # fmt: skip
            after, confidence = self._moved(carry, rates, sweep, masked, wanted & ~masked, row_keys, places, noise)
            return self._fed_back(carry, sweep, masked, after)._replace(
                finite=carry.finite & _finite(sweep, masked), confidence=confidence,
                known=self._reusable(carry, after),
                history=recorded(carry.history, index, after),
                trace=self._traced(params, carry, index, called, before, sweep, masked),
            ), called  # fmt: skip

        end, called = jax.lax.scan(step, self._start(params, tokens, wanted), (jnp.arange(steps), rates, gumbel))
        end, last, before = self._predicted(params, end, steps, wanted, layout, last=True)
        masked = wanted & (end.tokens == denoiser.mask_token_id)
        plain = vocab_head.sweep(end.hidden, head, k=max(self._shown, 1), wanted=masked)
        allowed = head if bias is None else dataclasses.replace(head, bias=bias if head.bias is None else head.bias + bias)
        best = plain if bias is None else vocab_head.sweep(end.hidden, allowed, k=1, wanted=masked)
        final = jnp.where(masked, best.token_ids[..., 0], end.tokens)
        return Generated(
            final, recorded(end.history, steps, final), jnp.asarray(steps + 1),
            called.sum(dtype=jnp.int32) + last.astype(jnp.int32), end.row_calls,
            end.row_calls.astype(jnp.float32) * tokens.shape[1], (wanted & (final != denoiser.mask_token_id)).sum(-1),
            end.finite & _finite(plain, masked), self._traced(params, end, steps, last, before, plain, masked),
        )  # fmt: skip

    @property
    def _shown(self) -> int:
        return feedback.shown(self.soft_mask) if self.trace else 0

    def _start(self, params, tokens, wanted) -> _Carry:
        backbone, rows, keep = params["backbone"], tokens.shape[:1], (self.steps + 1, *tokens.shape)
        hidden = jax.eval_shape(lambda b: self.denoiser.trunk(b, self.denoiser.embed(b, tokens))[0], backbone)
        k = max(self.soft_mask.reads, self._shown, 1)
        empty = two_pass.empty_feedback(self.denoiser, dataclasses.replace(self.soft_mask, k=k), backbone, tokens)
        if self.soft_mask.variant == "full":
            empty = empty._replace(certain=jnp.full(tokens.shape, -1, jnp.int32))
        return _Carry(
            tokens, jnp.zeros(hidden.shape, hidden.dtype), empty, jnp.zeros(rows, bool), jnp.zeros(rows),
            jnp.zeros(tokens.shape), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool),
            jnp.zeros(keep, jnp.int32) if self.history else None,
            feedback.empty_trace(self.steps + 1, tokens, self._shown) if self.trace else None,
        )  # fmt: skip

    def _predicted(self, params, carry: _Carry, index, wanted, layout, *, last: bool = False):
        """(carry with `hidden` for its input, whether the network was called, the feedback that it read)."""
        masks = (wanted & (carry.tokens == self.denoiser.mask_token_id)).sum(-1)
        scale = jnp.where(index > 0, self.soft_mask.scale(masks, wanted.sum(-1)), 0.0)
        needed = ~carry.known
        if self.reuse == "exact":
            # Feedback that lambda = 0 shuts out changes no input.
            same = jnp.asarray(True) if not self.soft_mask.on else (scale == 0) & (carry.scale == 0)
            needed = (masks > 0) & ~(carry.known & same)
        elif last:
            needed = jnp.ones_like(needed)

        def network():
            given = feedback.read(self.soft_mask, carry.given)
            x = two_pass.soft_embed(self.denoiser, self.soft_mask, params, carry.tokens, given, scale)
            return jnp.where(needed[:, None, None], self.denoiser.trunk(params["backbone"], x, **layout)[0], carry.hidden)

        called = needed.any()
        hidden = jax.lax.cond(called, network, lambda: carry.hidden)
        calls = carry.row_calls + needed.astype(jnp.int32)
        return carry._replace(hidden=hidden, row_calls=calls, scale=scale), called, (carry.given, scale)

    def _moved(self, carry: _Carry, rates, sweep, masked, free, row_keys, places, noise):
        """(x_s, the confidence that its tokens were drawn with)."""
        if self.transition.by_confidence:
            rates = transitions.less_sure_first(rates, carry.confidence, free)
        if noise is None:
            mask_noise, own_noise = (_gumbel(row_keys, stream, places) for stream in (_MASK, _OWN))
        else:
            mask_noise = noise[..., self.denoiser.mask_token_id]
            own_noise = jnp.take_along_axis(noise, carry.tokens[..., None], -1)[..., 0]
        after = transitions.move(
            rates, carry.tokens, masked, free, sweep.drawn, sweep.drawn_score, mask_noise, own_noise,
            mask_token_id=self.denoiser.mask_token_id,
        )  # fmt: skip
        new = masked & (after != self.denoiser.mask_token_id)
        return after, jnp.where(new, jnp.exp(sweep.drawn_log_p), carry.confidence)

    def _fed_back(self, carry: _Carry, sweep, masked, after) -> _Carry:
        """What this step tells the next: its prediction, and where a token stood, that it was certain of it."""
        sure = soft_masking.one_hot_feedback(carry.tokens, carry.given.token_ids.shape[-1])
        found = (sweep.token_ids, sweep.top_logits, sweep.neg_entropy)
        given = soft_masking.Feedback(*(
            jnp.where(masked.reshape(masked.shape + (1,) * (new.ndim - 2)), new, old) for new, old in zip(found, sure)
        ))  # fmt: skip
        if self.soft_mask.variant == "full":
            given = given._replace(hidden=carry.hidden, certain=jnp.where(masked, -1, carry.tokens))
        return carry._replace(tokens=after, given=given)

    def _reusable(self, carry: _Carry, after) -> jax.Array:
        same = (carry.tokens == after).all(-1)
        return {"never": jnp.zeros_like(same), "exact": same, "compat": jnp.full_like(same, same.all())}[self.reuse]

    def _traced(self, params, carry: _Carry, index, called, before, sweep, masked):
        return feedback.traced(carry.trace, self.soft_mask, self.denoiser, params, index, carry.tokens, *before,
                               sweep.neg_entropy, masked, called=called)

    def _check(self, keys, tokens, attention_mask, gumbel):
        if tokens.ndim != 2 or (attention_mask is not None and attention_mask.shape != tokens.shape):
            mask = None if attention_mask is None else attention_mask.shape
            raise ValueError(f"tokens must be [B L] and attention_mask alike, not {tokens.shape} and {mask}.")
        wanted = (self.steps, *tokens.shape, self.denoiser.vocab_size)
        if gumbel is not None and gumbel.shape != wanted:
            raise ValueError(f"Recorded noise must have the shape [steps B L V] = {wanted}, not {gumbel.shape}.")
        if keys is None or keys.shape != tokens.shape[:1]:
            given = None if keys is None else keys.shape
            raise ValueError(f"keys must be [B] = {tokens.shape[:1]} typed keys, one a row, not {given}.")
        feedback.check_masks(tokens, attention_mask, self.denoiser.mask_token_id)


def _finite(sweep: vocab_head.Sweep, masked: jax.Array) -> jax.Array:
    return (jnp.isfinite(sweep.logsumexp + sweep.neg_entropy) | ~masked).all(-1)


def _gumbel(row_keys: jax.Array, stream: np.uint32, places: jax.Array) -> jax.Array:
    """[B L], a number for each of places [B L] that depends on (row key, stream, place) alone."""
    def place(key, at):
        return jax.random.gumbel(jax.random.fold_in(key, at), mode="high")

    return jax.vmap(lambda key, at: jax.vmap(place, (None, 0))(jax.random.fold_in(key, stream), at))(row_keys, places)


def recorded_gumbel(uniform: np.ndarray) -> np.ndarray:
    """Recorded uniforms to the Gumbel noise that the reference makes of them (`sample_categorical`), in float64."""
    uniform = np.asarray(uniform, np.float64)
    return -np.log(1e-10 - np.log(uniform + 1e-10))
