"""GPT-2 (Radford et al. 2019; `openai-community/gpt2-large`): a causal network that scores texts.

Token and position embeddings, N pre-LayerNorm layers of causal attention and MLP, a final LayerNorm; `vocab.head`
applies the output matrix. Whole texts padded on the right, which causality makes harmless; no cache, no dropout.

Parameters: nested dict with layers stacked on axis 0, matrices [in, out] in the compute dtype, vectors float32; the
vocabulary is zero-padded to a multiple of 128. Residual stream, norms and softmax in float32, as in `dit`.

Letters: B batch, L length, D width, V vocabulary, K heads, d head width, F MLP width, P positions, N layers."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from softmask_jax.models.nn import layers
from softmask_jax.models.nn.config_fields import TRANSFORMERS, check_unknown, check_values
from softmask_jax.models.nn.network_config import DTYPES, Sizes
from softmask_jax.models.nn.scan import scan_layers

_TANH, _ERF = partial(jax.nn.gelu, approximate=True), partial(jax.nn.gelu, approximate=False)
ACTIVATIONS = {"gelu_new": _TANH, "gelu_pytorch_tanh": _TANH, "gelu_fast": _TANH, "gelu": _ERF, "relu": jax.nn.relu}

# config.json -> GPT2Config
HUGGING_FACE = {
    "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_layers", "n_head": "num_heads",
    "n_positions": "max_positions",
}  # fmt: skip
# config.json -> (GPT2Config, default)
OPTIONAL = {
    "layer_norm_epsilon": ("norm_eps", 1e-5), "activation_function": ("activation", "gelu_new"),
    "scale_attn_weights": ("scale_by_width", True), "scale_attn_by_inverse_layer_idx": ("scale_by_layer", False),
    "tie_word_embeddings": ("tied", True),
}  # fmt: skip
BUILT = {"add_cross_attention": (False,)}
# For training, classification heads, float16 products.
HARMLESS = frozenset("""
    attn_pdrop embd_pdrop gradient_checkpointing n_ctx n_special output_past predict_special_tokens
    reorder_and_upcast_attn resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj
