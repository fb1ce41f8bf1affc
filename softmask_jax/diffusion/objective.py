"""The interface of a training objective: how it corrupts a batch, and which rows get two passes.

The loss is the same for all: the mean over rows of sum(weights * cross-entropy). B rows, L positions.
"""
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax

from softmask_jax.diffusion.soft_masking import SoftMask


class Noisy(NamedTuple):
    """A corrupted batch.

    Attributes:
      x0: [B L] the tokens. xt: [B L] the same with masks. masked: [B L] bool, where xt is masked.
      t: [B] noise level in (0, 1].
      weights: [B L] float32, 0 where nothing is masked; a row's loss is the sum of weights * cross-entropy.
      segment_ids: [B L], attention stays within a segment; None for one segment a row.
    """

    x0: jax.Array
    xt: jax.Array
    masked: jax.Array
    t: jax.Array | None
    weights: jax.Array | None
    segment_ids: jax.Array | None = None


class Objective(Protocol):
    """A frozen dataclass of settings; `diffusion.nelbo.Nelbo` and `diffusion.dream_loss.DreamLoss` are two."""

    soft_mask: SoftMask

    def corrupt(self, batch: Mapping[str, jax.Array], root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """Draw t and x_t of a batch of tokens [B L], keyed by row: the same noise on any mesh and after a resume."""

    def coins(self, batch: Mapping[str, jax.Array], root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool: whether each row gets two passes; position p is of micro-batch p % micro_batches."""
