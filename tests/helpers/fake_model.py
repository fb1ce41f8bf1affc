"""A model that needs no network: what it writes follows from a row and its key, and what it was asked for is kept."""
from types import SimpleNamespace

import jax
import numpy as np

from softmask_jax.data import ByteTokenizer
from softmask_jax.models.families import FAMILIES
from softmask_jax.samplers.result import Generated

MASK, END = 257, 256


class FakeModel:
    """Writes into each mask a letter that the row's key, the real tokens before it and the position decide."""

    tokenizer, mask_token_id, max_length = ByteTokenizer(), MASK, 256
    denoiser = SimpleNamespace(vocab_size=258)
    step, default_alg, template = 3, "mdlm", None

    def __init__(self, padding="left", write=None, end_token_ids=(END,)):
        self.padding, self.write, self.end_token_ids = padding, write, end_token_ids
        self.seen, self.options = [], []

    @property
    def family(self):
        return FAMILIES["dit" if self.padding == "right" else "dream"]

    def fill(self, tokens, attention_mask, *, keys, options, prompt_length=0, trace=False):
        assert tokens.dtype == np.int32 and jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key)
        self.seen.append((tokens.shape, attention_mask is not None, prompt_length))
        self.options.append(options)
        attended = np.ones_like(tokens) if attention_mask is None else attention_mask
        masked = (tokens == MASK) & (attended != 0)
        assert masked.any(1).all() and not (tokens[attended == 0] == MASK).any()
        out, words = tokens.copy(), np.asarray(jax.random.key_data(keys))[:, -1].astype(np.int64)
        for row, word in enumerate(words):
            real = out[row, attended[row] != 0]
            places = np.flatnonzero(real == MASK)
            real[places] = ord("a") + (word + places + real[:1].sum()) % 26 if self.write is None else self.write(len(places))
            out[row, attended[row] != 0] = real
        filled = masked.sum(1).astype(np.int32)
        calls = np.full(len(tokens), 4, np.int32)
        finite = np.array([b"NaN" not in bytes((row % 256).astype(np.uint8)) for row in tokens])
        return Generated(out, None, np.int32(4), np.int32(4), calls, calls * np.float32(tokens.shape[1]), filled, finite)
