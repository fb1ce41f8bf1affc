"""Flash attention on a TPU: JAX's splash attention kernel, never holding the weights [K L L].

A kernel is no array program that a partitioner could cut, so on a mesh it runs under `shard_map`, each device with its
own rows and heads: `Layout` says which those are.

Letters: B batch, L length, K query heads, G key/value heads, d head width.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from softmask_jax.models.nn import layers

ATTENTION = (*layers.ATTENTION, "splash")
LANES = 128
BLOCKS = (512, 256, 128)  # rows of q or k at a time: larger ones reuse more, and 512 fit every TPU's scratch memory


@dataclass(frozen=True)
class Layout:
    """Where activations lie: mesh axes that cut the rows, the one that cuts the heads, and the one that cuts the positions
    of queries (None: no mesh axis); keys and values are gathered over it."""

    mesh: Mesh
    rows: tuple[str, ...] = ()
    heads: str | None = None
    sequence: str | None = None

    @property
    def platform(self) -> str:
        """Of the mesh's devices, which need not be here: a program may be compiled ahead of time."""
        return self.mesh.devices.flat[0].platform

    def over_devices(self, attend: Callable, kv_heads: int) -> Callable:
        """attend(q, k, v, segments of q, of k) on each device's own rows, heads and queries."""
        parts = self.mesh.shape[self.heads] if self.heads else 1
        if kv_heads % parts:
            raise ValueError(f"attention='splash' needs the {kv_heads} key/value heads to be divisible by the mesh's "
                             f"{self.heads} = {parts}; choose a smaller one, or attention='xla'.")
        own, all_ = (P(self.rows or None, places, self.heads, None) for places in (self.sequence, None))
        segments = P(self.rows or None, self.sequence), P(self.rows or None, None)
        specs = {"in_specs": (own, all_, all_, *segments), "out_specs": own}
        # check_vma: the kernel's outputs do not say over which axes they vary.
        return jax.shard_map(attend, mesh=self.mesh, **specs, check_vma=False)


def fits(dtype, head_width: int, length: int) -> bool:
    """Whether the kernel takes such an attention, and is the better choice."""
    return dtype == "bfloat16" and head_width % LANES == 0 and length % LANES == 0


def choose(name: str, dtype, head_width: int, length: int, layout: Layout | None) -> str:
    """As `layers.choose_attention`, with "splash", which `auto` takes on a TPU where it fits. ValueError elsewhere."""
    platform = jax.default_backend() if layout is None else layout.platform
    if layout is not None and layout.sequence:
        # Each device has its share of the queries.
        length = length // layout.mesh.shape[layout.sequence]
    if name == "auto" and platform == "tpu" and fits(dtype, head_width, length):
        return "splash"
    if name != "splash":
        return layers.choose_attention(name, dtype, head_width)
    if platform != "tpu":
        raise ValueError(f"attention='splash' needs a TPU, this is {platform}; use 'auto' or 'xla'.")
    if not fits(dtype, head_width, length):
        raise ValueError(f"attention='splash' takes bfloat16, head widths and lengths in multiples of {LANES}, got "
                         f"{dtype}, {head_width} and {length}; pad the rows, or use 'auto' or 'xla'.")
    return name


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None = None, *, layout: Layout | None = None,
           interpret: bool = False) -> Array:
    """As `layers.attend`: q [B L K d], k, v [B L G d] -> [B L K d]; `interpret` runs the kernel on a CPU, for tests."""
    local, both = partial(_attend, interpret=interpret), (segment_ids, segment_ids)
    if layout is None:
        return local(q, k, v, *both)
    if segment_ids is None:
        local, both = lambda q, k, v, *_: _attend(q, k, v, None, None, interpret=interpret), (q[:, :, 0, 0],) * 2
    return layout.over_devices(local, k.shape[2])(q, k, v, *both)


def _attend(q: Array, k: Array, v: Array, q_segments: Array | None, k_segments: Array | None, *,
            interpret: bool) -> Array:
    # Imported late: it is there on every machine, but only a TPU's program needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention

    (length, heads, width), keys = q.shape[1:], k.shape[1]
    own, seen = (next(size for size in BLOCKS if n % size == 0) for n in (length, keys))
    sizes = splash_attention.BlockSizes(
        block_q=own, block_kv=seen, block_kv_compute=seen, block_q_dkv=own, block_kv_dkv=seen,
        block_kv_dkv_compute=seen, block_q_dq=own, block_kv_dq=seen,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((length, keys))] * heads)
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    if q_segments is None:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        mixed = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(q_segments, k_segments))
    return mixed.swapaxes(1, 2).astype(v.dtype)
