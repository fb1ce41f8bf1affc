"""Table of keys of MDLM and soft-masked MDLM: our path, and the key in the references' `state_dict`. Numpy only.

References: `kuleshov-group/mdlm`, `IBM/soft-masked-diffusion-language-models`.
Letters: D width, V vocabulary, F MLP width, C conditioning width.
"""
import numpy as np

from softmask_jax.convert.key_tables import Entry, linear
from softmask_jax.convert.wrappers import own_keys

ROPE_BASE = 1e4
INVERSE_FREQUENCIES = "backbone.rotary_emb.inv_freq"
OWN_KEYS = own_keys(r"backbone\.(?:vocab_embed|sigma_map|rotary_emb|blocks|output_layer)", "tran_head")

BLOCK = "backbone.blocks.{i}."
BACKBONE = (
    Entry("embed/table", "backbone.vocab_embed.embedding", "vocabulary", ("V", "D")),
    *linear("sigma_map/in", "backbone.sigma_map.mlp.0", ("C", 256)),
    *linear("sigma_map/out", "backbone.sigma_map.mlp.2", ("C", "C")),
    Entry("blocks/norm1/scale", f"{BLOCK}norm1.weight", "none", ("D",)),
    *linear("blocks/qkv", f"{BLOCK}attn_qkv", ("3D", "D"), bias=False),
    *linear("blocks/attn_out", f"{BLOCK}attn_out", ("D", "D"), bias=False),
    Entry("blocks/norm2/scale", f"{BLOCK}norm2.weight", "none", ("D",)),
    *linear("blocks/mlp_in", f"{BLOCK}mlp.0", ("F", "D")),
    *linear("blocks/mlp_out", f"{BLOCK}mlp.2", ("D", "F")),
    *linear("blocks/adaln", f"{BLOCK}adaLN_modulation", ("6D", "C")),
    Entry("final/norm/scale", "backbone.output_layer.norm_final.weight", "none", ("D",)),
    *linear("final/adaln", "backbone.output_layer.adaLN_modulation", ("2D", "C")),
    Entry("head/weight", "backbone.output_layer.linear.weight", "vocabulary", ("V", "D")),
    Entry("head/bias", "backbone.output_layer.linear.bias", "vocabulary", ("V",)),
)
SOFT_MASK = (
    Entry("raw_scale", "tran_head.raw_scale", "none", ()),
    Entry("raw_centre", "tran_head.raw_centre_neg", "none", ()),
    Entry("raw_steepness", "tran_head.raw_steep", "none", ()),
    Entry("raw_temperature", "tran_head.raw_temperature", "none", ()),
)


def inverse_frequencies(head_width: int) -> np.ndarray:
    """The rotary buffer [head_width / 2] float32, bit for bit as the reference computes it."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return (1.0 / np.float32(ROPE_BASE) ** exponents).astype(np.float32)
