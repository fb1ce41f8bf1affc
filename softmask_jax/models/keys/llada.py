"""Key table of LLaDA (`ML-GSAI/LLaDA`, OLMo's names); letters as in `keys.dream`."""
from collections.abc import Mapping

from softmask_jax.models.keys import Entry, Keys, Products
from softmask_jax.models.keys.dream import letters
from softmask_jax.models.nn import llada_config

BLOCK, HEAD = "model.transformer.blocks.{i}.", "model.transformer.ff_out"
PRODUCTS = Products(BLOCK, {
    "q": ("q_proj", ("Q", "D")),
    "k": ("k_proj", ("J", "D")),
    "v": ("v_proj", ("J", "D")),
    "o": ("attn_out", ("D", "Q")),
    "gate": ("ff_proj", ("F", "D")),
    "up": ("up_proj", ("F", "D")),
    "down": ("ff_out", ("D", "F")),
}, {"down": HEAD})  # fmt: skip


def backbone(tied: bool, int8: bool = False) -> tuple[Entry, ...]:
    """Entries of the whole network; tied: the embedding is the head, too."""
    head = Entry("head/weight", f"{HEAD}.weight", "vocabulary", ("V", "D"))
    return (
        Entry("embed/table", "model.transformer.wte.weight", "vocabulary", ("V", "D")),
        Entry("layers/attn_norm/scale", f"{BLOCK}attn_norm.weight", "none", ("D",)),
        Entry("layers/mlp_norm/scale", f"{BLOCK}ff_norm.weight", "none", ("D",)),
        *PRODUCTS.kernels(int8),
        Entry("final_norm/scale", "model.transformer.ln_f.weight", "none", ("D",)),
        *(() if tied else (head,)),
    )


def _table(about: Mapping) -> tuple[Entry, ...]:
    return backbone(llada_config.from_hf(about["hf_config"]).tied, about.get("base_dtype") == "int8")


def _sizes(about: Mapping) -> dict[str, int]:
    return letters(llada_config.from_hf(about["hf_config"]))


ROOTS = (r"(?:base_model\.model\.)?model\.transformer\.(?:wte|blocks|ln_f|ff_out)",)
KEYS = Keys("a LLaDA model", ROOTS, _table, _sizes, PRODUCTS)
