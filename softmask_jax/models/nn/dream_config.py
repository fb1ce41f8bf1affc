"""Shape and execution of Dream (`dream`), and their reader from Hugging Face's config.json."""
import math
from collections.abc import Mapping
from dataclasses import dataclass

from softmask_jax.models.nn.config_fields import TRANSFORMERS, check_unknown, check_values, is_off
from softmask_jax.models.nn.network_config import DTYPES, NetworkConfig
from softmask_jax.models.nn.scan import REMAT
from softmask_jax.models.nn.splash import ATTENTION

BASE_DTYPES = ("float", "int8")

# config.json -> DreamConfig
HUGGING_FACE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
}
BUILT = {
    "tie_word_embeddings": (False,), "hidden_act": ("silu", "swish"), "use_sliding_window": (False,),
    "attention_bias": (True,), "mlp_bias": (False,), "partial_rotary_factor": (1.0,),
}  # fmt: skip
# Rotary settings of transformers 4 and 5; the base may also be at the top level, as rope_theta.
ROPE = ("rope_parameters", "rope_scaling")
ROPE_BUILT = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
# For training and sampling, or without effect as use_sliding_window is false.
HARMLESS = ("attention_dropout", "mask_token_id", "max_position_embeddings", "max_window_layers", "sliding_window")
KNOWN = frozenset((*HUGGING_FACE, *BUILT, *ROPE, *HARMLESS, "head_dim", "layer_types")) | TRANSFORMERS


@dataclass(frozen=True, kw_only=True)
class DreamConfig(NetworkConfig):
    """Shape and execution of a Dream, or a LLaDA (`llada_config`)."""

    num_layers: int
    num_kv_heads: int
    intermediate_size: int
    norm_eps: float
    qkv_bias: bool = True  # of Dream; LLaDA has no biases
    tied: bool = False  # the embedding is the output matrix too
    param_dtype: str = "float32"  # or "bfloat16"
    base_dtype: str = "float"  # param_dtype everywhere; "int8": kernels of the layers, then frozen (`layers.quantised`)
    implementations = ATTENTION
    policies = tuple(REMAT)

    @property
    def depth(self) -> int:
        return self.num_layers

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be divisible by num_kv_heads {self.num_kv_heads}: every key/value "
                "head serves the same number of query heads."
            )
        if not self.norm_eps > 0.0:
            raise ValueError(f"DreamConfig.norm_eps must be above 0, got {self.norm_eps}.")
        self._check_choice("param_dtype", DTYPES)
        self._check_choice("base_dtype", BASE_DTYPES)

    @classmethod
    def from_hf(cls, config_json: Mapping, **overrides) -> "DreamConfig":
        """Sizes from Hugging Face's config.json, execution from `overrides` (which may replace sizes too).

        ValueError naming every missing key, or for another network (tied head, scaled rotary angles)."""
        sizes = {theirs: config_json.get(theirs) for theirs in HUGGING_FACE} | {"rope_theta": _rope_base(config_json)}
        if missing := [theirs for theirs, value in sizes.items() if value is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is it the config.json of a Dream model?")
        for theirs, value in sizes.items():
            real = theirs in ("rms_norm_eps", "rope_theta")
            number = type(value) is int or (real and type(value) is float)
            if not number or not 0 < value < (math.inf if real else 10**7):
                raise ValueError(f"config.json: {theirs} is {value!r:.60}; a Dream model needs a positive number.")
        check_values(config_json, "config.json", BUILT)
        kinds = config_json.get("layer_types")
        if not is_off(kinds) and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
            raise ValueError(f"config.json has layer_types = {kinds!r:.60}; every layer here is full_attention.")
        config = cls(**{ours: sizes[theirs] for theirs, ours in HUGGING_FACE.items()} | overrides)
        if config_json.get("head_dim") not in (None, config.head_width):
            raise ValueError(f"config.json has head_dim = {config_json['head_dim']!r:.60}; this network has hidden_size "
                             f"/ num_attention_heads = {config.head_width}.")
        return config


def special_ids(config_json: Mapping) -> tuple[int, tuple[int, ...], int | None]:
    """(mask, ends of text, padding) of config.json; padding defaults to the first end, or None.
    ValueError for ids outside the vocabulary, or without a mask."""
    ids, vocab_size = {}, config_json["vocab_size"]
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        value = config_json.get(name)
        ids[name] = value if isinstance(value, list) else [] if value is None else [value]
        valid = all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids[name])
        if not valid or (name == "mask_token_id" and len(ids[name]) != 1):
            raise ValueError(f"config.json has {name} = {value!r:.60}; it must be one of the {vocab_size} tokens.")
    mask, ends, pads = ids.values()
    return mask[0], tuple(ends), next(iter(pads + ends), None)


def _rope_base(config_json: Mapping):
    """Base of the rotary embedding, wherever config.json has it; None if missing."""
    bases = {"rope_theta": config_json.get("rope_theta")}
    for name in ROPE:
        if is_off(entry := config_json.get(name)):
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"config.json has {name} = {entry!r:.60}, which is no JSON object.")
        check_values(entry, f"config.json: {name}", ROPE_BUILT)
        check_unknown(entry, f"config.json: {name}", {*ROPE_BUILT, "rope_theta"})
        bases[f"{name}.rope_theta"] = entry.get("rope_theta")
    bases = {name: base for name, base in bases.items() if base is not None}
    base = next(iter(bases.values()), None)
    if any(other != base for other in bases.values()):
        listed = ", ".join(f"{name} = {other!r:.40}" for name, other in bases.items())
        raise ValueError(f"config.json has {listed}, which disagree; keep the one that the model was trained with.")
    return base
