"""MDLM's ancestral sampler with soft-masking, one compiled loop (MDLM, arXiv 2406.07524, section 4).

From t = 1 down the grid, each masked position takes a token drawn from the prediction with weight t - s or stays masked
with weight s; what has been unmasked stays. The prediction of a step is fed back into the next one's masks.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import diffusion, objective, soft_masking, vocab_head
from softmask_jax.vocab_head import Draw

REUSE = ("exact", "reference", "never")


class Samples(NamedTuple):
    """tokens: [B L] int32. calls: [] int32, network calls. trajectory: [steps + 1, B, L] before each step, or None.
    called: [steps + 1] bool, whether the network was called at that step."""

    tokens: jax.Array
    calls: jax.Array
    trajectory: jax.Array | None
    called: jax.Array


class _Carry(NamedTuple):
    tokens: jax.Array
    hidden: jax.Array
    given: soft_masking.Feedback
    started: jax.Array
    reuse: jax.Array


def ancestral_step(tokens, sweep: vocab_head.Sweep, t, s, mask_noise, *, mask_token_id: int) -> jax.Array:
    """x_s from x_t: a mask takes its drawn token with weight (t - s) p, or stays a mask with weight s.

    Args:
      tokens: x_t [B L]. sweep: of the prediction, with a draw (token and score log p + Gumbel at [B L]).
      t, s: times, s < t. mask_noise: the mask's own Gumbel noise [B L]; with it the larger of the two is an exact draw.

    Returns:
      x_s [B L]; what was unmasked stays.
    """
    takes = sweep.drawn_score + jnp.log(t - s) > jnp.log(s) + mask_noise
    return jnp.where((tokens == mask_token_id) & takes, sweep.drawn, tokens)


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """`sampler(params, keys [B], tokens [B L]) -> Samples`; pure, jit it with the sampler closed over.

    steps: network calls at most, beside the last arg-max pass. nucleus_p: filter of the draws; the feedback stays
    unfiltered. reuse: when no token changed, the next call would return the same prediction and is saved: "exact" only
    where that is true (without soft-masking), "reference" always, as the PyTorch reference does, "never".
    """

    denoiser: object
    spec: objective.Nelbo
    steps: int = 128
    nucleus_p: float = 1.0
    eps: float = 1e-5
    reuse: str = "exact"
    trajectory: bool = False

    def __post_init__(self):
        if self.reuse not in REUSE:
            raise ValueError(f"reuse is '{self.reuse}'; choose one of {', '.join(REUSE)}.")
        if self.steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, not {self.steps}.")
        if not (0 < self.nucleus_p <= 1 and 0 < self.eps < 1):
            raise ValueError(f"nucleus_p ({self.nucleus_p}) must be in (0, 1] and eps ({self.eps}) in (0, 1).")

    def __call__(self, params: dict, keys: jax.Array, tokens: jax.Array, gumbel: jax.Array | None = None) -> Samples:
        """Fill the masks of `tokens`.

        Args:
          keys: [B] one key per row: a row's text does not depend on the rows beside it.
          tokens: [B L] ids, the mask where text is wanted.
          gumbel: [steps B L V] recorded noise instead of `keys` (`recorded_gumbel`), to replay a reference exactly.
        """
        wanted = (self.steps, *tokens.shape, self.denoiser.vocab_size)
        if gumbel is not None and gumbel.shape != wanted:
            raise ValueError(f"Recorded noise must have the shape [steps B L V] = {wanted}, not {gumbel.shape}.")
        mask = self.denoiser.mask_token_id
        times = diffusion.sampling_times(self.steps, self.eps)
        dt = (1.0 - self.eps) / self.steps
        backbone = params["backbone"]
        hidden = jax.eval_shape(lambda b: self.denoiser.trunk(b, self.denoiser.embed(b, tokens))[0], backbone)
        start = _Carry(
            tokens,
            jnp.zeros(hidden.shape, hidden.dtype),
            objective.empty_feedback(self.denoiser, self.spec, backbone, tokens),
            jnp.zeros((), bool),
            jnp.zeros((), bool),
        )

        def step(carry: _Carry, given):
            index, t, noise = given
            called = ~carry.reuse
            hidden = jax.lax.cond(carry.reuse, lambda: carry.hidden, lambda: self._network(params, carry))
            row_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            draw = Draw(keys=row_keys if noise is None else None, gumbel=noise, nucleus_p=self.nucleus_p)
            sweep = vocab_head.sweep(hidden, self.denoiser.head(backbone), k=self.spec.k, draw=draw)
            mask_noise = self._mask_noise(row_keys, noise, tokens.shape)
            following = ancestral_step(carry.tokens, sweep, t, t - dt, mask_noise, mask_token_id=mask)
            keep = hidden if self.spec.variant == "full" else None
            feedback = soft_masking.Feedback(sweep.token_ids, sweep.top_logits, sweep.neg_entropy, keep)
            after = _Carry(following, hidden, feedback, jnp.ones((), bool), self._reusable(carry.tokens, following))
            return after, (carry.tokens if self.trajectory else None, called)

        end, (seen, called) = jax.lax.scan(step, start, (jnp.arange(self.steps), times[:-1], gumbel))
        last = vocab_head.sweep(self._network(params, end), self.denoiser.head(backbone), k=1)
        final = jnp.where(end.tokens == mask, last.token_ids[..., 0], end.tokens)
        called = jnp.append(called, True)
        seen = jnp.concatenate([seen, end.tokens[None]]) if self.trajectory else None
        return Samples(final, called.sum(dtype=jnp.int32), seen, called)

    def _network(self, params, carry: _Carry):
        x = objective.soft_embed(
            self.denoiser, self.spec, params, carry.tokens, carry.given, carry.started.astype(jnp.float32)
        )
        return self.denoiser.trunk(params["backbone"], x)[0]

    def _mask_noise(self, row_keys, noise, shape):
        """The mask's own Gumbel noise [B L]: with it, arg-max over tokens and mask is an exact draw."""
        if noise is not None:
            return noise[..., self.denoiser.mask_token_id]
        own = jax.vmap(lambda key: jax.random.fold_in(key, np.uint32(0xFFFFFFFF)))(row_keys)
        return jax.vmap(lambda key: jax.random.gumbel(key, shape[1:], mode="high"))(own)

    def _reusable(self, before, after):
        soft = self.spec.variant != "none"
        if self.reuse == "never" or (self.reuse == "exact" and soft):
            return jnp.zeros((), bool)
        return (before == after).all()


def recorded_gumbel(uniform: np.ndarray) -> np.ndarray:
    """Recorded uniforms to the Gumbel noise that the reference makes of them (`sample_categorical`), in float64."""
    uniform = np.asarray(uniform, np.float64)
    return -np.log(1e-10 - np.log(uniform + 1e-10))
