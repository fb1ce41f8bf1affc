"""Dream's sampler with soft-masking, one compiled loop (`diffusion_generate` of the Dream models, HKU NLP and Huawei).

From t = 1 down the grid every step predicts all masks and commits some: each by a coin (`origin`) or the most confident
ones. With soft-masking (arXiv 2510.17206) the first step reads plain masks, every later one the prediction before it.
The denoiser's hidden states are those of the position itself: Dream's shift by one belongs into its `trunk`.
"""
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import objective, soft_masking
from softmask_jax.samplers import dream_draw

# How sure an algorithm is of a prediction; all but `origin` unmask the surest first.
ALGORITHMS = {"origin": "none", "maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
# Row keys are folded with a place for the token's draw; with these first for choosing the positions.
_COIN, _ORDER = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFE)


@dataclasses.dataclass(frozen=True)
class SoftMasking:
    """variant, k: see `soft_masking.blend`. schedule: factor on lambda by the share of a row's masks that are left."""

    variant: str = "none"
    k: int = 1
    schedule: str = "none"

    def __post_init__(self):
        if self.variant not in soft_masking.VARIANTS:
            raise ValueError(f"variant is '{self.variant}'; choose one of {', '.join(soft_masking.VARIANTS)}.")
        if self.schedule not in soft_masking.SCHEDULES:
            raise ValueError(f"schedule is '{self.schedule}'; choose one of {', '.join(soft_masking.SCHEDULES)}.")
        if self.k < 1:
            raise ValueError(f"soft-masking feeds back at least 1 token, k cannot be {self.k}.")

    @property
    def reads(self) -> int:
        """How many of the largest logits the feedback needs; the full vocabulary is read from the hidden states."""
        return self.k if self.variant in ("topk", "slerp") else 0


class Draws(NamedTuple):
    """Recorded random numbers instead of keys, to replay a reference; None where nothing is drawn.

    coins: [steps B L], uniform in [0, 1), of `origin`. gumbel: [steps B L V], of the tokens. order: [steps B L], Gumbel
    noise too, of alg_temp.
    """

    coins: jax.Array | None = None
    gumbel: jax.Array | None = None
    order: jax.Array | None = None


class Generated(NamedTuple):
    """tokens: [B L] int32. history: [steps B L] after each step, or None. calls: [] int32, network calls: the steps,
    less where no mask was left. finite: [B] bool, False where a logit was NaN or infinite: such a row means nothing."""

    tokens: jax.Array
    history: jax.Array | None
    calls: jax.Array
    finite: jax.Array


class _Carry(NamedTuple):
    index: jax.Array
    tokens: jax.Array
    feedback: soft_masking.Feedback | None
    history: jax.Array | None
    finite: jax.Array


def unmask_shares(steps: int, eps: float = 1e-3) -> np.ndarray:
    """The share 1 - s / t of the masks that each step unmasks, 1 at the last: [steps] float32."""
    # On the host: an accelerator's division may be off by a bit, and the share decides whole tokens.
    times = np.linspace(1.0, eps, steps + 1).astype(np.float32)
    return np.append(np.float32(1) - times[1:-1] / times[:-2], np.float32(1)).astype(np.float32)


def surest(masked: jax.Array, confidence: jax.Array, share: jax.Array) -> jax.Array:
    """The int(masks * share) surest masks of each row: masked, confidence [B L] -> [B L] bool.

    The count is taken row by row; between equals the first position goes first.
    """
    count = (masked.sum(-1).astype(jnp.float32) * share).astype(jnp.int32)
    # NaN comes first in no order: a row of NaN is reported, but must not take what is not masked.
    confidence = jnp.where(masked, jnp.nan_to_num(confidence, nan=jnp.finfo(confidence.dtype).min), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-confidence, -1, stable=True), -1, stable=True)
    return masked & (rank < count[:, None])


