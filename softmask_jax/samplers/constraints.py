"""Forbidden and penalised tokens: a bias on the logits that tokens are drawn from, not on soft-masking's feedback."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion.vocab.chunks import Head

# exp(-1e9) is 0 in any float, and unlike -inf it can be multiplied by 0.
IMPOSSIBLE = -1e9


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Limits on the tokens that are drawn; ValueError out of range."""

    forbidden: tuple[int, ...] = ()  # ids that are never drawn
    end_token_ids: tuple[int, ...] = ()  # tokens that end a text (end of text, padding)
    end_penalty: float = 0.0  # nats off their logits, against answers that are empty or cut short by a flood of them

    def __post_init__(self):
        if not math.isfinite(self.end_penalty):
            raise ValueError(f"end_penalty must be finite, not {self.end_penalty}; forbid the token instead.")

    def bias(self, head: Head, used: int | None = None) -> jax.Array | None:
        """[Vpad] float32, None without constraints. used: ids from there on are no tokens; None if all are.
        ValueError for ids that do not exist, or if no token is left."""
        used = head.vocab_size if used is None else used
        outside = sorted(i for i in {*self.forbidden, *self.end_token_ids} if not 0 <= i < head.vocab_size)
        if outside:
            raise ValueError(f"Token {outside[0]} does not exist: there are {head.vocab_size}.")
        if head.mask_token_id in self.end_token_ids:
            raise ValueError(f"The mask ({head.mask_token_id}) cannot be what ends a text: end_token_ids.")
        if len({i for i in self.forbidden if i < used} | {head.mask_token_id}) >= used:
            raise ValueError("Every token is forbidden; leave some that an answer can be made of.")
        if not (self.forbidden or (self.end_token_ids and self.end_penalty) or used < head.vocab_size):
            return None
        bias = np.zeros(head.weight.shape[0], np.float32)
        bias[list(self.end_token_ids)] -= self.end_penalty
        bias[list(self.forbidden)] = bias[used:] = IMPOSSIBLE
        return jnp.asarray(bias)
