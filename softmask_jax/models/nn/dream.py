"""Dream (`DreamLM/Dream`) and LLaDA (`ML-GSAI/LLaDA`): Qwen2.5's or Llama's architecture, bidirectional attention.

Embedding, N layers of grouped-query attention and gated MLP with pre-RMSNorm, and a final RMSNorm; `vocab.head` applies
the output matrix. Dream's logits for position i are at i - 1: `shift` moves the hidden states. With an `AdapterConfig`
the parameters are {**base, "adapter": adapter} (`dora`). The vocabulary is zero-padded to a multiple of 128.

Matrix products and the residual stream in `compute_dtype`, as PyTorch's bfloat16 model was trained (and full
rematerialisation stores that stream for every layer); norms, rotary angles, softmax and DoRA's scale in float32.

Letters: B batch, L length, D width, V vocabulary, K query heads, G key/value heads, d head width, F MLP, N layers."""
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from softmask_jax.models.nn import dora, layers, scan, splash, stack
from softmask_jax.models.nn.cache import Cache, Slot, Window, check_window, positions_of, window_of
from softmask_jax.models.nn.dora import AdapterConfig
from softmask_jax.models.nn.dream_config import DreamConfig
from softmask_jax.models.nn.scan import scan_layers
from softmask_jax.models.nn.splash import Layout

INITIAL_STD = 0.02


def _plain(name: str, linear: layers.Linear, x: Array) -> Array:
    return linear(x)


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: DreamConfig, rngs: nnx.Rngs):
        width, hidden, dtype = config.hidden_size, config.intermediate_size, jnp.dtype(config.param_dtype)
        keys = config.num_kv_heads * config.head_width
        norm = partial(layers.RMSNorm, width, config.norm_eps, dtype)
        linear = partial(layers.Linear, rngs=rngs, std=INITIAL_STD, dtype=dtype, int8=config.base_dtype == "int8")
        self.config = config
        self.attn_norm = norm()
        self.q = linear(width, width, axes=("embed", "qkv"), bias=config.qkv_bias)
        self.k = linear(width, keys, axes=("embed", "kv"), bias=config.qkv_bias)
        self.v = linear(width, keys, axes=("embed", "kv"), bias=config.qkv_bias)
        self.o = linear(width, width, axes=("heads", "embed"), bias=False)
        self.mlp_norm = norm()
        self.gate = linear(width, hidden, axes=("embed", "mlp"), bias=False)
        self.up = linear(width, hidden, axes=("embed", "mlp"), bias=False)
        self.down = linear(hidden, width, axes=("mlp", "embed"), bias=False)

    def __call__(self, x: Array, angles, segment_ids: Array | None, adapt: Callable = _plain,
                 constrain: Callable[[Array], Array] = lambda x: x, layout: Layout | None = None,
                 slot: Slot | None = None) -> Array:
        """x [B L D] in the compute dtype, angles of `rotary_angles`, slot: cache of this layer.
        adapt(name, linear, x): applies a product, with its adapter if any."""
        x = x + constrain(self.attention(self.attn_norm(x).astype(x.dtype), angles, segment_ids, adapt, layout, slot))
        inside = self.mlp_norm(x).astype(x.dtype)
        gate, up = (checkpoint_name(adapt(name, getattr(self, name), inside), name) for name in scan.MLP)
        gated = jax.nn.silu(gate) * up
        return x + constrain(adapt("down", self.down, gated))

    def attention(self, x: Array, angles, segment_ids: Array | None, adapt: Callable = _plain,
                  layout: Layout | None = None, slot: Slot | None = None) -> Array:
        """Grouped-query attention with its output projection, [B L D] -> [B L D]."""
        config = self.config
        q, k, v = (adapt(name, getattr(self, name), x) for name in ("q", "k", "v"))
        q, k, v = (y.reshape(*x.shape[:2], -1, config.head_width) for y in (q, k, v))
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)
        return adapt("o", self.o, splash.attention(config, q, k, v, segment_ids, layout, slot).reshape(x.shape))


class Table(nnx.Module):
    """One matrix [Vpad D] with zero pad rows, under the given name."""

    def __init__(self, name: str, config: DreamConfig, rngs: nnx.Rngs):
        shape, dtype = (config.vocab_size, config.hidden_size), jnp.dtype(config.param_dtype)
        rows = layers.normal(rngs.params(), shape, INITIAL_STD, dtype)
        padding = config.padded_vocab_size - config.vocab_size
        setattr(self, name, nnx.Param(jnp.pad(rows, ((0, padding), (0, 0))), axes=("vocab", "embed")))


class Shell(nnx.Module):
    """Everything but the layers."""

    def __init__(self, config: DreamConfig, rngs: nnx.Rngs):
        self.embed = Table("table", config, rngs)
        self.final_norm = layers.RMSNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype))
        if not config.tied:
            self.head = Table("weight", config, rngs)


STACK = stack.Stack(Shell, Layer, "layers")
init, logical_axes, layer = STACK.init, STACK.logical_axes, STACK.merged_layer
embed, embedding = stack.embed, stack.embedding


def shift(hidden: Array, window: Window | None = None, segment_ids: Array | None = None) -> Array:
    """Move hidden states [B L D] to the positions they predict: i gets i - 1's, position 0 keeps its own.

    segment_ids: [B L], 0 for padding; a row's first token after padding also keeps its own, as without padding.
    In a window, the first fresh position gets `window.before` [B D], or keeps its own without."""
    moved = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    if segment_ids is not None:
        padded = jnp.pad(segment_ids[:, :-1] == 0, ((0, 0), (1, 0)))
        moved = jnp.where((padded & (segment_ids != 0))[..., None], hidden, moved)
    if window is None or (window.fresh is None and window.before is None):
        return moved
    own = jax.lax.dynamic_slice_in_dim(hidden, window.first, 1, 1)
    first = own if window.before is None else window.before[:, None].astype(hidden.dtype)
    return jax.lax.dynamic_update_slice_in_dim(moved, first, window.first, 1)