""".split())
KNOWN = HARMLESS | TRANSFORMERS | {*HUGGING_FACE, *OPTIONAL, *BUILT, "n_inner"}


@dataclass(frozen=True)
class GPT2Config(Sizes):
    """Shape and execution; ValueError for impossible values."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    mlp_width: int
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    scale_by_width: bool = True  # divide scores by sqrt d
    scale_by_layer: bool = False  # and by the layer's number, from 1
    tied: bool = True  # the output matrix is the embedding
    compute_dtype: str = "float32"  # or "bfloat16"

    def __post_init__(self):
        for name in (*HUGGING_FACE.values(), "mlp_width"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 10**7:
                raise ValueError(f"GPT2Config.{name} must be a positive number, got {value!r:.40}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}.")
        if type(self.norm_eps) not in (int, float) or not self.norm_eps > 0:
            raise ValueError(f"GPT2Config.norm_eps must be above 0, got {self.norm_eps!r:.40}.")
        for name, allowed in (("activation", ACTIVATIONS), ("compute_dtype", DTYPES)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Unknown {name} {value!r:.40}; choose one of {', '.join(allowed)}.")
        for name in ("scale_by_width", "scale_by_layer", "tied"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"GPT2Config.{name} must be true or false, got {getattr(self, name)!r:.40}.")

    @classmethod
    def from_hf(cls, config_json: dict, **overrides) -> "GPT2Config":
        """Shape from Hugging Face's config.json, execution from `overrides`. ValueError for another network."""
        if (kind := config_json.get("model_type")) != "gpt2":
            raise ValueError(f"config.json has model_type = {kind!r:.60}; only GPT-2's family ('gpt2') is built here.")
        missing = [key for key in HUGGING_FACE if config_json.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is it the config.json of a GPT-2?")
        check_values(config_json, "config.json", BUILT)
        check_unknown(config_json, "config.json", KNOWN)
        sizes = {ours: config_json[theirs] for theirs, ours in HUGGING_FACE.items()}
        for theirs, (ours, default) in OPTIONAL.items():
            sizes[ours] = default if config_json.get(theirs) is None else config_json[theirs]
        width = config_json.get("n_inner")
        sizes["mlp_width"] = 4 * sizes["hidden_size"] if width is None else width
        return cls(**sizes | overrides)


def shapes(config: GPT2Config) -> dict:
    """Tree of parameters as shapes and dtypes."""
    width, inner, depth = config.hidden_size, config.mlp_width, config.num_layers

    def matrix(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, config.compute_dtype)

    def norm(*front: int) -> dict:
        return {name: jax.ShapeDtypeStruct((*front, width), jnp.float32) for name in ("scale", "bias")}

    def linear(fan_in: int, fan_out: int) -> dict:
        return {"kernel": matrix(depth, fan_in, fan_out), "bias": jax.ShapeDtypeStruct((depth, fan_out), jnp.float32)}

    tables = {"embed": {"table": matrix(config.padded_vocab_size, width)}}
    if not config.tied:
        tables["head"] = {"weight": matrix(config.padded_vocab_size, width)}
    return tables | {
        "positions": {"table": matrix(config.max_positions, width)},
        "layers": {
            "attn_norm": norm(depth), "qkv": linear(width, 3 * width), "attn_out": linear(width, width),
            "mlp_norm": norm(depth), "mlp_in": linear(width, inner), "mlp_out": linear(inner, width),
        },
        "final_norm": norm(),
    }  # fmt: skip


def head(params: dict) -> Array:
    """Output matrix [Vpad D]."""
    return params["head"]["weight"] if "head" in params else params["embed"]["table"]


def embed(config: GPT2Config, params: dict, tokens: Array) -> Array:
    """Token ids [B L] -> embeddings [B L D] float32, positions from 0; an id outside the table gives NaN."""
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= config.max_positions:
        raise ValueError(f"tokens must be [B L] with L in 1..{config.max_positions}, got {tokens.shape}.")
    rows = jnp.asarray(params["embed"]["table"]).at[tokens].get(mode="fill", fill_value=jnp.nan)
    places = jnp.asarray(params["positions"]["table"])[: tokens.shape[1]]
    return rows.astype(jnp.float32) + places.astype(jnp.float32)


def hidden(config: GPT2Config, params: dict, tokens: Array, constrain: Callable[[Array], Array] = lambda x: x) -> Array:
    """Tokens [B L] -> final hidden states [B L D] in the compute dtype; constrain: layout of [B L D] on a mesh."""
    def layer(parameters: dict, index: Array, x: Array) -> Array:
        return run_layer(config, parameters, index, x, constrain)

    x = scan_layers(layer, params["layers"], constrain(embed(config, params, tokens)))
    return constrain(layer_norm(x, params["final_norm"], config.norm_eps).astype(config.compute_dtype))


def run_layer(config: GPT2Config, parameters: dict, index: Array, x: Array,
              constrain: Callable[[Array], Array] = lambda x: x) -> Array:
    """One layer: its slice of params["layers"], its index, x [B L D] float32 -> the same."""
    dtype = jnp.dtype(config.compute_dtype)

    def linear(name: str, x: Array) -> Array:
        return layers.product(x, parameters[name]["kernel"]) + parameters[name]["bias"].astype(dtype)

    inside = layer_norm(x, parameters["attn_norm"], config.norm_eps).astype(dtype)
    q, k, v = jnp.split(linear("qkv", inside).reshape(*x.shape[:2], -1, config.head_width), 3, axis=2)
    scale = config.head_width**-0.5 if config.scale_by_width else 1.0
    q = q * jnp.asarray(scale / (index + 1) if config.scale_by_layer else scale, dtype)
    x = x + constrain(linear("attn_out", attend(q, k, v).reshape(x.shape)))
    inside = layer_norm(x, parameters["mlp_norm"], config.norm_eps).astype(dtype)
    return x + constrain(linear("mlp_out", ACTIVATIONS[config.activation](linear("mlp_in", inside))))


def attend(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of scaled queries, all [B L K d]; softmax in float32."""
    if layers.choose_attention("auto", q.dtype, q.shape[-1]) == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    precise, length = layers.exact(q.dtype), q.shape[2]
    scores = jnp.matmul(q, k.swapaxes(-1, -2), precision=precise, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.matmul(weights, v, precision=precise, preferred_element_type=jnp.float32)
    return mixed.astype(v.dtype).swapaxes(1, 2)


def layer_norm(x: Array, parameters: dict, epsilon: float) -> Array:
    """LayerNorm over the last axis with {"scale", "bias"}, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * parameters["scale"] + parameters["bias"]
