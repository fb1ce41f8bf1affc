"""Rotary buffer of MDLM's checkpoints, which is no parameter of `models.keys.dit`. Numpy only."""
import numpy as np

ROPE_BASE = 1e4
INVERSE_FREQUENCIES = "backbone.rotary_emb.inv_freq"


def inverse_frequencies(head_width: int) -> np.ndarray:
    """The rotary buffer [head_width / 2] float32, bit for bit as the reference computes it."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return (1.0 / np.float32(ROPE_BASE) ** exponents).astype(np.float32)
