"""Recorded random numbers, to replay a reference."""
from typing import NamedTuple

import jax

from softmask_jax.samplers.canvas import FloatTBLV, IntBL, KeysB, check_keys


class Draws(NamedTuple):
    """Recorded random numbers instead of keys, by a row's own calls, to replay a reference; None: not recorded."""

    coins: jax.Array | None = None  # [T B L] uniform in [0, 1), of `origin` and `random`
    gumbel: FloatTBLV | None = None  # [T B L V] Gumbel noise of the tokens
    order: jax.Array | None = None  # [T B L] Gumbel noise of alg_temp

    def check(self, keys: KeysB | None, steps: int, tokens: IntBL, vocab_size: int, needed: dict) -> None:
        """ValueError unless shapes fit `steps` steps and there are keys, or numbers by every name that is `needed`."""
        shape = (steps, *tokens.shape)
        for name, expected in zip(self._fields, (shape, (*shape, vocab_size), shape)):
            numbers = getattr(self, name)
            if numbers is not None and numbers.shape != expected:
                raise ValueError(f"draws.{name} must have the shape {expected}, not {numbers.shape}.")
            if numbers is None and needed[name] and keys is None:
                raise ValueError(f"This sampler draws at random: pass keys [B], or draws.{name} {expected}.")
        if keys is not None:
            check_keys(keys, tokens)
