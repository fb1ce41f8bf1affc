"""Shape and execution of Dream's network (`dream`), and how they are read from Hugging Face's config.json."""
import math
from dataclasses import dataclass

from softmask_jax.models.scan import check_remat
from softmask_jax.models.splash import ATTENTION

VOCABULARY_MULTIPLE = 128  # so that the vocabulary shards over any usual number of devices
DTYPES = ("float32", "bfloat16")
BASE_DTYPES = ("float", "int8")

# config.json -> DreamConfig
HUGGING_FACE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "rope_theta": "rope_base",
    "rms_norm_eps": "norm_eps",
}
# What this network does not do, with the values under which it is not asked to.
NOT_BUILT = {
    "tie_word_embeddings": (False, None),
    "hidden_act": ("silu", None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}


@dataclass(frozen=True)
class DreamConfig:
    """Shape and execution; the defaults are Dream-7B's. ValueError when the numbers cannot be built.

    param_dtype, compute_dtype: "float32" or "bfloat16". base_dtype: "float" (every parameter in param_dtype), or
    "int8" for the kernels of the layers, which then cannot be trained (`layers.quantised`). remat: a name from `scan.REMAT`. attention: a name from
    `splash.ATTENTION`. unroll: a Python loop over layers instead of a scan (the same numbers; for tests).
    """

    vocab_size: int
    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    intermediate_size: int = 18944
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    param_dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    base_dtype: str = "float"
    remat: str = "full"
    attention: str = "auto"
    unroll: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"DreamConfig.{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by 2 * num_heads = {2 * self.num_heads}: every head "
                "needs the same even width, its rotary embedding pairs channels."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be divisible by num_kv_heads {self.num_kv_heads}: every key/value "
                "head serves the same number of query heads."
            )
        if self.rope_base <= 1.0:
            raise ValueError(f"DreamConfig.rope_base must be above 1, got {self.rope_base}.")
        if not self.norm_eps > 0.0:
            raise ValueError(f"DreamConfig.norm_eps must be above 0, got {self.norm_eps}.")
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(DTYPES)}.")
        if self.base_dtype not in BASE_DTYPES:
            raise ValueError(f"Unknown base_dtype {self.base_dtype!r}; choose one of {', '.join(BASE_DTYPES)}.")
        if self.attention not in ATTENTION:
            raise ValueError(f"Unknown attention {self.attention!r}; choose one of {', '.join(ATTENTION)}.")
        if self.attention in ("cudnn", "splash") and self.compute_dtype != "bfloat16":
            raise ValueError(f"attention={self.attention!r} computes in bfloat16 only; set compute_dtype='bfloat16' or "
                             "attention='auto'.")
        check_remat(self.remat)

    @classmethod
    def from_hf(cls, config_json: dict, **overrides) -> "DreamConfig":
        """Sizes from Hugging Face's config.json, execution from `overrides` (which may replace sizes too).

        ValueError naming every missing key, and for a network that is not this one (tied head, scaled rotary angles).
        """
        missing = [key for key in HUGGING_FACE if config_json.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is it the config.json of a Dream model?")
        for key, allowed in NOT_BUILT.items():
            if config_json.get(key) not in allowed:
                raise ValueError(f"config.json has {key} = {config_json[key]!r}; this network has {allowed[0]!r}.")
        sizes = {ours: config_json[theirs] for theirs, ours in HUGGING_FACE.items()}
        config = cls(**{**sizes, **overrides})
        if config_json.get("head_dim") not in (None, config.head_width):
            raise ValueError(f"config.json has head_dim = {config_json['head_dim']}; this network has hidden_size / "
                             f"num_attention_heads = {config.head_width}.")
        return config

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