@dataclasses.dataclass(frozen=True)
class DreamSampler:
    """`sampler(params, keys [B], tokens [B L], attention_mask=None) -> Generated`; pure, jit it with the sampler closed
    over.

    alg: a name from `ALGORITHMS`. temperature, top_p, top_k: see `dream_draw.Filters`; the reference that does not say
    top_k gets its library's 50, which its arg-max runs feel in their confidences, so that is the default here too: None
    turns it off. alg_temp: above 0, positions are drawn without replacement from softmax(confidence / alg_temp) instead
    of the surest first (`origin` has no use for it). suppress_mask: never predict the mask; by default, as in the
    reference, a prediction may be the mask, and what is still one after the last step stays one. history: keep the
    tokens after each step. ValueError for options that make no sense.
    """

    denoiser: object
    soft_mask: SoftMasking = SoftMasking()
    steps: int = 512
    alg: str = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = 50
    alg_temp: float | None = None
    eps: float = 1e-3
    suppress_mask: bool = False
    history: bool = True

    def __post_init__(self):
        if self.alg not in ALGORITHMS:
            raise ValueError(f"alg is '{self.alg}'; choose one of {', '.join(ALGORITHMS)}.")
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps, where the time grid ends, must be in (0, 1), not {self.eps}.")
        if self.alg_temp is not None and not 0 <= self.alg_temp < math.inf:
            raise ValueError(f"alg_temp must be finite and 0 or above, or None, not {self.alg_temp}.")
        _ = self.filters

    @property
    def filters(self) -> dream_draw.Filters:
        return dream_draw.Filters(self.temperature, self.top_p, self.top_k, ALGORITHMS[self.alg])

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
        shares = jnp.asarray(unmask_shares(self.steps, self.eps))
        at_start = self._masked(tokens, attended).sum(-1)
        feedback = None
        if self.soft_mask.variant != "none":
            feedback = objective.empty_feedback(self.denoiser, self.soft_mask, params["backbone"], tokens)

        def step(carry: _Carry) -> _Carry:
            masked = self._masked(carry.tokens, attended)
            ratio = masked.sum(-1) / jnp.maximum(at_start, 1)
            hidden = self._network(params, carry, ratio, layout)
            here = Draws(*(None if x is None else x[carry.index] for x in draws))
            row_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, carry.index))(keys)
            found = dream_draw.predict(
                hidden, self.denoiser.head(params["backbone"]), masked, self.filters, k=self.soft_mask.reads,
                keys=row_keys if here.gumbel is None else None, places=places, gumbel=here.gumbel,
                suppress_mask=self.suppress_mask,
            )  # fmt: skip
            chosen = self._chosen(masked, found.confidence, shares[carry.index], row_keys, places, here)
            after = jnp.where(chosen, found.drawn, carry.tokens)
            history = None if carry.history is None else carry.history.at[carry.index].set(after)
            return _Carry(carry.index + 1, after, self._feedback(carry.feedback, found, hidden), history,
                          carry.finite & found.finite.all(-1))

        start = _Carry(jnp.zeros((), jnp.int32), tokens, feedback,
                       jnp.zeros((self.steps, *tokens.shape), jnp.int32) if self.history else None,
                       jnp.ones(tokens.shape[:1], bool))
        end = jax.lax.while_loop(
            lambda carry: (carry.index < self.steps) & self._masked(carry.tokens, attended).any(), step, start
        )
        history = end.history
        if history is not None:
            history = jnp.where((jnp.arange(self.steps) < end.index)[:, None, None], history, end.tokens)
        return Generated(end.tokens, history, end.index, end.finite)

    def _masked(self, tokens, attended):
        return (tokens == self.denoiser.mask_token_id) & attended

    def _network(self, params, carry: _Carry, ratio, layout):
        scale = jnp.where(carry.index > 0, soft_masking.schedule_scale(self.soft_mask.schedule, ratio), 0.0)
        x = objective.soft_embed(self.denoiser, self.soft_mask, params, carry.tokens, carry.feedback, scale)
        return self.denoiser.trunk(params["backbone"], x, **layout)[0]

    def _feedback(self, before, found: dream_draw.Predicted, hidden):
        if before is None or self.soft_mask.reads == 0:
            return before and before._replace(hidden=hidden)
        return soft_masking.Feedback(found.token_ids, found.top_logits, found.neg_entropy)

    def _chosen(self, masked, confidence, share, row_keys, places, draws: Draws):
        """Which masks [B L] this step unmasks."""
        if self.alg == "origin":
            coins = draws.coins
            return masked & ((_noise(jax.random.uniform, row_keys, _COIN, places) if coins is None else coins) < share)
        if self.alg_temp:
            # The largest of log-weight + Gumbel noise, in order, are draws without replacement.
            order = draws.order
            noise = _noise(_gumbel, row_keys, _ORDER, places) if order is None else order
            confidence = confidence / self.alg_temp + noise
        return surest(masked, confidence, share)

    def _check(self, keys, tokens, attention_mask, draws):
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B L], not {tokens.shape}.")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(f"attention_mask must be {tokens.shape} [B L] as the tokens, not {attention_mask.shape}.")
        draws = draws or Draws()
        needed = {"coins": self.alg == "origin", "gumbel": self.temperature > 0,
                  "order": self.alg != "origin" and bool(self.alg_temp)}  # fmt: skip
        shape = (self.steps, *tokens.shape)
        for name, wanted in zip(Draws._fields, (shape, (*shape, self.denoiser.vocab_size), shape)):
            given = getattr(draws, name)
            if given is not None and given.shape != wanted:
                raise ValueError(f"draws.{name} must have the shape {wanted}, not {given.shape}.")
            if given is None and needed[name] and keys is None:
                raise ValueError(f"This sampler draws at random: pass keys [B], or draws.{name} {wanted}.")
        if keys is not None and keys.shape != tokens.shape[:1]:
            raise ValueError(f"keys must be [B] = {tokens.shape[:1]} typed keys, one a row, not {keys.shape}.")
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens, attention_mask)):
            attended = True if attention_mask is None else np.asarray(attention_mask) != 0
            if not ((np.asarray(tokens) == self.denoiser.mask_token_id) & attended).any():
                raise ValueError(f"Nothing to generate: no token is the mask ({self.denoiser.mask_token_id}).")


def _gumbel(key: jax.Array) -> jax.Array:
    return jax.random.gumbel(key, mode="high")


def _noise(law, row_keys: jax.Array, stream: np.uint32, places: jax.Array) -> jax.Array:
    """One number for each place [B L] of each row, a function of (row key, stream, place) alone."""
    def row(key, places):
        return jax.vmap(lambda at: law(jax.random.fold_in(jax.random.fold_in(key, stream), at)))(places)

    return jax.vmap(row)(row_keys, places)
