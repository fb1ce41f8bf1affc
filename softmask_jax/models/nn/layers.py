"""Layers shared by the networks: MDLM's DiT (arXiv 2406.07524, after Peebles and Xie, arXiv 2212.09748), Dream.

Layers compute in the dtype of their input; normalisation, softmax and rotary angles in float32. Every `nnx.Param` has
its logical axis names as metadata `axes`.

Letters: B batch, L length, S queries, D width, K heads, G key/value heads, d head width."""
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

NORM_EPSILON = 1e-5
FREQUENCIES = 256  # width of the sinusoidal timestep features
TIMESTEP_PERIOD = 1e4
ATTENTION = ("auto", "xla", "cudnn")


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's kaiming_uniform(a = sqrt 5), its default for linear layers."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def normal(key: Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
    """N(0, std^2), drawn in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with a scale and no bias, in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("embed",))

    def __call__(self, x: Array) -> Array:
        # A bfloat16 mean would lose the small differences that normalisation amplifies.
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + NORM_EPSILON) * self.scale[...]


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean x^2 + epsilon) * scale over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale, initially 1."""

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes=("embed",))

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.epsilon)


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Precision for true float32 products: by default a TPU rounds operands to bfloat16, a recent GPU to TF32."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def product(x: Array, kernel: Array) -> Array:
    """x [... in] @ kernel [in, out] in the dtype of x."""
    # Flattened: XLA's CPU backend takes twice as long for gradients of a product with three axes.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), precision=exact(x.dtype))
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def wide_product(x: Array, kernel: Array) -> Array:
    """`product` with a float32 result and float32 sums in the kernel's gradient; an int8 kernel gets none.

    Int8 is exact in bfloat16, and scaling the float32 product per output avoids a second array of the kernel's size."""
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), precision=exact(x.dtype),
                   preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def _wide_product_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # The automatic derivative would multiply float32 by bfloat16, upcasting the kernel.
    x, kernel = kept
    g = g.astype(x.dtype)
    if kernel.dtype == jnp.int8:  # frozen
        return product(g, kernel.T), None
    across = jnp.matmul(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]), precision=exact(x.dtype),
                        preferred_element_type=jnp.float32)
    return product(g, kernel.T), across.astype(kernel.dtype)


wide_product.defvjp(lambda x, kernel: (wide_product(x, kernel), (x, kernel)), _wide_product_backward)


def quantised(kernel: Array) -> tuple[Array, Array]:
    """Int8 kernel [in, out] and float32 scales [out]: kernel = int8 * scale.
    Symmetric: the largest weight of an output becomes 127; the scale of an all-zero output is 1."""
    # Not qwix 0.1.8, which for bfloat16 x makes the kernel float32 before the product and in its gradient.
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(0)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.rint(wide / scale).astype(jnp.int8), scale


