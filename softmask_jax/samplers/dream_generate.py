"""From prompts to texts with the samplers of Dream and LLaDA: padding, settings by their published names, checks."""
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config.jax_settings import checked_key, settled
from softmask_jax.diffusion import noise, transparency
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.draws import Draws
from softmask_jax.samplers.dream import DreamSampler
from softmask_jax.samplers.filling import run
from softmask_jax.samplers.result import Generated


def soft_mask_from(config: Mapping) -> tuple[SoftMask, dict | None]:
    """Entries of `transparency_config.json` -> (settings, raw scalars for `params["soft_mask"]`); see `read`."""
    settings, raw = transparency.read(config)
    return SoftMask(**settings), raw


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths -> (tokens, attention mask), both [B P] int32, padded on the left, P a `multiple` for few
    compiled programs. ValueError for an empty prompt."""
    prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    if not prompts:
        raise ValueError("There are no prompts.")
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"Prompt {empty[0]} is empty: give it at least one token.")
    length = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.full((len(prompts), length), pad_token_id, np.int32)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt):], mask[row, length - len(prompt):] = prompt, 1
    return tokens, mask


@settled()
def diffusion_generate(denoiser, params: dict, prompts, key: jax.Array | None = None, *, max_new_tokens: int,
                       pad_token_id: int, attention_mask=None, soft_mask: SoftMask | Mapping | None = None,
                       max_length: int | None = None, pad_multiple: int = 1, draws: Draws | None = None,
                       **options) -> Generated:
    """Continue prompts as Dream's function of this name: tokens [B P + max_new_tokens]; compiled once per shape.

    Args:
      prompts: token lists of any lengths, or an array [B P] with an attention_mask [B P] if it is padded on the left.
      key: one key, folded with each row's index, or [B] keys; None if nothing is drawn.
      soft_mask: settings for the scalars in `params["soft_mask"]`, or the entries of `transparency_config.json`.
      max_length: the most positions that the model can take, padding aside.
      options: fields of `DreamSampler`; with block_length of `BlockSampler`, blocks beginning behind the prompts.

    ValueError: prompts empty or too long, options out of range. FloatingPointError: a logit was NaN or infinite."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if attention_mask is None:
        tokens, attended = pad_left(prompts, pad_token_id, pad_multiple)
    else:
        tokens, attended = np.asarray(prompts, np.int32), np.asarray(attention_mask, np.int32)
        if tokens.ndim != 2 or tokens.shape != attended.shape:
            raise ValueError(f"attention_mask {attended.shape} must have the prompts' shape [B P], not {tokens.shape}.")
        if (np.diff(attended, axis=1) < 0).any() or not attended.any(1).all():
            raise ValueError("attention_mask must be 0 for padding on the left, then 1, with a token in every row.")
    longest = int(attended.sum(1).max()) + max_new_tokens
    if max_length is not None and longest > max_length:
        raise ValueError(f"Prompt and {max_new_tokens} new tokens are {longest} positions; {max_length} are allowed: "
                         "shorten the prompt or ask for fewer tokens.")
    if isinstance(soft_mask, Mapping):
        soft_mask, scalars = soft_mask_from(soft_mask)
        params = params if scalars is None else {**params, "soft_mask": scalars}
    if options.get("block_length") is None:
        sampler = DreamSampler(denoiser, soft_mask or SoftMask(), **options)
    else:
        sampler = BlockSampler(denoiser, soft_mask or SoftMask(), prompt_length=tokens.shape[1], **options)
    keys = None if key is None else checked_key(key)
    if keys is not None and keys.ndim == 0:
        keys = noise.row_keys(keys, jnp.arange(len(tokens)))
    new = ((0, 0), (0, max_new_tokens))
    tokens = jnp.asarray(np.pad(tokens, new, constant_values=denoiser.mask_token_id))
    # Without padding the model needs no mask, and attention is cheaper.
    attended = None if attended.all() else jnp.asarray(np.pad(attended, new, constant_values=1))
    out = run(sampler, params, keys, tokens, attended, draws)
    if (broken := np.flatnonzero(~np.asarray(out.finite))).size:
        raise FloatingPointError(f"The model's logits were NaN or infinite in row {broken[0]}: check its parameters.")
    return out
