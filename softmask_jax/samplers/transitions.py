"""How a step of MDLM's samplers moves tokens: MDLM (arXiv 2406.07524) and ReMDM's re-masking (arXiv 2503.00307).

From time t to s < t a token is re-masked with probability sigma; a mask takes a token drawn from the prediction with
weight `take` or stays with weight `stay`; alpha = 1 - t. transition(times [T], dt) -> `Rates` tabulates all three."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rates(NamedTuple):
    """All [T] float32; the last two need not sum to 1."""

    remask: np.ndarray  # sigma, in [0, 1]
    take: np.ndarray  # weight of a mask that becomes a token
    stay: np.ndarray  # weight of a mask that stays one


@dataclasses.dataclass(frozen=True)
class Mdlm:
    """Nothing is re-masked: weight t - s for a token, s for staying a mask."""

    by_confidence = False

    def __call__(self, times: np.ndarray, dt: float) -> Rates:
        t = np.asarray(times, np.float64)
        s = t - dt
        return _rates(np.zeros_like(t), t - s, s)


class _Remasking:
    """sigma is `_sigma(limit, alpha_t, alpha_s)`, limit its largest value; the rates of masks keep MDLM's marginals."""

    by_confidence = False
    eta = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta, a probability of re-masking, must be in [0, 1], not {self.eta}.")

    def __call__(self, times: np.ndarray, dt: float) -> Rates:
        t = np.asarray(times, np.float64)
        alpha_t, alpha_s = 1 - t, 1 - (t - dt)
        # At alpha_t = 0 there is no token to be re-masked.
        with np.errstate(divide="ignore"):
            sigma = self._sigma((1 - alpha_s) / alpha_t, alpha_t, alpha_s)
        return _rates(sigma, *_kept_marginals(0 if self.by_confidence else sigma, alpha_t, alpha_s))


@dataclasses.dataclass(frozen=True)
class RemdmCap(_Remasking):
    """sigma = min(eta, (1 - alpha_s) / alpha_t)."""

    eta: float = 0.04

    def _sigma(self, limit, alpha_t, alpha_s):
        return np.minimum(self.eta, limit)


@dataclasses.dataclass(frozen=True)
class RemdmRescale(_Remasking):
    """sigma = eta * min(1, (1 - alpha_s) / alpha_t)."""

    eta: float = 0.015

    def _sigma(self, limit, alpha_t, alpha_s):
        return self.eta * np.minimum(1, limit)


@dataclasses.dataclass(frozen=True)
class RemdmConf(_Remasking):
    """sigma_i = min(1, (1 - alpha_s) / alpha_t) * softmax_i(-p), p the probabilities that the row's tokens had when
    drawn: less sure tokens go first."""

    by_confidence = True

    def _sigma(self, limit, alpha_t, alpha_s):
        return np.minimum(1, limit)


@dataclasses.dataclass(frozen=True)
class ForwardBackward(_Remasking):
    """sigma = (alpha_s - alpha_t) / alpha_t: as much noise as the step took away (DFM's corrector)."""

    def _sigma(self, limit, alpha_t, alpha_s):
        return np.where(alpha_t > 0, (alpha_s - alpha_t) / alpha_t, 1.0)


@dataclasses.dataclass(frozen=True)
class RemdmLoop(_Remasking):
    """MDLM down to alpha_on for t > t_on, then re-masking at alpha_on with sigma = eta; MDLM again from t_off on."""

    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.t_off < self.t_on < 1:
            raise ValueError(f"The loop needs 0 < t_off < t_on < 1, not t_off = {self.t_off} and t_on = {self.t_on}.")
        if not 0 < self.alpha_on < 1:
            raise ValueError(f"alpha_on, the share of tokens in the loop, must be in (0, 1), not {self.alpha_on}.")
        if self.eta * self.alpha_on > 1 - self.alpha_on:
            raise ValueError(f"eta = {self.eta} re-masks more than a loop at alpha_on = {self.alpha_on} can fill: at "
                             f"most {(1 - self.alpha_on) / self.alpha_on:.3g}.")

    def __call__(self, times: np.ndarray, dt: float) -> Rates:
        t = np.asarray(times, np.float64)
        early, late = t > self.t_on, t <= self.t_off
        # 1 - alpha at t and at s, by the phase of t.
        masked_t, masked_s = (np.where(early, 1 - (1 - time) * self.alpha_on / (1 - self.t_on),
                                       time * (1 - self.alpha_on) / self.t_off) for time in (t, t - dt))
        sigma = np.where(early | late, 0.0, self.eta)
        take, stay = _kept_marginals(self.eta, self.alpha_on, self.alpha_on)
        return _rates(sigma, np.where(sigma > 0, take, masked_t - masked_s), np.where(sigma > 0, stay, masked_s))


def move(rates: Rates, tokens: jax.Array, masked: jax.Array, free: jax.Array, drawn: jax.Array, score: jax.Array,
         mask_noise: jax.Array, own_noise: jax.Array, *, mask_token_id: int) -> jax.Array:
    """x_s from x_t = tokens, all [B L]; the larger of two log-weight + Gumbel noise is an exact draw.

    rates: of this step, scalars or [B L]. masked: masks that may be filled; free: tokens that may be re-masked. drawn,
    score: tokens from the prediction p, and their log p + Gumbel noise. mask_noise, own_noise: Gumbel noise of the
    mask, and of the token of x_t."""
    takes = masked & (score + jnp.log(rates.take) > jnp.log(rates.stay) + mask_noise)
    goes = free & (jnp.log(rates.remask) + mask_noise > jnp.log1p(-rates.remask) + own_noise)
    return jnp.where(takes, drawn, jnp.where(goes, mask_token_id, tokens))


def less_sure_first(rates: Rates, confidence: jax.Array, free: jax.Array) -> Rates:
    """`RemdmConf`'s rates [B L]: confidence [B L] is the probability that a token was drawn with."""
    share = jax.nn.softmax(jnp.where(free, -confidence, -jnp.inf), -1)
    return rates._replace(remask=rates.remask * jnp.where(free, share, 0.0))


def _kept_marginals(sigma, alpha_t, alpha_s) -> tuple[np.ndarray, np.ndarray]:
    """(take, stay) of masks for which a share alpha_s of all positions holds a token after the step."""
    left = np.maximum(1 - alpha_t, np.finfo(np.float64).tiny)
    return (alpha_s - (1 - sigma) * alpha_t) / left, (1 - alpha_s - sigma * alpha_t) / left


def _rates(*rates: np.ndarray) -> Rates:
    # Rounding may leave a weight of 0 just below 0.
    return Rates(*(np.maximum(rate, 0).astype(np.float32) for rate in rates))
