"""Attention of a layer: implementation by name, cache, rematerialisation, and JAX's splash kernel for TPUs (flash
attention, without weights [K S L]), under `shard_map` on a mesh.

Letters: B batch, S queries, L keys (S without a cache's slice), K query heads, G key/value heads, d head width."""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from softmask_jax.models.nn import layers
from softmask_jax.models.nn.cache import Slot
from softmask_jax.models.nn.network_config import NetworkConfig
from softmask_jax.models.nn.scan import KEPT, remat_attention

ATTENTION = (*layers.ATTENTION, "splash")
WIDTH = 64  # head widths are multiples
LANES = 128  # of a register
LENGTH = 128  # S and L of a device are multiples
BLOCKS = (1024, 512, 256, 128)  # rows of q or k: larger blocks reuse more


@dataclass(frozen=True)
class Layout:
    """Mesh axes of the activations; keys and values are gathered over `sequence`."""

    mesh: Mesh
    rows: tuple[str, ...] = ()
    heads: str | None = None  # None: not sharded
    sequence: str | None = None  # of the queries

    @property
    def platform(self) -> str:
        """Platform of the mesh's devices, which may be absent (ahead-of-time compilation)."""
        return self.mesh.devices.flat[0].platform

    def here(self) -> "Layout":
        """For the calling code: within another `jax.shard_map` the context's mesh, whose manual axes split the rows."""
        context = jax.sharding.get_abstract_mesh()
        if not context.manual_axes:
            return self
        return replace(self, mesh=context, rows=tuple(axis for axis in self.rows if axis not in context.manual_axes))

    def parts(self, axes: str | tuple[str, ...] | None) -> int:
        """Number of shards over these axes."""
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def over_devices(self, attend: Callable) -> Callable:
        """attend(q, k, v, query segments, key segments) on each device's own rows, heads and queries."""
        own, all_ = (P(self.rows or None, places, self.heads, None) for places in (self.sequence, None))
        segments = P(self.rows or None, self.sequence), P(self.rows or None, None)
        specs = {"in_specs": (own, all_, all_, *segments), "out_specs": own}
        # check_vma=False: the kernel does not declare over which axes its outputs vary.
        return jax.shard_map(attend, mesh=self.mesh, **specs, check_vma=False)


def misfit(q: Array, k: Array, layout: Layout | None = None) -> str:
    """Why the kernel cannot take q [B S K d] and k [B L G d] (arrays or shapes); "" if it can."""
    (rows, queries, _, width), (_, keys, heads, _) = q.shape, k.shape
    if q.dtype != "bfloat16" or width % WIDTH:
        return f"it takes bfloat16 and head widths in multiples of {WIDTH}, got {q.dtype} and {width}"
    if layout is not None:
        for name, size, axes in (("rows", rows, layout.rows), ("key/value heads", heads, layout.heads),
                                 ("queries", queries, layout.sequence)):
            if size % layout.parts(axes):
                return f"the mesh's {axes} = {layout.parts(axes)} must divide the {size} {name}"
        queries //= layout.parts(layout.sequence)
    if queries % LENGTH or keys % LENGTH:
        return f"it takes lengths on a device in multiples of {LENGTH}, got {queries} queries and {keys} keys"
    return ""


def choose(name: str, q: Array, k: Array, layout: Layout | None = None, *, sliced: bool = False) -> str:
    """`layers.choose_attention` with "splash", which `auto` takes on a TPU for the q and k that it fits.

    sliced: q is a cache's slice, whose lengths vary: "splash" means `auto`. ValueError where the name cannot be had."""
    platform = jax.default_backend() if layout is None else layout.platform
    reason = f"it needs a TPU, this is {platform}" if platform != "tpu" else misfit(q, k, layout and layout.here())
    if name in ("auto", "splash") and not reason:
        return "splash"
    if name == "splash" and not sliced:
        raise ValueError(f"attention='splash' does not fit: {reason}; use 'auto' or 'xla'.")
    return layers.choose_attention("auto" if name == "splash" else name, q.dtype, q.shape[-1])


def attention(config: NetworkConfig, q: Array, k: Array, v: Array, segment_ids: Array | None = None,
              layout: Layout | None = None, slot: Slot | None = None) -> Array:
    """Attention of a layer, q [B S K d], new k, v [B S G d] -> [B S K d], as `config.attention` and `config.remat` say.
    slot: cache of the layer, which takes k and v and gives those of all L positions."""
    window, key_segment_ids = slot and slot.window, segment_ids
    if slot is not None:
        k, v = slot.put(k, v)
    if window is not None:
        key_segment_ids = window.segment_ids
    chosen = choose(config.attention, q, k, layout, sliced=window is not None)
    if chosen == "splash":
        return attend(q, k, v, segment_ids, key_segment_ids, layout=layout)
    plain = partial(layers.attend, implementation=chosen)
    if chosen == "xla":  # cuDNN never stores attention weights
        plain = remat_attention(plain, config.remat)
    return plain(q, k, v, segment_ids, key_segment_ids)


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None = None, key_segment_ids: Array | None = None, *,
           layout: Layout | None = None, interpret: bool = False) -> Array:
    """`layers.attend` by the kernel, for q [B S K d], k, v [B L G d]; interpret: run it on a CPU, for tests."""
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    local = partial(_attend, interpret=interpret)
    return (local if layout is None else layout.here().over_devices(local))(q, k, v, segment_ids, key_segment_ids)


def _attend(q: Array, k: Array, v: Array, q_segments: Array | None, k_segments: Array | None, *,
            interpret: bool) -> Array:
    # Imported late: only TPU programs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention

    (length, heads, width), keys = q.shape[1:], k.shape[1]
    own, seen = (next(size for size in BLOCKS if n % size == 0) for n in (length, keys))
    # Arrays [L d] narrower than a register would be padded to its lanes in memory, [d L] are not.
    layout = splash_attention.QKVLayout.SEQ_MINOR if width % LANES else splash_attention.QKVLayout.HEAD_DIM_MINOR
    sizes = splash_attention.BlockSizes(
        block_q=own, block_kv=seen, block_kv_compute=seen, block_q_dkv=own, block_kv_dkv=seen,
        block_kv_dkv_compute=seen, use_fused_bwd_kernel=True, q_layout=layout,
        k_layout=layout, v_layout=layout,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, keys))] * heads)
    kernel = splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=KEPT, interpret=interpret
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    if q_segments is None:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        mixed = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(q_segments, k_segments))
    return mixed.swapaxes(1, 2).astype(v.dtype)
