"""JAX's splash attention kernel for TPUs (flash attention, without weights [K L L]), under `shard_map` on a mesh.

Letters: B batch, L length, K query heads, G key/value heads, d head width."""
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
BLOCKS = (512, 256, 128)  # rows of q or k: larger blocks reuse more, and 512 fit every TPU's scratch memory


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

    def over_devices(self, attend: Callable, kv_heads: int) -> Callable:
        """attend(q, k, v, query segments, key segments) on each device's own rows, heads and queries."""
        parts = self.mesh.shape[self.heads] if self.heads else 1
        if kv_heads % parts:
            raise ValueError(f"attention='splash' needs the {kv_heads} key/value heads to be divisible by the mesh's "
                             f"{self.heads} = {parts}; choose a smaller one, or attention='xla'.")
        # Within another shard_map the context's mesh counts, and rows are split over its manual axes already.
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else self.mesh
        rows = tuple(axis for axis in self.rows if axis not in context.manual_axes) or None
        own, all_ = (P(rows, places, self.heads, None) for places in (self.sequence, None))
        segments = P(rows, self.sequence), P(rows, None)
        specs = {"in_specs": (own, all_, all_, *segments), "out_specs": own}
        # check_vma=False: the kernel does not declare over which axes its outputs vary.
        return jax.shard_map(attend, mesh=mesh, **specs, check_vma=False)


def fits(dtype, head_width: int, length: int) -> bool:
    """Whether the kernel supports these sizes."""
    return dtype == "bfloat16" and head_width % LANES == 0 and length % LANES == 0


def choose(name: str, dtype, head_width: int, length: int, layout: Layout | None) -> str:
    """`layers.choose_attention` with "splash", which `auto` takes on a TPU where it fits. ValueError elsewhere."""
    platform = jax.default_backend() if layout is None else layout.platform
    if layout is not None and layout.sequence:
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
    """`layers.attend` for q [B L K d], k, v [B L G d]; interpret: run the kernel on a CPU, for tests."""
    local, both = partial(_attend, interpret=interpret), (segment_ids, segment_ids)
    if layout is None:
        return local(q, k, v, *both)
    if segment_ids is None:
        local, both = lambda q, k, v, *_: _attend(q, k, v, None, None, interpret=interpret), (q[:, :, 0, 0],) * 2
    return layout.over_devices(local, k.shape[2])(q, k, v, *both)


def _attend(q: Array, k: Array, v: Array, q_segments: Array | None, k_segments: Array | None, *,
            interpret: bool) -> Array:
    # Imported late: only TPU programs need it.
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
