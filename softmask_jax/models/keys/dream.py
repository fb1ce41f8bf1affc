"""Key tables of Dream (`DreamLM/Dream`, Qwen2.5's architecture) and of PEFT's LoRA and DoRA adapters on it.

Letters: D width, V vocabulary, Q queries (heads x head width), J keys and values, F MLP width, R rank."""
from collections.abc import Iterable, Mapping

from softmask_jax.models.keys import Entry, Keys
from softmask_jax.models.nn.dream_config import DreamConfig

BLOCK = "model.layers.{i}."
# Our name of each linear layer, PyTorch's, and its shape [out, in].
LINEAR = {
    "q": ("self_attn.q_proj", ("Q", "D")),
    "k": ("self_attn.k_proj", ("J", "D")),
    "v": ("self_attn.v_proj", ("J", "D")),
    "o": ("self_attn.o_proj", ("D", "Q")),
    "gate": ("mlp.gate_proj", ("F", "D")),
    "up": ("mlp.up_proj", ("F", "D")),
    "down": ("mlp.down_proj", ("D", "F")),
}
WITH_BIAS = ("q", "k", "v")
TARGETS = {theirs.split(".")[1]: ours for ours, (theirs, _) in LINEAR.items()}

BACKBONE = (
    Entry("embed/table", "model.embed_tokens.weight", "vocabulary", ("V", "D")),
    Entry("layers/attn_norm/scale", f"{BLOCK}input_layernorm.weight", "none", ("D",)),
    Entry("layers/mlp_norm/scale", f"{BLOCK}post_attention_layernorm.weight", "none", ("D",)),
    *(Entry(f"layers/{o}/kernel", f"{BLOCK}{t}.weight", "transpose", s) for o, (t, s) in LINEAR.items()),
    *(Entry(f"layers/{o}/bias", f"{BLOCK}{LINEAR[o][0]}.bias", "none", LINEAR[o][1][:1]) for o in WITH_BIAS),
    Entry("final_norm/scale", "model.norm.weight", "none", ("D",)),
    Entry("head/weight", "lm_head.weight", "vocabulary", ("V", "D")),
)
# After `convert.int8`: kernels with a scale per output.
BACKBONE_INT8 = (
    *(entry._replace(dtype="int8") if entry.path.endswith("/kernel") else entry for entry in BACKBONE),
    *(Entry(f"layers/{o}/kernel_scale", f"{BLOCK}{t}.weight_scale", "none", s[:1]) for o, (t, s) in LINEAR.items()),
)
ADAPTER_KEY = "base_model.model." + BLOCK


def adapter_table(targets: Iterable[str], use_dora: bool) -> tuple[Entry, ...]:
    """Entries of the low-rank factors, and of DoRA's magnitudes, for `targets` by our names."""
    entries = []
    for ours in targets:
        theirs, (out, width) = LINEAR[ours]
        key = ADAPTER_KEY + theirs
        entries += [
            Entry(f"layers/{ours}/a", f"{key}.lora_A.weight", "transpose", ("R", width)),
            Entry(f"layers/{ours}/b", f"{key}.lora_B.weight", "transpose", (out, "R")),
        ]
        if use_dora:
            entries.append(Entry(f"layers/{ours}/magnitude", f"{key}.lora_magnitude_vector", "none", (out,)))
    return tuple(entries)


def sizes(config: Mapping) -> dict[str, int]:
    """Sizes of the letters from Hugging Face's config. ValueError for missing, wrong or unsupported fields."""
    built = DreamConfig.from_hf(config)
    return {
        "V": built.vocab_size, "D": built.hidden_size, "F": built.intermediate_size,
        "Q": built.hidden_size, "J": built.head_width * built.num_kv_heads,
    }  # fmt: skip


def table(about: Mapping) -> tuple[Entry, ...]:
    """Entries of a converted Dream, from its config.json."""
    return BACKBONE_INT8 if about.get("base_dtype") == "int8" else BACKBONE


ROOTS = (r"(?:base_model\.model\.)?model\.(?:embed_tokens|layers|norm)", "lm_head")
KEYS = Keys("a Dream model", ROOTS, table, lambda about: sizes(about["hf_config"]))
