"""Key table of MDLM and soft-masked MDLM (`kuleshov-group/mdlm`, `IBM/soft-masked-diffusion-language-models`).

Letters: D width, V vocabulary, F MLP width, C conditioning width."""
from collections.abc import Mapping

from softmask_jax.models.keys import Entry, Keys, linear

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


def sizes(about: Mapping) -> dict[str, int]:
    """Sizes of the letters, from config.json of a converted MDLM."""
    model = about["config"]["model"]
    width = model["hidden_size"]
    return {"V": about["vocab_size"], "D": width, "C": model["cond_dim"], "F": model["mlp_ratio"] * width}


ROOTS = (r"backbone\.(?:vocab_embed|sigma_map|rotary_emb|blocks|output_layer)", "tran_head")
KEYS = Keys("an MDLM", ROOTS, lambda about: BACKBONE, sizes)
