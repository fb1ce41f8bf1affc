"""The small recorded Dream as a denoiser, its predictions shifted by one, shared by the samplers' tests."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.vocab.head import Head
from softmask_jax.models import denoiser
from softmask_jax.models.nn import dream
from softmask_jax.samplers import Draws
from tests.golden import load, meta
from tests.helpers import dream_model
from tests.helpers.arrays import made_once
from tests.helpers.dream_model import MASK, VOCAB

PAD = 199


@made_once
def params() -> dict:
    scalars = soft_masking.init_scalars(scale=0.9, centre=-3, steepness=1.5)
    return {"backbone": dream_model.params(), "soft_mask": scalars}


@functools.cache
def model() -> denoiser.Denoiser:
    trunk = dream.trunk(dream_model.config())

    def shifted(backbone, x, **options):
        hidden, cache = trunk(backbone, x, **options)
        return dream.shift(hidden, segment_ids=options.get("segment_ids")), cache

    def head(backbone):
        return Head(backbone["head"]["weight"], None, VOCAB, MASK, False)

    return denoiser.Denoiser(
        embedding=dream.embedding, embed=dream.embed, trunk=shifted, head=head, init=params, axes={}, vocab_size=VOCAB,
        mask_token_id=MASK, num_params=0, flops_per_token=lambda length: 0,
    )  # fmt: skip


@jax.jit
def logits(x, attention_mask=None) -> jax.Array:
    """Shifted logits [B L V] of input embeddings [B L D]."""
    layout = {}
    if attention_mask is not None:
        layout = dict(zip(("positions", "segment_ids"), dream.padded_inputs(attention_mask)))
    hidden = model().trunk(params()["backbone"], x, **layout)[0]
    return dream_model.logits(params()["backbone"], hidden)


def recorded(name: str) -> tuple[dict, dict, dict]:
    """(arrays, options of `diffusion_generate`, soft-masking's settings) of one recorded run."""
    z, about = load(name), meta(name)
    options = {key: about[key] for key in ("steps", "alg", "eps", "temperature")}
    if about["alg"] == "origin":
        # A number for each mask of the batch, row after row.
        coins, before = np.zeros(z["history"].shape, np.float32), z["x_init"]
        for step, after in enumerate(z["history"]):
            coins[step][before == MASK] = z[f"uniform_step{step}"]
            before = after
        options["draws"] = Draws(coins=jnp.asarray(coins))
    if "attention_mask" in z:
        options["attention_mask"] = z["attention_mask"]
    return z, {**options, "max_new_tokens": about["new"], "pad_token_id": PAD}, about["sm"]


def unequal_rows() -> np.ndarray:
    """Three rows with 16, 11 and 4 masks."""
    tokens = np.random.default_rng(4).integers(0, 190, (3, 20))
    tokens[0, 4:], tokens[1, 9:], tokens[2, [0, 5, 6, 19]] = MASK, MASK, MASK
    return tokens
