"""Dream's sampler with soft-masking, one compiled loop (`diffusion_generate` of the Dream models, HKU NLP and Huawei).

From t = 1 down the grid every step predicts all masks and commits some: each by a coin (`origin`) or the most confident
ones. With soft-masking (arXiv 2510.17206) the first step reads plain masks, every later one the prediction before it.
`confidence_threshold` and `confidence_factor` commit whatever is sure enough (Fast-dLLM, arXiv 2505.22618).
The denoiser's hidden states are those of the position itself: Dream's shift by one belongs into its `trunk`.
"""
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers import commit, dream_draw, feedback
from softmask_jax.samplers.constraints import Constraints, ended
from softmask_jax.samplers.result import Generated, Trace, held, recorded

# How sure an algorithm is of a prediction; all but `origin` unmask the surest first.
ALGORITHMS = {
    "origin": "none", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy",
    "confidence_threshold": "probability", "confidence_factor": "probability",
}  # fmt: skip
# Row keys are folded with a place for the token's draw; with these first for choosing the positions.
_COIN, _ORDER = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)


class Draws(NamedTuple):
    """Recorded random numbers instead of keys, to replay a reference; None where nothing is drawn.

    coins: [T B L], uniform in [0, 1), of `origin`. gumbel: [T B L V], of the tokens. order: [T B L], Gumbel noise too,
    of alg_temp.
    """

    coins: jax.Array | None = None
    gumbel: jax.Array | None = None
    order: jax.Array | None = None

    def at(self, step: jax.Array) -> "Draws":
        return Draws(*(None if x is None else x[step] for x in self))

    def check(self, keys: jax.Array | None, steps: int, tokens: jax.Array, vocab_size: int, needed: set[str]) -> None:
        """ValueError unless shapes fit `steps` steps of tokens [B L], and keys [B] or numbers are there for what is
        `needed`."""
        shape = (steps, *tokens.shape)
        for name, wanted in zip(self._fields, (shape, (*shape, vocab_size), shape)):
            given = getattr(self, name)
            if given is not None and given.shape != wanted:
                raise ValueError(f"draws.{name} must have the shape {wanted}, not {given.shape}.")
            if given is None and name in needed and keys is None:
                raise ValueError(f"This sampler draws at random: pass keys [B], or draws.{name} {wanted}.")
        if keys is not None and keys.shape != tokens.shape[:1]:
            raise ValueError(f"keys must be [B] = {tokens.shape[:1]} typed keys, one a row, not {keys.shape}.")


class _Carry(NamedTuple):
    """stuck: [B] rows whose every prediction was the mask, see `DreamSampler`."""

    index: jax.Array
    tokens: jax.Array
    stuck: jax.Array
    given: soft_masking.Feedback | None
    row_calls: jax.Array
    finite: jax.Array
    history: jax.Array | None
    trace: Trace | None


