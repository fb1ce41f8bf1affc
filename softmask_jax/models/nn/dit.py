"""MDLM's diffusion transformer (arXiv 2406.07524; `kuleshov-group/mdlm`).

Embedding, N blocks of bidirectional attention and MLP with adaptive layer norm (adaLN) on the noise level, and a final
adaLN; `vocab.head` applies the output matrix. Without time conditioning the network runs at sigma = 0, as the released
weights expect. The vocabulary is zero-padded to a multiple of 128.

Matrix products in `compute_dtype`, everything else in float32, as in the reference: bfloat16 would round away the 2N
small updates of the residual stream.

Letters: B batch, L length, D width, V vocabulary, K heads, N blocks, C conditioning width."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from softmask_jax.models.nn import layers, splash, stack
from softmask_jax.models.nn.cache import Cache, Slot, Window, check_window, positions_of, window_of
from softmask_jax.models.nn.network_config import NetworkConfig
from softmask_jax.models.nn.scan import scan_layers
from softmask_jax.models.nn.splash import Layout


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkConfig):
    """Shape and execution of a DiT."""

    num_blocks: int
    cond_dim: int
    mlp_ratio: int  # MLP width / hidden_size
    dropout: float = 0.0  # on residual branches, if dropout keys are given
    implementations = splash.ATTENTION

    @property
    def depth(self) -> int:
        return self.num_blocks

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"DiTConfig.dropout must be in [0, 1), got {self.dropout}.")


class Block(nnx.Module):
    """Attention and MLP, each x + gate * dropout(branch(modulate(norm(x)))); all gates start at zero."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.config = config
        self.norm1 = layers.LayerNorm(width)
        self.qkv = layers.Linear(width, 3 * width, axes=("embed", "qkv"), rngs=rngs, bias=False)
        self.attn_out = layers.Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=False)
        self.norm2 = layers.LayerNorm(width)
        self.mlp_in = layers.Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.mlp_out = layers.Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)
        self.adaln = layers.Linear(config.cond_dim, 6 * width, axes=("cond", "mod"), rngs=rngs, zero=True)

    def __call__(self, x: Array, condition: Array, angles, segment_ids: Array | None, keys: Array | None,
                 constrain: Callable[[Array], Array], layout: Layout | None = None, slot: Slot | None = None) -> Array:
        """x [B L D] float32, condition [1|B C], angles of `rotary_angles`, dropout keys [B], cache of this layer.
        constrain: layout of branches before the residual sum (jax 0.10 gave wrong sums without on a 2 x 2 x 2 mesh)."""
        rate, dtype = self.config.dropout, jnp.dtype(self.config.compute_dtype)
        # Float32 costs nothing (one row per sequence), and the gates scale every update of the residual.
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.adaln(condition)[:, None], 6, axis=-1)

        def add(x: Array, branch: Array, gate: Array, which: int) -> Array:
            branch_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, which))(keys)
            return x + gate * layers.dropout(constrain(branch), branch_keys, rate)

        inside = layers.modulate(self.norm1(x), shift1, scale1).astype(dtype)
        x = add(x, self.attn_out(self.attention(inside, angles, segment_ids, layout, slot)), gate1, 0)
        inside = layers.modulate(self.norm2(x), shift2, scale2).astype(dtype)
        return add(x, self.mlp_out(jax.nn.gelu(self.mlp_in(inside), approximate=True)), gate2, 1)

    def attention(self, x: Array, angles, segment_ids: Array | None, layout: Layout | None = None,
                  slot: Slot | None = None) -> Array:
        """Multi-head attention before its output projection, [B L D] -> [B L D]; qkv is laid out (3, K, d)."""
        config = self.config
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, config.num_heads, config.head_width), 2, 0)
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)
        return splash.attention(config, q, k, v, segment_ids, layout, slot).reshape(x.shape)


class Embedding(nnx.Module):
    """Token table [Vpad D] with zero pad rows."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        table = layers.uniform_fan_in(rngs.params(), (config.vocab_size, config.hidden_size), config.hidden_size)
        padding = config.padded_vocab_size - config.vocab_size
        self.table = nnx.Param(jnp.pad(table, ((0, padding), (0, 0))), axes=("vocab", "embed"))


class Final(nnx.Module):
    """Final adaptive layer norm."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.norm = layers.LayerNorm(config.hidden_size)
        self.adaln = layers.Linear(config.cond_dim, 2 * config.hidden_size, axes=("cond", "mod"), rngs=rngs, zero=True)

    def __call__(self, x: Array, condition: Array) -> Array:
        shift, scale = jnp.split(self.adaln(condition)[:, None], 2, axis=-1)
        return layers.modulate(self.norm(x), shift, scale)


