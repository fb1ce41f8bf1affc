"""What a sampler starts from, and the shape aliases of this room: B rows, L positions, D model width."""
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Int: TypeAlias = jax.Array  # []
IntB: TypeAlias = jax.Array  # [B]
FloatB: TypeAlias = jax.Array  # [B]
BoolB: TypeAlias = jax.Array  # [B]
KeysB: TypeAlias = jax.Array  # [B] typed keys, one a row
IntBL: TypeAlias = jax.Array  # [B L]
BoolBL: TypeAlias = jax.Array  # [B L]
FloatBD: TypeAlias = jax.Array  # [B D]
FloatBL: TypeAlias = jax.Array  # [B L]
FloatBLD: TypeAlias = jax.Array  # [B L D]
FloatTBLV: TypeAlias = jax.Array  # [T B L V], T steps


class Canvas(NamedTuple):
    """Tokens to be filled in."""

    tokens: IntBL  # known tokens, and masks
    fillable: BoolBL  # the masks that may be filled
    at_start: IntB  # how many there are in a row
    positions: IntBL  # counted from a row's first token
    layout: dict  # the trunk's arguments for padding; empty without an attention mask
    mask_token_id: int

    @classmethod
    def of(cls, tokens: IntBL, attention_mask: IntBL | None, mask_token_id: int, begin: int = 0) -> "Canvas":
        """Masks from position `begin` on are fillable where attention_mask is not 0; ValueError if there is none."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B L], not {tokens.shape}.")
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(f"attention_mask must be {tokens.shape} [B L] as the tokens, not {attention_mask.shape}.")
        if begin >= tokens.shape[1] > 0:
            raise ValueError(f"The first block begins at {begin}, but there are just {tokens.shape[1]} positions.")
        check_masks(tokens[:, begin:], None if attention_mask is None else attention_mask[:, begin:], mask_token_id)
        tokens = jnp.asarray(tokens, jnp.int32)
        attended = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        positions = jnp.where(attended, jnp.cumsum(attended, -1) - 1, 1)
        layout = {} if attention_mask is None else {"positions": positions, "segment_ids": attended.astype(jnp.int32)}
        fillable = (tokens == mask_token_id) & attended & (jnp.arange(tokens.shape[1]) >= begin)
        return cls(tokens, fillable, fillable.sum(-1), positions, layout, mask_token_id)

    def masks(self, tokens: IntBL) -> BoolBL:
        """Where `tokens` still holds a mask that may be filled."""
        return (tokens == self.mask_token_id) & self.fillable


def check_masks(tokens: IntBL, attention_mask: IntBL | None, mask_token_id: int) -> None:
    """ValueError unless some token that is not padding is the mask; arrays that are being traced are not checked."""
    if any(isinstance(x, jax.core.Tracer) for x in (tokens, attention_mask)):
        return
    attended = True if attention_mask is None else np.asarray(attention_mask) != 0
    if not ((np.asarray(tokens) == mask_token_id) & attended).any():
        raise ValueError(f"Nothing to generate: no token is the mask ({mask_token_id}).")


def check_keys(keys: KeysB | None, tokens: IntBL) -> None:
    """ValueError unless there is a key for each row."""
    if keys is None or keys.shape != tokens.shape[:1]:
        raise ValueError(f"keys must be [B] = {tokens.shape[:1]} typed keys, one a row, not "
                         f"{getattr(keys, 'shape', None)}.")
