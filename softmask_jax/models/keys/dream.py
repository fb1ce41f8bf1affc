"""Key table of Dream (`DreamLM/Dream`, Qwen2.5's architecture).

Letters: D width, V vocabulary, Q queries (heads x head width), J keys and values, F MLP width."""
from collections.abc import Mapping

from softmask_jax.models.keys import Entry, Keys, Products
from softmask_jax.models.nn.dream_config import DreamConfig

BLOCK = "model.layers.{i}."
PRODUCTS = Products(BLOCK, {
    "q": ("self_attn.q_proj", ("Q", "D")),
    "k": ("self_attn.k_proj", ("J", "D")),
    "v": ("self_attn.v_proj", ("J", "D")),
    "o": ("self_attn.o_proj", ("D", "Q")),
    "gate": ("mlp.gate_proj", ("F", "D")),
    "up": ("mlp.up_proj", ("F", "D")),
    "down": ("mlp.down_proj", ("D", "F")),
})  # fmt: skip
WITH_BIAS = {"q": "Q", "k": "J", "v": "J"}


def backbone(int8: bool = False) -> tuple[Entry, ...]:
    """Entries of the whole network."""
    return (
        Entry("embed/table", "model.embed_tokens.weight", "vocabulary", ("V", "D")),
        Entry("layers/attn_norm/scale", f"{BLOCK}input_layernorm.weight", "none", ("D",)),
        Entry("layers/mlp_norm/scale", f"{BLOCK}post_attention_layernorm.weight", "none", ("D",)),
        *PRODUCTS.kernels(int8),
        *(Entry(f"layers/{o}/bias", f"{PRODUCTS.module(o)}.bias", "none", (out,)) for o, out in WITH_BIAS.items()),
        Entry("final_norm/scale", "model.norm.weight", "none", ("D",)),
        Entry("head/weight", "lm_head.weight", "vocabulary", ("V", "D")),
    )


def letters(config: DreamConfig) -> dict[str, int]:
    """Sizes of the letters of a network."""
    return {
        "V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size,
        "Q": config.hidden_size, "J": config.head_width * config.num_kv_heads,
    }  # fmt: skip


def _table(about: Mapping) -> tuple[Entry, ...]:
    return backbone(about.get("base_dtype") == "int8")


def _sizes(about: Mapping) -> dict[str, int]:
    return letters(DreamConfig.from_hf(about["hf_config"]))


ROOTS = (r"(?:base_model\.model\.)?model\.(?:embed_tokens|layers|norm)", "lm_head")
KEYS = Keys("a Dream model", ROOTS, _table, _sizes, PRODUCTS)
