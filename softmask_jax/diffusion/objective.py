"""Training objectives: how they corrupt a batch (B rows, L positions), and which rows get two passes.

The loss is the same for all: the mean over rows of sum(weights * cross-entropy)."""
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol, Self, TypeAlias

import jax

from softmask_jax.diffusion.soft_masking import SoftMask

Batch: TypeAlias = Mapping[str, jax.Array]


class Noisy(NamedTuple):
    """A batch with masks, and the loss's weights."""

    x0: jax.Array  # [B L] the tokens
    xt: jax.Array  # [B L] the same with masks
    masked: jax.Array  # [B L] bool, where xt is masked
    t: jax.Array | None  # [B] noise level in (0, 1]
    weights: jax.Array | None  # [B L] float32, 0 where nothing is masked; a row's loss is sum(weights * cross-entropy)
    segment_ids: jax.Array | None = None  # [B L], attention stays within a segment; None for one segment a row


class Objective(Protocol):
    """Base of an objective, a frozen dataclass of settings: such as `nelbo.Nelbo`."""

    soft_mask: SoftMask

    @classmethod
    def from_config(cls, config) -> Self:
        """From a config's sections `soft_mask` and `objective`, whose keys are the fields after `soft_mask`."""
        names = [field.name for field in dataclasses.fields(cls)][1:]
        return cls(SoftMask.from_config(config.soft_mask), **{name: getattr(config.objective, name) for name in names})

    def corrupt(self, batch: Batch, root_key: jax.Array, step, *, mask_token_id: int) -> Noisy:
        """Draw t and x_t of a batch of tokens [B L], keyed by row: the same noise on any mesh and after a resume."""

    def coins(self, batch: Batch, root_key: jax.Array, step, *, p_sm: float, micro_batches: int) -> jax.Array:
        """[B] bool: whether each row gets two passes; position p is of micro-batch p % micro_batches."""