class Head(nnx.Module):
    """Untied output matrix and bias, initially zero."""

    def __init__(self, config: DiTConfig):
        shape = (config.padded_vocab_size, config.hidden_size)
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float32), axes=("vocab", "embed"))
        self.bias = nnx.Param(jnp.zeros(shape[:1], jnp.float32), axes=("vocab",))


class Shell(nnx.Module):
    """Everything but the blocks."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs)
        self.sigma_map = layers.TimestepMLP(config.cond_dim, rngs=rngs)
        self.final = Final(config, rngs)
        self.head = Head(config)


STACK = stack.Stack(Shell, Block, "blocks")
init, logical_axes, num_params, shell = STACK.init, STACK.logical_axes, STACK.num_params, STACK.merged_shell
embed, embedding = stack.embed, stack.embedding


def condition(config: DiTConfig, params: dict, sigma: Array | None) -> Array:
    """Conditioning [1|B C] from noise levels [B]; None: sigma = 0, computed once."""
    sigma = jnp.zeros((1,), jnp.float32) if sigma is None else sigma
    return jax.nn.silu(shell(config, params).sigma_map(sigma))


def run_blocks(config: DiTConfig, params: dict, x: Array, condition: Array, *, positions: Array | None = None,
               segment_ids: Array | None = None, dropout_keys: Array | None = None,
               constrain: Callable[[Array], Array] = lambda x: x, layout: Layout | None = None,
               cache: Window | bool | None = None):
    """x [B L D] -> residual stream [B L D] float32 before the final norm; with a cache (x, cache)."""
    window = window_of(cache)
    positions = positions_of(x, window) if positions is None else positions
    angles = layers.rotary_angles(positions, config.head_width, config.rope_base)
    keys = dropout_keys if config.dropout > 0 else None

    def layer(parameters: tuple[dict, Cache | None], index: Array, x: Array):
        layer_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        slot = None if cache is None else Slot(parameters[1], window)
        block = STACK.merged_layer(config, parameters[0])
        x = block(x, condition, angles, segment_ids, layer_keys, constrain, layout, slot)
        return x if slot is None else (x, slot.kept)

    stacked = params["blocks"], window and window.kept
    return scan_layers(layer, stacked, constrain(x.astype(jnp.float32)), remat=config.remat, unroll=config.unroll,
                       keep=cache is not None)


@lru_cache
def trunk(config: DiTConfig, constrain: Callable[[Array], Array] = lambda x: x,
          layout: Layout | None = None) -> Callable[..., tuple[Array, Cache | None]]:
    """Function from embeddings to final hidden states; cached, so the same object for equal configs.

    trunk(config)(params, x [B L D], *, sigma=None [B], positions=None [L] or [B L], segment_ids=None [B L], cache=None,
    dropout_keys=None [B] typed keys) -> (hidden [B L D] in the compute dtype, cache or None). Attention stays within a
    segment. `cache`: see `nn.cache`. On a mesh, constrain: layout of [B L D] activations, layout: that of attention.
    ValueError for wrong shapes, untyped keys, or a cache with a noise level."""

    def run(params: dict, x: Array, *, sigma: Array | None = None, positions: Array | None = None,
            segment_ids: Array | None = None, cache: Window | bool | None = None, dropout_keys: Array | None = None):
        layers.check_inputs(config.hidden_size, x, positions, segment_ids, dropout_keys)
        if sigma is not None and sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma must have shape {x.shape[:1]}, one noise level per row, got {sigma.shape}.")
        if cache is not None and sigma is not None:
            raise ValueError("Keys and values of one noise level are of no use at the next: pass no sigma or no cache.")
        if isinstance(cache, Window):
            check_window(cache, x, segment_ids, config.num_blocks, config.num_heads, config.head_width,
                         config.compute_dtype)
        conditioning, kept = condition(config, params, sigma), None
        x = run_blocks(config, params, x, conditioning, positions=positions, segment_ids=segment_ids,
                       dropout_keys=dropout_keys, constrain=constrain, layout=layout, cache=cache)
        if cache is not None:
            x, kept = x
        hidden = constrain(shell(config, params).final(x, conditioning))
        return hidden.astype(config.compute_dtype), kept

    return run


def flops_per_token(config: DiTConfig, seq_len: int) -> int:
    """FLOPs per token of a forward pass's matrix products (a multiply-add is 2); backward costs twice as much again.

    N (8 D^2 [qkv, output] + 4 D F [MLP] + 4 L D [attention]) + 2 D V [head], F = mlp_ratio D; conditioning not counted.
    """
    width, hidden = config.hidden_size, config.mlp_ratio * config.hidden_size
    block = 8 * width**2 + 4 * width * hidden + 4 * seq_len * width
    return config.num_blocks * block + 2 * width * config.vocab_size
