"""Reader of LLaDA's config.json (`LLaDAModelLM`, OLMo's names) into the network's `DreamConfig`."""
import math
from collections.abc import Mapping

from softmask_jax.models.nn.config_fields import TRANSFORMERS, check_values
from softmask_jax.models.nn.dream_config import DreamConfig

# What `LLaDAConfig` takes for a missing entry, where it matters. A vocabulary and ends of text have no default here.
DEFAULTS = {
    "d_model": 768, "n_heads": 12, "n_layers": 12, "mlp_ratio": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "weight_tying": True, "embedding_size": 50304, "activation_type": "swiglu", "block_type": "sequential",
    "layer_norm_type": "default", "rope": False,
}  # fmt: skip
BUILT = {
    "activation_type": ("silu",), "block_type": ("llama",), "layer_norm_type": ("rms",), "rope": (True,),
    "alibi": (False,), "attention_layer_norm": (False,), "bias_for_layer_norm": (False,), "clip_qkv": (None,),
    "include_bias": (False,), "include_qkv_bias": (False,), "input_emb_norm": (False,),
    "layer_norm_with_affine": (True,), "rope_full_precision": (True,), "scale_logits": (False,),
}  # fmt: skip
SIZES = ("d_model", "n_heads", "n_layers", "vocab_size")
# For training, or without effect on this network.
HARMLESS = (
    "alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine", "block_group_size", "embedding_dropout",
    "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "mask_token_id",
    "max_sequence_length", "precision", "residual_dropout",
)  # fmt: skip
KNOWN = TRANSFORMERS | {
    *DEFAULTS, *BUILT, *SIZES, *HARMLESS, "mlp_hidden_size", "multi_query_attention", "n_kv_heads",
}  # fmt: skip


def from_hf(config_json: Mapping, **overrides) -> DreamConfig:
    """Sizes from Hugging Face's config.json, execution from `overrides` (which may replace sizes too).

    The vocabulary is that of the embedding: its rows past `vocab_size` have logits as any other.
    ValueError naming the entry that is wrong, or of another network."""
    config = DEFAULTS | dict(config_json)
    check_values(config, "config.json", BUILT)
    for name in BUILT:
        if name in DEFAULTS and config[name] is None:
            raise ValueError(f"config.json has {name} = None; only {BUILT[name][0]!r} is built here.")
    width, heads, vocab_size = (_count(config, name) for name in ("d_model", "n_heads", "vocab_size"))
    if width % (2 * heads):
        raise ValueError(f"config.json has d_model = {width}, which is no multiple of 2 * n_heads = {2 * heads}.")
    kv_heads = _kv_heads(config, heads)
    if config.get("mlp_hidden_size") is None:
        hidden = _number(config, "mlp_ratio") * width
    else:
        hidden = _count(config, "mlp_hidden_size")
    rows = vocab_size if config["embedding_size"] is None else _count(config, "embedding_size")
    if rows < vocab_size:
        raise ValueError(f"config.json has embedding_size = {rows}, less than vocab_size = {vocab_size}.")
    if type(tied := config["weight_tying"]) is not bool:
        raise ValueError(f"config.json has weight_tying = {tied!r:.60}, no boolean.")
    if hidden != int(hidden):
        raise ValueError(f"config.json has mlp_ratio * d_model = {hidden}, no whole number.")
    sizes = {
        "vocab_size": rows, "hidden_size": width, "num_layers": _count(config, "n_layers"), "num_heads": heads,
        "num_kv_heads": kv_heads, "intermediate_size": int(hidden), "norm_eps": _number(config, "rms_norm_eps"),
        "rope_base": _number(config, "rope_theta"), "qkv_bias": False, "tied": tied,
    }  # fmt: skip
    return DreamConfig(**sizes | overrides)


def _kv_heads(config: Mapping, heads: int) -> int:
    kv_heads = heads if config.get("n_kv_heads") is None else _count(config, "n_kv_heads")
    if (single := config.get("multi_query_attention")) is not None:
        if type(single) is not bool:
            raise ValueError(f"config.json has multi_query_attention = {single!r:.60}, no boolean.")
        wanted = 1 if single else heads
        if config.get("n_kv_heads") not in (None, wanted):
            raise ValueError(f"config.json has n_kv_heads = {kv_heads} and multi_query_attention = {single}, which "
                             "disagree; keep the one that the model was trained with.")
        return wanted
    if heads % kv_heads:
        raise ValueError(f"config.json has n_kv_heads = {kv_heads}, which does not divide n_heads = {heads}.")
    return kv_heads


def _count(config: Mapping, name: str) -> int:
    value = config.get(name)
    if value is None:
        raise ValueError(f"config.json lacks {name}; is it the config.json of a LLaDA model?")
    if type(value) is not int or not 0 < value < 10**7:
        raise ValueError(f"config.json: {name} is {value!r:.60}; a LLaDA model needs a positive whole number.")
    return value


def _number(config: Mapping, name: str) -> int | float:
    value = config[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} is {value!r:.60}; a LLaDA model needs a positive number.")
    return value
