"""Fill the masks of rows with a model, by `Options`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import checked_key, settled
from softmask_jax.samplers.canvas import check_masks
from softmask_jax.samplers.options import Options
from softmask_jax.samplers.result import Generated


@functools.partial(jax.jit, static_argnums=0)
def run(sampler, params: dict, keys, tokens, attention_mask, *more) -> Generated:
    """A sampler's call, compiled once for each sampler and shape."""
    return sampler(params, keys, tokens, attention_mask, *more)


@settled()
def fill(model, tokens, attention_mask=None, *, keys: jax.Array, options: Options, prompt_length: int = 0,
         trace: bool = False) -> Generated:
    """Fill the masks of tokens [B L] for a `generate.model.Model`; other tokens stay.

    attention_mask: [B L], 0 for padding. keys: [B] typed, one a row, whose answer depends on no other row or padding.
    prompt_length: where blocks begin; positions from there on are Dream's default number of steps. trace: keep every
    step, for `report.viewer`. ValueError: unknown ids, rows that are too long, nothing masked, invalid options."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B L], not {tokens.dtype} {tokens.shape}.")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.denoiser.vocab_size:
        raise ValueError(f"tokens must lie in 0..{model.denoiser.vocab_size - 1}, not {tokens.min()}..{tokens.max()}.")
    attended = np.ones(tokens.shape) if attention_mask is None else np.asarray(attention_mask) != 0
    longest = int(attended.sum(-1).max(initial=0))
    if longest > model.max_length:
        raise ValueError(f"A row has {longest:,} tokens, masks among them; this model takes {model.max_length:,}.")
    check_masks(tokens, attention_mask, model.denoiser.mask_token_id)
    sampler = options.sampler(model.denoiser, model.soft_mask, model.end_token_ids, prompt_length=prompt_length,
                              new_tokens=tokens.shape[1] - prompt_length, alg=model.default_alg, trace=trace)
    mask, rows = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32), len(tokens)
    arrays = (checked_key(keys), jnp.asarray(tokens, jnp.int32), mask)
    if rows % model.row_shards:
        # Devices take equal numbers of rows: repeat the first ones.
        repeated = jnp.arange(-(-rows // model.row_shards) * model.row_shards) % rows
        arrays = jax.tree.map(lambda x: x[repeated], arrays)
    return run(sampler, model.params, *arrays).first_rows(rows)