def padded_inputs(attention_mask: Array) -> tuple[Array, Array]:
    """Positions and segment_ids, both [B L], from an attention_mask [B L]: 1 at tokens, 0 at pads.

    Tokens count from 0. Pads are at position 1 and see only pads, so that they stay finite."""
    real = jnp.asarray(attention_mask) != 0
    return jnp.where(real, jnp.cumsum(real, axis=1) - 1, 1), real.astype(jnp.int32)


@lru_cache
def trunk(config: DreamConfig, constrain: Callable[[Array], Array] = lambda x: x,
          adapter: AdapterConfig | None = None,
          layout: Layout | None = None,
          gather: Callable[[dict], dict] = lambda layer: layer) -> Callable[..., tuple[Array, Cache | None]]:
    """Function from embeddings to final hidden states, not shifted; cached, so the same object for equal configs.

    trunk(config)(params, x [B L D], *, sigma=None, positions=None [L] or [B L], segment_ids=None [B L], cache=None,
    dropout_keys=None [B] typed keys, for an adapter) -> (hidden [B L D] in the compute dtype, cache or None). Attention
    stays within a segment. `cache`: see `nn.cache`. On a mesh, constrain: layout of [B L D] activations, layout: that
    of attention kernels, gather: of a layer's parameters before use.
    ValueError for wrong shapes, untyped keys, a noise level, or an unfit adapter or cache."""

    def run(params: dict, x: Array, *, sigma: None = None, positions: Array | None = None,
            segment_ids: Array | None = None, cache: Window | bool | None = None, dropout_keys: Array | None = None):
        if sigma is not None:
            raise ValueError("This network is not conditioned on the noise level; pass sigma=None.")
        layers.check_inputs(config.hidden_size, x, positions, segment_ids, dropout_keys)
        _check_adapter(params, adapter)
        window = window_of(cache)
        if window is not None:
            check_window(window, x, segment_ids, config.num_layers, config.num_kv_heads, config.head_width,
                         config.compute_dtype)
        positions = positions_of(x, window) if positions is None else positions
        angles = layers.rotary_angles(positions, config.head_width, config.rope_base)
        keys = dropout_keys if adapter is not None and adapter.dropout > 0 else None

        def one(parameters: tuple[dict, dict | None, Cache | None], index: Array, x: Array):
            base, low, kept = parameters
            slot = None if cache is None else Slot(kept, window)

            def adapt(name: str, linear: layers.Linear, x: Array) -> Array:
                if low is None or name not in low:
                    return linear(x)
                own = None
                if keys is not None:
                    own = jax.vmap(lambda key: dora.fold_name(jax.random.fold_in(key, index), name))(keys)
                bias = None if linear.bias is None else linear.bias[...]
                scale = None if linear.kernel_scale is None else linear.kernel_scale[...]
                return dora.apply(linear.kernel[...], bias, low[name], x, adapter, own, scale)

            x = layer(config, gather(base))(x, angles, segment_ids, adapt, constrain, layout, slot)
            return x if slot is None else (x, slot.kept)

        stacked = params["layers"], params["adapter"]["layers"] if adapter else None, window and window.kept
        x = scan_layers(one, stacked, constrain(x.astype(config.compute_dtype)), remat=config.remat,
                        unroll=config.unroll, keep=cache is not None)
        x, kept = (x, None) if cache is None else x
        hidden = layers.rms_norm(x, params["final_norm"]["scale"], config.norm_eps)
        return constrain(hidden.astype(config.compute_dtype)), kept

    return run


def _check_adapter(params: dict, adapter: AdapterConfig | None) -> None:
    if adapter is None and "adapter" in params:
        raise ValueError("The parameters hold an adapter, but the trunk was made without; give it its AdapterConfig.")
    if adapter is not None:
        if "adapter" not in params:
            raise ValueError('The trunk was made with an adapter; put one into params["adapter"].')
        dora.check(params["adapter"], adapter, (name for name, leaf in params["layers"].items() if "kernel" in leaf))


def num_params(config: DreamConfig) -> int:
    """Number of parameters without vocabulary padding and adapter: 7,615,616,512 for V = 152,064."""
    # Scales of int8 kernels do not count.
    return STACK.num_params(replace(config, base_dtype="float"))


def attention_share(config: DreamConfig) -> float:
    """Share of q, k, v and o in the FLOPs of a layer's products with weights: 1/8 for Dream-7B, 0.31 for LLaDA-8B."""
    width, keys = config.hidden_size, config.num_kv_heads * config.head_width
    attention = 4 * width**2 + 4 * width * keys
    return attention / (attention + 6 * width * config.intermediate_size)


def flops_per_token(config: DreamConfig, seq_len: int) -> int:
    """FLOPs per token of a forward pass's matrix products (a multiply-add is 2), without an adapter.

    N (4 D^2 [q, o] + 4 D G d [k, v] + 6 D F [MLP] + 4 L D [attention]) + 2 D V [head]. A backward pass costs twice as
    much again, with a frozen base about as much."""
    width, keys = config.hidden_size, config.num_kv_heads * config.head_width
    layer = 4 * width**2 + 4 * width * keys + 6 * width * config.intermediate_size + 4 * seq_len * width
    return config.num_layers * layer + 2 * width * config.vocab_size
