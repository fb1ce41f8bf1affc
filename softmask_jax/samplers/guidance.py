"""Classifier-free guidance of any sampler's draws (`cfg_scale` of LLaDA, arXiv 2502.09992; arXiv 2410.18514).

Every network call takes 2B rows: the texts, then the same without their condition, where each token that was known at
the start, padding included, is a mask. Padding stays unseen in both. Tokens are drawn, and ranked, from the logits
uncond + (w + 1) (cond - uncond). The head is linear, so the hidden states are combined instead: one matrix product for
the draw.

Soft-masking's feedback is not combined: each half reads back its own plain prediction, as in training. Feedback of the
guided logits would tell the unconditional half the condition, and give the conditional one a sharper distribution than
any that it was trained on. In the unconditional half the masked condition has feedback, too, and lambda's schedule is
that of the row."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from softmask_jax.samplers.canvas import BoolBL, Canvas, FloatBLD, IntBL


def twice(x: jax.Array) -> jax.Array:
    """[B ...] -> [2B ...]."""
    return jnp.concatenate([x, x])


def both(canvas: Canvas, tokens: IntBL) -> IntBL:
    """tokens [B L] -> [2B L], the second half without the condition."""
    return jnp.concatenate([tokens, jnp.where(canvas.tokens == canvas.mask_token_id, tokens, canvas.mask_token_id)])


def masks(canvas: Canvas, tokens: IntBL) -> BoolBL:
    """The masks of the unconditional half, [B L]; padding has none."""
    hidden = both(canvas, tokens)[len(tokens):] == canvas.mask_token_id
    return hidden & (canvas.layout["segment_ids"] != 0) if canvas.layout else hidden


def guided(trunk: Callable, scale: float) -> Callable:
    """A trunk of 2B rows that returns the B `combined` ones."""
    def run(*arrays, **options):
        hidden, cache = trunk(*arrays, **options)
        return combined(hidden, scale), cache

    return run


def combined(hidden: FloatBLD, scale: float) -> FloatBLD:
    """Hidden states [2B L D] -> [B L D], whose logits are the guided ones."""
    cond, uncond = jnp.split(hidden.astype(jnp.float32), 2)
    return (uncond + (scale + 1) * (cond - uncond)).astype(hidden.dtype)
