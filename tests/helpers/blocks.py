"""Block decoding of a tiny Dream: its samplers, compiled once, three rows, and the plain loop beside them."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config
from softmask_jax.config.sections import Model
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.models import dream_denoiser
from softmask_jax.samplers.blocks import BlockSampler
from softmask_jax.samplers.draws import Draws
from tests.helpers import dream_model, plain_blocks
from tests.helpers.arrays import made_once
from tests.helpers.dream_model import MASK, VOCAB

SOFT = SoftMask("topk", 3)
SCALARS = soft_masking.init_scalars(scale=0.9, centre=-3, steepness=1.5)


@functools.cache
def model(mesh=None):
    sizes = Model(kind="dream", base="-", compute_dtype="float32", param_dtype="float32", remat="none")
    return dream_denoiser.build(sizes, config.SoftMask(k=1), dream_model.config_json(), mesh=mesh)


@made_once
def params() -> dict:
    return {"backbone": dream_model.params(), "soft_mask": SCALARS}


def sampler(denoiser=None, **options) -> BlockSampler:
    return BlockSampler(denoiser or model(), **{"block_length": 4, "steps": 12, "prompt_length": 3, **options})


@functools.cache
def compiled(sampler: BlockSampler):
    return jax.jit(sampler)


def run(sampler, tokens, attention_mask=None, keys=None, draws=None, weights=None):
    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    return compiled(sampler)(weights or params(), keys, jnp.asarray(tokens), mask, draws)


def rows(length: int = 14) -> np.ndarray:
    """Three rows that continue 3 tokens: all masked, some given inside blocks, and a whole block given."""
    tokens = np.random.default_rng(4).integers(0, 190, (3, length))
    tokens[0, 3:] = tokens[1, 3:] = tokens[2, 3:] = MASK
    tokens[1, [3, 6, 9]] = [7, 8, 9]
    tokens[2, 7:11], tokens[0, 1] = [4, 5, 6, 7], MASK
    return tokens


def compared(this: BlockSampler, seed: int = 0, mask_bias: float = 0.0):
    """Runs the three rows in one batch with recorded noise, and each alone in the plain loop."""
    tokens = rows()
    shape, rng = (this.most_calls(tokens.shape[1]), *tokens.shape), np.random.default_rng(seed)
    gumbel = rng.gumbel(size=(*shape, VOCAB)).astype(np.float32) if this.temperature else None
    order = rng.gumbel(size=shape).astype(np.float32) if this.alg_temp else None
    out = run(this, tokens, draws=Draws(gumbel=gumbel, order=order))
    for row in range(len(tokens)):
        own = (None if x is None else x[:, row] for x in (gumbel, order))
        plain = plain_blocks.decode(this, SCALARS, tokens[row], 0, *own, mask_bias)
        np.testing.assert_array_equal(out.tokens[row], plain.tokens)
        assert int(out.row_calls[row]) == len(plain.history)
        assert int(out.filled[row]) == plain.filled
        assert float(out.positions[row]) == plain.positions or this.cache == "prefix"
        steps = [after.tolist() for after in np.asarray(out.history[: int(out.steps), row])]
        at = -1
        for after in plain.history:  # others' steps lie between a row's own
            at = steps.index(after.tolist(), max(at, 0))
    assert bool(out.finite.all())
    return out


def with_bias(at_mask: float):
    def head(backbone):
        bias = jnp.zeros(backbone["head"]["weight"].shape[0]).at[MASK].set(at_mask)
        return Head(backbone["head"]["weight"], bias, VOCAB, MASK, False)

    return dataclasses.replace(model(), head=head)
