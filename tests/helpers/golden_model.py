"""The small recorded DiT as a denoiser, shared by the parity tests."""
import functools

import jax
import jax.numpy as jnp

from softmask_jax import config
from softmask_jax.models import denoiser
from tests.golden import load, meta
from tests.helpers import torch_weights
from tests.helpers.arrays import made_once

NAME = "mdlm_dit/params.npz"
VOCAB, MASK = 98, 97
MODEL = config.Model(
    hidden_size=64, num_blocks=2, num_heads=2, cond_dim=16, dropout=0.0, compute_dtype="float32", remat="none"
)


@made_once
def params() -> dict:
    """The recorded start, soft-masking scalars included."""
    assert meta(NAME)["config"]["model"]["hidden_size"] == MODEL.hidden_size
    return jax.tree.map(jnp.asarray, torch_weights.from_torch(load(NAME), num_blocks=2))


@functools.cache
def model(variant: str = "topk") -> denoiser.Denoiser:
    return denoiser.build(MODEL, config.SoftMask(variant=variant), vocab_size=VOCAB, mask_token_id=MASK)
