"""MDLM's sampler and ReMDM's, with soft-masking, one compiled loop (arXiv 2406.07524, section 4; arXiv 2503.00307).

From t = 1 down the grid each mask takes a token drawn from the prediction or stays, and tokens may be masked again (see
`transitions`). A step's prediction is fed back into the next step's masks, one-hot for a token just masked again."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import noise as diffusion, two_pass
from softmask_jax.diffusion.soft_masking import Feedback, SoftMask, one_hot_feedback, schedule_factor
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.diffusion.vocab.draw import gumbel as gumbel_law
from softmask_jax.samplers import transitions
from softmask_jax.samplers.algorithms import check_steps
from softmask_jax.samplers.canvas import (
    BoolB, BoolBL, Canvas, FloatB, FloatBL, FloatBLD, FloatTBLV, Int, IntB, IntBL, KeysB, check_keys,
)
from softmask_jax.samplers.constraints import Constraints
from softmask_jax.samplers.result import Generated, Trace, candidates, empty_trace, record_step, record_trace

REUSE = ("exact", "compat", "never")
# Streams of keyed noise beside the draws' own: the mask's Gumbel noise, and that of tokens that may be masked again.
MASK, TOKEN = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)


class _Carry(NamedTuple):
    """State of the loop; fields without a comment are as in `Generated`."""

    tokens: IntBL  # x_t
    hidden: FloatBLD  # of the last network call
    feedback: Feedback  # of the prediction before
    known: BoolB  # rows whose `hidden` is that of their tokens
    scale: FloatB  # the factor on lambda that `hidden` was computed with
    confidence: FloatBL  # the probability that a token was drawn with
    calls: IntB  # its row_calls
    finite: BoolB
    history: jax.Array | None
    trace: Trace | None


@dataclasses.dataclass(frozen=True)
class MDLMSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None, gumbel=None) -> Generated`; pure, jit it with the
    sampler closed over. ValueError for invalid options."""

    denoiser: object  # a `models.Denoiser`
    soft_mask: SoftMask = SoftMask()  # settings of the feedback; its schedule follows the share of a row's masks left
    steps: int = 128  # of the time grid, before a last arg-max pass
    transition: object = transitions.Mdlm()  # how a step moves tokens
    temperature: float = 1.0  # this and the next one: of the draws; the feedback stays unfiltered
    nucleus_p: float = 1.0
    eps: float = 1e-5  # where the time grid ends
    # use the last prediction again instead of a network call: `exact` where a row's input is the same or has no mask;
    # `compat`, as the reference, when no token of the batch changed, even if soft-masking changes the input; or `never`
    reuse: str = "exact"
    constraints: Constraints = Constraints()  # tokens that are not drawn
    history: bool = False  # keep the tokens of every step, the last pass included
    trace: bool = False  # keep the `Trace` of every step

    def __post_init__(self):
        if self.reuse not in REUSE:
            raise ValueError(f"reuse is '{self.reuse}'; choose one of {', '.join(REUSE)}.")
        check_steps(self.steps)
        if not (0 < self.nucleus_p <= 1 and 0 < self.eps < 1):
            raise ValueError(f"nucleus_p ({self.nucleus_p}) must be in (0, 1] and eps ({self.eps}) in (0, 1).")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {self.temperature}.")

    @property
    def reads(self) -> int:
        """How many candidates of a prediction are kept."""
        return max(candidates(self.soft_mask, self.trace), 1)

    def most_calls(self, length: int) -> int:
        """The most network calls there can be: the length of the history and the trace."""
        return self.steps + 1

    def __call__(self, params: dict, keys: KeysB, tokens: IntBL, attention_mask: IntBL | None = None,
                 gumbel: FloatTBLV | None = None) -> Generated:
        """Fill the masks of `tokens`; arguments as of `DreamSampler.__call__`. gumbel: recorded noise instead of `keys`
        (`recorded_gumbel`), to replay a reference exactly."""
        shape = (self.steps, *tokens.shape, self.denoiser.vocab_size)
        if gumbel is not None and gumbel.shape != shape:
            raise ValueError(f"Recorded noise must have the shape [steps B L V] = {shape}, not {gumbel.shape}.")
        check_keys(keys, tokens)
        canvas = Canvas.of(tokens, attention_mask, self.denoiser.mask_token_id)
        params = {**params, "backbone": self.denoiser.prepared(params["backbone"])}
        head = self.denoiser.head(params["backbone"])
        # A network that may predict the mask (Dream's) must not: here only the schedule leaves masks.
        never = () if head.suppress_mask else (head.mask_token_id,)
        constraints = dataclasses.replace(self.constraints, forbidden=(*self.constraints.forbidden, *never))
        bias = constraints.bias(head, self.denoiser.used_vocab)
        rates = self.transition(diffusion.sampling_times(self.steps, self.eps)[:-1], (1.0 - self.eps) / self.steps)

        def sample_step(carry: _Carry, inputs):
            index, rates, noise = inputs
            carry, called = self._call_network(params, canvas, carry, index)
            masked = canvas.masks(carry.tokens)
            row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            draw = vocab_head.Draw(row_keys if noise is None else None, noise, self.nucleus_p, self.temperature, bias)
            sweep = vocab_head.sweep(carry.hidden, head, k=self.reads, draw=draw, where=masked,
                                     positions=canvas.positions)
            tokens, confidence = self._move(canvas, carry, rates, sweep, masked, row_keys, noise)
            same = (carry.tokens == tokens).all(-1)
            known = {"never": jnp.zeros_like(same), "exact": same, "compat": jnp.full_like(same, same.all())}
            return carry._replace(
                tokens=tokens, feedback=self._feed_back(carry, sweep, masked), known=known[self.reuse],
                confidence=confidence, finite=carry.finite & _finite(sweep, masked),
                history=record_step(carry.history, index, tokens),
                trace=record_trace(carry, self, params, index, carry.scale, sweep.neg_entropy, masked, called),
            ), called  # fmt: skip

        end, called = jax.lax.scan(sample_step, self._start(params, canvas), (jnp.arange(self.steps), rates, gumbel))
        end, last_called = self._call_network(params, canvas, end, self.steps, last=True)
        masked = canvas.masks(end.tokens)
        plain = allowed = vocab_head.sweep(end.hidden, head, k=1, where=masked)
        if bias is not None:
            biased = dataclasses.replace(head, bias=bias if head.bias is None else head.bias + bias)
            allowed = vocab_head.sweep(end.hidden, biased, k=1, where=masked)
        tokens = jnp.where(masked, allowed.token_ids[..., 0], end.tokens)
        return Generated(
            tokens, record_step(end.history, self.steps, tokens), steps=jnp.asarray(self.steps + 1),
            calls=called.sum(dtype=jnp.int32) + last_called.astype(jnp.int32), row_calls=end.calls,
            positions=end.calls.astype(jnp.float32) * tokens.shape[1],
            filled=(canvas.fillable & ~canvas.masks(tokens)).sum(-1), finite=end.finite & _finite(plain, masked),
            trace=record_trace(end, self, params, self.steps, end.scale, plain.neg_entropy, masked, last_called),
        )  # fmt: skip

    def _start(self, params: dict, canvas: Canvas) -> _Carry:
        tokens, rows, steps = canvas.tokens, canvas.tokens.shape[:1], self.steps + 1
        empty = two_pass.empty_feedback(self.denoiser, self.soft_mask, params, tokens, self.reads)
        if self.soft_mask.variant == "full":
            empty = empty._replace(certain=jnp.full(tokens.shape, -1, jnp.int32))
        return _Carry(
            tokens, two_pass.empty_hidden(self.denoiser, params, tokens), empty, known=jnp.zeros(rows, bool),
            scale=jnp.zeros(rows), confidence=jnp.zeros(tokens.shape), calls=jnp.zeros(rows, jnp.int32),
            finite=jnp.ones(rows, bool), history=jnp.zeros((steps, *tokens.shape), jnp.int32) if self.history else None,
            trace=empty_trace(steps, tokens, self.reads) if self.trace else None,
        )  # fmt: skip

    def _call_network(self, params: dict, canvas: Canvas, carry: _Carry, index: Int | int, *,
                      last: bool = False) -> tuple[_Carry, jax.Array]:
        """The carry with `hidden` for its tokens, and whether the network was called for it."""
        masks = canvas.masks(carry.tokens).sum(-1)
        scale = jnp.where(index > 0, schedule_factor(self.soft_mask.schedule, masks, canvas.at_start), 0.0)
        needed = ~carry.known
        if self.reuse == "exact":
            # Feedback with lambda = 0 changes no input.
            same = (scale == 0) & (carry.scale == 0) if self.soft_mask.on else jnp.asarray(True)
            needed = (masks > 0) & ~(carry.known & same)
        elif last:
            needed = jnp.ones_like(needed)

        def network():
            x = two_pass.soft_embed(self.denoiser, self.soft_mask, params, carry.tokens, carry.feedback, scale)
            hidden = self.denoiser.trunk(params["backbone"], x, **canvas.layout)[0]
            return jnp.where(needed[:, None, None], hidden, carry.hidden)

        called = needed.any()
        hidden = jax.lax.cond(called, network, lambda: carry.hidden)
        return carry._replace(hidden=hidden, calls=carry.calls + needed.astype(jnp.int32), scale=scale), called

    def _move(self, canvas: Canvas, carry: _Carry, rates: transitions.Rates, sweep: vocab_head.Sweep, masked: BoolBL,
              row_keys: KeysB, noise: jax.Array | None) -> tuple[IntBL, FloatBL]:
        """(x_s, the confidence that its tokens were drawn with)."""
        free, mask_token_id = canvas.fillable & ~masked, canvas.mask_token_id
        if self.transition.by_confidence:
            rates = transitions.less_sure_first(rates, carry.confidence, free)
        if noise is None:
            of_mask, of_token = (diffusion.keyed_noise(gumbel_law, row_keys, canvas.positions, stream=stream)
                                 for stream in (MASK, TOKEN))
        else:
            of_mask = noise[..., mask_token_id]
            of_token = jnp.take_along_axis(noise, carry.tokens[..., None], -1)[..., 0]
        tokens = transitions.move(rates, carry.tokens, masked, free, sweep.drawn, sweep.drawn_score, of_mask, of_token,
                                  mask_token_id=mask_token_id)
        new = masked & (tokens != mask_token_id)
        return tokens, jnp.where(new, jnp.exp(sweep.drawn_log_p), carry.confidence)

    def _feed_back(self, carry: _Carry, sweep: vocab_head.Sweep, masked: BoolBL) -> Feedback:
        """The prediction at masks, one-hot at known tokens."""
        predicted = Feedback(sweep.token_ids, sweep.top_logits, sweep.neg_entropy)
        feedback = predicted.where(masked, one_hot_feedback(carry.tokens, self.reads))
        if self.soft_mask.variant == "full":
            feedback = feedback._replace(certain=jnp.where(masked, -1, carry.tokens))
        return feedback._replace(hidden=carry.hidden) if self.soft_mask.reads_hidden else feedback


def _finite(sweep: vocab_head.Sweep, masked: BoolBL) -> BoolB:
    return (jnp.isfinite(sweep.logsumexp + sweep.neg_entropy) | ~masked).all(-1)


def recorded_gumbel(uniform: np.ndarray) -> np.ndarray:
    """Recorded uniforms to the Gumbel noise that the reference makes of them (`sample_categorical`), in float64."""
    uniform = np.asarray(uniform, np.float64)
    return -np.log(1e-10 - np.log(uniform + 1e-10))