class Linear(nnx.Module):
    """x @ kernel [in, out] (+ bias) in the dtype of x; int8: a frozen `quantised` kernel.
    Initialised as in PyTorch; with `zero` to zeros, with `std` to a normal kernel and a zero bias."""

    def __init__(self, fan_in: int, fan_out: int, *, axes: tuple[str, str], rngs: nnx.Rngs, bias: bool = True,
                 zero: bool = False, std: float | None = None, dtype: jnp.dtype = jnp.float32, int8: bool = False):
        def start(shape: tuple[int, ...]) -> Array:
            if zero or (std is not None and len(shape) == 1):
                return jnp.zeros(shape, dtype)
            if std is not None:
                return normal(rngs.params(), shape, std, dtype)
            return uniform_fan_in(rngs.params(), shape, fan_in).astype(dtype)

        kernel, scale = start((fan_in, fan_out)), None
        if int8:
            kernel, scale = quantised(kernel)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.kernel_scale = None if scale is None else nnx.Param(scale, axes=axes[1:])
        self.bias = nnx.Param(start((fan_out,)), axes=axes[1:]) if bias else None

    def __call__(self, x: Array) -> Array:
        if self.kernel_scale is None:
            y = product(x, self.kernel[...])
        else:
            y = (wide_product(x, self.kernel[...]) * self.kernel_scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class TimestepMLP(nnx.Module):
    """Noise level sigma [B] -> conditioning [B C]: 256 sinusoids, Linear, SiLU, Linear, in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # Input axes are "freq", as two equal names ("cond") could not be sharded.
        setattr(self, "in", Linear(FREQUENCIES, width, axes=("freq", "cond"), rngs=rngs))
        self.out = Linear(width, width, axes=("freq", "cond"), rngs=rngs)

    def __call__(self, sigma: Array) -> Array:
        return self.out(jax.nn.silu(getattr(self, "in")(timestep_features(sigma))))


def timestep_features(sigma: Array) -> Array:
    """[B] -> [B 256] float32: cosines, then sines, of sigma times frequencies from 1 down to almost 1/period."""
    half = FREQUENCIES // 2
    frequencies = jnp.exp(-math.log(TIMESTEP_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = sigma.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Adaptive layer norm: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def rotary_angles(positions: Array, head_width: int, base: float) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding: positions [L] or [B L] -> two arrays [1|B L 1 d/2].
    Float32: bfloat16 cannot count past 256."""
    frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = jnp.atleast_2d(positions).astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotary embedding in the half-split layout (channel c with c + d/2): x [B L K d] -> same shape and dtype."""
    cos, sin = angles
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def choose_attention(name: str, dtype: jnp.dtype, head_width: int) -> str:
    """Resolve an attention name to "xla" or "cudnn" on this machine; ValueError if unknown or unavailable.
    auto: cuDNN on a GPU in bfloat16 with a head width that it supports, else XLA."""
    if name not in ATTENTION:
        raise ValueError(f"Unknown attention {name!r}; choose one of {', '.join(ATTENTION)}.")
    on_gpu = jax.default_backend() == "gpu"
    if name == "cudnn" and not on_gpu:
        raise ValueError(f"attention='cudnn' needs a CUDA GPU, this is {jax.default_backend()}; use 'auto' or 'xla'.")
    if name == "auto":
        return "cudnn" if on_gpu and dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128 else "xla"
    return name


def attend(q: Array, k: Array, v: Array, segment_ids: Array | None = None, key_segment_ids: Array | None = None, *,
           implementation: str = "xla") -> Array:
    """Bidirectional attention softmax(q k^T / sqrt d) v, softmax in float32: q [B S K d], k, v [B L G d] -> [B S K d].

    Attention stays within segment_ids [B S]; key_segment_ids [B L] are those of the keys, if L is not S. G divides K:
    consecutive K / G query heads share a key/value head."""
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    visible = None if segment_ids is None else (segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :])
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=visible, implementation="cudnn")
    shape, group = q.shape, q.shape[2] // k.shape[2]
    if group > 1:  # heads of a group as more queries of one head: [B S G*R d] -> [B R*S G d]
        q = q.reshape(*shape[:2], -1, group, shape[3]).transpose(0, 3, 1, 2, 4)
        q = q.reshape(shape[0], -1, *k.shape[2:])
        visible = None if visible is None else jnp.tile(visible, (1, 1, group, 1))
    # Heads in front make plain batched products; normalising last saves two passes over [B K S L] (a CPU: 1/3 faster
    # forward than jax.nn.dot_product_attention).
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    precise = exact(q.dtype)
    scores = jnp.matmul(q, k.swapaxes(-1, -2), precision=precise, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(v.dtype), v, precision=precise, preferred_element_type=jnp.float32) / total
    mixed = mixed.astype(v.dtype).swapaxes(1, 2)
    if group > 1:
        mixed = mixed.reshape(shape[0], group, shape[1], -1, shape[3]).transpose(0, 2, 3, 1, 4).reshape(shape)
    return mixed


def dropout(x: Array, keys: Array | None, rate: float) -> Array:
    """Inverted dropout of x [B L D], D even; with a key per row [B], a row's mask depends on its own key alone.
    The rate is rounded to 1/65536, as one 32-bit draw decides two elements; the scale uses the rounded rate."""
    limit = round((1.0 - rate) * 2**16)
    if keys is None or limit == 2**16:
        return x
    _, length, width = x.shape
    bits = jax.vmap(lambda key: jax.random.bits(key, (length, width // 2), jnp.uint32))(keys)
    keep = jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=-1) < limit
    return jnp.where(keep, x * jnp.asarray(2**16 / limit, x.dtype), jnp.zeros((), x.dtype))


def check_inputs(width: int, x: Array, positions: Array | None, segment_ids: Array | None,
                 dropout_keys: Array | None) -> None:
    """ValueError unless the inputs of a trunk with this width have the right shapes."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"The trunk takes embeddings [B, L, {width}], got shape {x.shape}.")
    rows, both = x.shape[:1], x.shape[:2]
    if positions is not None and positions.shape not in (both, both[1:]):
        raise ValueError(f"positions must have shape {both} or {both[1:]}, got {positions.shape}.")
    if segment_ids is not None and segment_ids.shape != both:
        raise ValueError(f"segment_ids must have shape {both}, got {segment_ids.shape}.")
    if dropout_keys is not None and not (
        jnp.issubdtype(dropout_keys.dtype, jax.dtypes.prng_key) and dropout_keys.shape == rows
    ):
        raise ValueError(f"dropout_keys must be typed keys (jax.random.key) of shape {rows}, got {dropout_keys.shape} "
                         f"{dropout_keys.dtype}.")