@dataclasses.dataclass(frozen=True)
class DreamSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None) -> Generated`; pure, jit it with the sampler closed
    over.

    alg: a name from `ALGORITHMS`. temperature, top_p, top_k: see `dream_draw.Filters`; the reference that does not say
    top_k gets its library's 50, which its arg-max runs feel in their confidences, so that is the default here too: None
    turns it off. alg_temp: above 0, positions are drawn without replacement from softmax(confidence / alg_temp) instead
    of the surest first (`origin` has no use for it). steps: of Dream's time grid; `confidence_threshold` spreads its
    tokens over as many steps at least, or with None over none. threshold, factor: of the algorithms named after them;
    tokens_per_step: as many a step instead of the grid's share. suppress_mask: never predict the mask; by default, as in
    the reference, a prediction may be the mask, and what is still one after the last step stays one: on the grid it
    counts as committed, else the step passes it over, and a row with nothing else is done. stop_at_end: a row
    is finished once an end token of `constraints` stands before its first mask; its other masks become that token.
    history, trace: keep every step. ValueError for options that make no sense.
    """

    denoiser: object
    soft_mask: SoftMask = SoftMask()
    steps: int | None = 512
    alg: str = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = 50
    alg_temp: float | None = None
    eps: float = 1e-3
    threshold: float = 0.9
    factor: float = 1.0
    tokens_per_step: int | None = None
    suppress_mask: bool = False
    stop_at_end: bool = False
    constraints: Constraints = Constraints()
    history: bool = True
    trace: bool = False

    def __post_init__(self):
        if self.alg not in ALGORITHMS:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(ALGORITHMS)}.")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise ValueError(f"alg_temp must be finite and 0 or above, or None, not {self.alg_temp}.")
        if self.stop_at_end and not self.constraints.end_token_ids:
            raise ValueError("stop_at_end needs to know which tokens end a text: constraints.end_token_ids.")
        if self.tokens_per_step is not None and self.alg in ("origin", "confidence_threshold", "confidence_factor"):
            raise ValueError(f"alg '{self.alg}' decides itself how many tokens a step commits; leave tokens_per_step out.")
        _ = self.filters, self.rule

    @property
    def filters(self) -> dream_draw.Filters:
        return dream_draw.Filters(self.temperature, self.top_p, self.top_k, ALGORITHMS[self.alg])

    @property
    def rule(self):
        """How many tokens a step commits, see `commit`."""
        if self.alg == "confidence_threshold":
            return commit.Threshold(self.threshold, self.steps)
        if self.alg == "confidence_factor":
            return commit.Factor(self.factor)
        if self.tokens_per_step is not None:
            return commit.Number(self.tokens_per_step)
        if self.steps is None:
            raise ValueError(f"alg '{self.alg}' needs a number of steps.")
        return commit.Shares(self.steps, self.eps)

    def most_steps(self, length: int) -> int:
        """T, the steps that rows of this length may take: others than the grid's commit a token each at least."""
        return self.steps if isinstance(self.rule, commit.Shares) else length

    def __call__(self, params: dict, keys: jax.Array | None, tokens: jax.Array, attention_mask: jax.Array | None = None,
                 draws: Draws | None = None) -> Generated:
        """Fill the masks of `tokens`.

        Args:
          params: {"backbone", "soft_mask"}; the raw scalars are read only with soft-masking.
          keys: [B] one key per row: a row's text depends neither on the rows beside it nor on its padding.
          tokens: [B L] ids, the mask where text is wanted.
          attention_mask: [B L] 1 for tokens and 0 for padding; positions count from the first token, and a pad is
            neither seen nor filled.
          draws: recorded random numbers, used instead of `keys` where given.
        """
        self._check(keys, tokens, attention_mask, draws)
        tokens, draws = jnp.asarray(tokens, jnp.int32), draws or Draws()
        attended = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        places = jnp.where(attended, jnp.cumsum(attended, -1) - 1, 1)
        layout = {} if attention_mask is None else {"positions": places, "segment_ids": attended.astype(jnp.int32)}
        wanted = (tokens == self.denoiser.mask_token_id) & attended
        at_start, most = wanted.sum(-1), self.most_steps(tokens.shape[1])
        head = self.denoiser.head(params["backbone"])
        bias = self.constraints.bias(head)

        def step(carry: _Carry) -> _Carry:
            masked = self._masked(carry, wanted)
            masks = masked.sum(-1)
            scale = jnp.where(carry.index > 0, self.soft_mask.scale(masks, at_start), 0.0)
            hidden = self._network(params, carry, scale, layout)
            here = draws.at(carry.index)
            row_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, carry.index))(keys)
            found = dream_draw.predict(
                hidden, head, masked, self.filters, k=self._read, places=places, gumbel=here.gumbel, bias=bias,
                keys=row_keys if here.gumbel is None else None, suppress_mask=self.suppress_mask,
            )  # fmt: skip
            grid = isinstance(self.rule, commit.Shares)
            chance = masked if grid else masked & (found.drawn != self.denoiser.mask_token_id)
            chosen = self._chosen(chance, found.confidence, at_start, masks, carry.index, row_keys, places, here)
            after = jnp.where(chosen, found.drawn, carry.tokens)
            stuck = carry.stuck if grid else carry.stuck | ((masks > 0) & ~chosen.any(-1))
            return _Carry(
                carry.index + 1, after, stuck, feedback.found(self.soft_mask, carry.given, found, hidden),
                carry.row_calls + (masks > 0), carry.finite & found.finite.all(-1),
                recorded(carry.history, carry.index, after),
                feedback.traced(carry.trace, self.soft_mask, self.denoiser, params, carry.index, carry.tokens, carry.given,
                                scale, found.neg_entropy, masked),
            )  # fmt: skip

        rows = tokens.shape[:1]
        start = _Carry(
            jnp.zeros((), jnp.int32), tokens, jnp.zeros(rows, bool), self._nothing_fed_back(params, tokens),
            jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), jnp.zeros((most, *tokens.shape), jnp.int32) if self.history else None,
            feedback.empty_trace(most, tokens, self._read) if self.trace else None,
        )  # fmt: skip
        end = jax.lax.while_loop(
            lambda carry: (carry.index < most) & self._masked(carry, wanted).any(), step, start
        )
        final = end.tokens
        if self.stop_at_end:
            final = ended(final, wanted, self.denoiser.mask_token_id, self.constraints.end_token_ids)[1]
        filled = (wanted & (end.tokens != self.denoiser.mask_token_id)).sum(-1)
        positions = end.row_calls.astype(jnp.float32) * tokens.shape[1]
        history = held(end.history, end.index, end.tokens)
        return Generated(final, history, end.index, end.index, end.row_calls, positions, filled, end.finite, end.trace)

    @property
    def _read(self) -> int:
        """How many candidates a step keeps."""
        return feedback.shown(self.soft_mask) if self.trace else self.soft_mask.reads

    def _masked(self, carry: _Carry, wanted):
        """The masks [B L] that are still to be filled."""
        tokens = carry.tokens
        masked = (tokens == self.denoiser.mask_token_id) & wanted & ~carry.stuck[:, None]
        if self.stop_at_end:
            stopped = ended(tokens, wanted, self.denoiser.mask_token_id, self.constraints.end_token_ids)[0]
            masked &= ~stopped[:, None]
        return masked

    def _nothing_fed_back(self, params, tokens) -> soft_masking.Feedback | None:
        if not (self.soft_mask.on or self.trace):
            return None
        soft_mask = dataclasses.replace(self.soft_mask, k=max(self._read, 1))
        return two_pass.empty_feedback(self.denoiser, soft_mask, params["backbone"], tokens)

    def _network(self, params, carry: _Carry, scale, layout):
        given = feedback.read(self.soft_mask, carry.given)
        x = two_pass.soft_embed(self.denoiser, self.soft_mask, params, carry.tokens, given, scale)
        return self.denoiser.trunk(params["backbone"], x, **layout)[0]

    def _chosen(self, chance, confidence, at_start, masks, step, row_keys, places, draws: Draws):
        """Which of `chance` [B L] this step commits; masks: [B] those that are left."""
        if self.alg == "origin":
            coins, share = draws.coins, jnp.asarray(commit.unmask_shares(self.steps, self.eps))[step]
            return chance & ((_noise(jax.random.uniform, row_keys, _COIN, places) if coins is None else coins) < share)
        order = confidence
        if self.alg_temp:
            # The largest of log-weight + Gumbel noise, in order, are draws without replacement.
            noise = _noise(_gumbel, row_keys, _ORDER, places) if draws.order is None else draws.order
            order = confidence / self.alg_temp + noise
        sorted_first = -jnp.sort(-commit.known(chance, confidence), -1)
        return commit.surest(chance, order, self.rule(sorted_first, masks, at_start, at_start - masks, step))

    def _check(self, keys, tokens, attention_mask, draws):
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B L], not {tokens.shape}.")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(f"attention_mask must be {tokens.shape} [B L] as the tokens, not {attention_mask.shape}.")
        needed = {"coins"} if self.alg == "origin" else {"order"} if self.alg_temp else set()
        needed |= {"gumbel"} if self.temperature > 0 else set()
        most = self.most_steps(tokens.shape[1])
        (draws or Draws()).check(keys, most, tokens, self.denoiser.vocab_size, needed)
        feedback.check_masks(tokens, attention_mask, self.denoiser.mask_token_id)


def _gumbel(key: jax.Array) -> jax.Array:
    return jax.random.gumbel(key, mode="high")


def _noise(law, row_keys: jax.Array, stream: np.uint32, places: jax.Array) -> jax.Array:
    """One number for each place [B L] of each row, a function of (row key, stream, place) alone."""
    def row(key, places):
        return jax.vmap(lambda at: law(jax.random.fold_in(jax.random.fold_in(key, stream), at)))(places)

    return jax.vmap(row)(row_keys, places)
