"""What an answer must not hold, or should hold less of: a bias on the logits that tokens are drawn from.

Soft-masking's feedback is not constrained: it tells the network what it predicted, not what it was allowed to say.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion.vocab.chunks import Head

# Its exponential is 0 in any float, and a product with 0 is finite, unlike that of -inf.
IMPOSSIBLE = -1e9


@dataclasses.dataclass(frozen=True)
class Constraints:
    """forbidden: ids that are never drawn. end_token_ids: what ends a text (end of text, padding); end_penalty: nats
    taken off their logits, against answers that are empty or cut short by a flood of them. ValueError out of range."""

    forbidden: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    end_penalty: float = 0.0

    def __post_init__(self):
        if not math.isfinite(self.end_penalty):
            raise ValueError(f"end_penalty must be finite, not {self.end_penalty}; forbid the token instead.")

    def bias(self, head: Head) -> jax.Array | None:
        """[Vpad] float32, or None where nothing is constrained. ValueError for ids that do not exist, or all of them."""
        wrong = sorted(i for i in {*self.forbidden, *self.end_token_ids} if not 0 <= i < head.vocab_size)
        if wrong:
            raise ValueError(f"Token {wrong[0]} does not exist: there are {head.vocab_size}.")
        if head.mask_token_id in self.end_token_ids:
            raise ValueError(f"The mask ({head.mask_token_id}) cannot be what ends a text: end_token_ids.")
        if len(set(self.forbidden) | {head.mask_token_id}) >= head.vocab_size:
            raise ValueError("Every token is forbidden; leave some that an answer can be made of.")
        if not (self.forbidden or (self.end_token_ids and self.end_penalty)):
            return None
        bias = np.zeros(head.weight.shape[0], np.float32)
        bias[list(self.end_token_ids)] -= self.end_penalty
        bias[list(self.forbidden)] = IMPOSSIBLE
        return jnp.asarray(bias)


def ended(tokens: jax.Array, wanted: jax.Array, mask_token_id: int,
          end_token_ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """([B] whether an end token stands at a wanted position before the first mask left in `wanted` [B L], tokens [B L] with
    that token in place of the masks of such rows)."""
    masked = (tokens == mask_token_id) & wanted
    settled = jnp.cumsum(masked, -1) == 0
    ends = jnp.isin(tokens, jnp.asarray(end_token_ids)) & wanted & settled
    stopped = ends.any(-1)
    token = jnp.take_along_axis(tokens, ends.argmax(-1)[:, None], -1)
    return stopped, jnp.where(masked & stopped[:, None], token, tokens)
