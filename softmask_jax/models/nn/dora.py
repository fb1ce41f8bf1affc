"""Low-rank adapters on a frozen base: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), as PEFT computes them.

    LoRA   y = x W + s (x a) b + bias
    DoRA   y = m / ||W + s a b|| * (x W + s (x a) b) + bias,        s = alpha / rank, the norm of every output's weights

The norm is a constant to the gradient. W may be int8 with a scale of every output (`layers.quantised`). An adapter is
a float32 tree: {"layers": {name: {"a" [N in r], "b" [N r out], "magnitude" [N out] (DoRA only)}}}.

Letters: B batch, L length, N layers, r rank.
"""
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from softmask_jax.models.nn import layers

KINDS = ("dora", "lora")


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter, on which products. ValueError for impossible values.

    targets: a regular expression, searched in the names of a layer's products. dropout: rate on the input of the
    low-rank branch alone, used only where dropout keys are given (PEFT's DoRA drops the input of W in its correction
    m / ||.|| - 1 too, at the price of a second product with W).
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    targets: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Unknown adapter kind {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if self.rank < 1:
            raise ValueError(f"AdapterConfig.rank must be at least 1, got {self.rank}.")
        if not self.alpha > 0:
            raise ValueError(f"AdapterConfig.alpha must be above 0, got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"AdapterConfig.dropout must be in [0, 1), got {self.dropout}.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"AdapterConfig.targets {self.targets!r} is no regular expression: {error}.") from None

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def targets(config: AdapterConfig, names: Iterable[str]) -> list[str]:
    """The products that get an adapter, sorted; ValueError if there are none."""
    names = sorted(names)
    matches = [name for name in names if re.search(config.targets, name)]
    if not matches:
        raise ValueError(f"AdapterConfig.targets {config.targets!r} matches none of {', '.join(names)}.")
    return matches


def fold_name(key: Array, name: str) -> Array:
    """A key for one product, the same whichever other products there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _kernels(backbone: dict) -> dict[str, Array]:
    return {name: leaves["kernel"] for name, leaves in backbone["layers"].items() if "kernel" in leaves}


def init(backbone: dict, config: AdapterConfig, key: Array) -> dict:
    """A fresh adapter, which changes nothing: a as PyTorch's default linear layer, b zero, magnitude = ||W||."""
    kernels, adapter = _kernels(backbone), {}
    for name in targets(config, kernels):
        depth, fan_in, fan_out = kernels[name].shape
        adapter[name] = {
            "a": layers.uniform_fan_in(fold_name(key, name), (depth, fan_in, config.rank), fan_in),
            "b": jnp.zeros((depth, config.rank, fan_out), jnp.float32),
        }
        if config.kind == "dora":
            norm = jnp.sqrt(jax.lax.map(_square_norm, kernels[name]))
            adapter[name]["magnitude"] = norm * backbone["layers"][name].get("kernel_scale", 1.0)
    return {"layers": adapter}


def logical_axes(axes: dict, config: AdapterConfig) -> dict:
    """The tree of `init` with logical axis names for arrays; axes: those of the backbone. The rank is called "rank"."""
    kernels, adapter = _kernels(axes), {}
    for name in targets(config, kernels):
        depth, fan_in, fan_out = kernels[name]
        adapter[name] = {"a": (depth, fan_in, "rank"), "b": (depth, "rank", fan_out)}
        if config.kind == "dora":
            adapter[name]["magnitude"] = (depth, fan_out)
    return {"layers": adapter}


def _square_norm(kernel: Array) -> Array:
    return jnp.square(kernel.astype(jnp.float32)).sum(-2)


def column_norm(kernel: Array, a: Array, b: Array, scaling: float, scale: Array | None = None) -> Array:
    """||W + s a b|| of every output: kernel [in, out], a [in, r], b [r, out] -> [out] float32, no gradient.

    scale: [out] float32, if W = kernel * scale.

    Expanded to ||W||^2 + 2 s <W, a b> + s^2 ||a b||^2 per output, with a'W and the Gram matrix a'a: no second array of
    W's size. All in float32, from W's stored values whatever the products compute in: within 1e-6 of the direct norm
    as long as the adapter does not cancel W.
    """
    kernel, a, b = jax.lax.stop_gradient((kernel, a, b))
    scale = 1.0 if scale is None else jax.lax.stop_gradient(scale)
    highest = jax.lax.Precision.HIGHEST
    across = (jnp.matmul(a.T, kernel.astype(jnp.float32), precision=highest) * b).sum(0)
    own = (jnp.matmul(jnp.matmul(a.T, a, precision=highest), b, precision=highest) * b).sum(0)
    square = scale**2 * _square_norm(kernel) + 2 * scaling * scale * across + scaling**2 * own
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


def apply(kernel: Array, bias: Array | None, adapter: dict, x: Array, config: AdapterConfig,
          keys: Array | None = None, scale: Array | None = None) -> Array:
    """An adapted product: x [B L in] -> [B L out] in the dtype of x.

    adapter: one layer's {"a" [in r], "b" [r out], "magnitude" [out]}; keys: [B] typed keys, for dropout; scale: [out]
    float32, if W = kernel * scale.
    """
    dropped = layers.dropout(x, keys, config.dropout) if config.dropout > 0 else x
    low = layers.wide_product(layers.wide_product(dropped, adapter["a"]).astype(x.dtype), adapter["b"])
    # Rounded once, at the end: a magnitude that has moved by less than 1/256 would change no bfloat16 number.
    y = layers.wide_product(x, kernel)
    y = (y if scale is None else y * jax.lax.stop_gradient(scale)) + config.scaling * low
    if config.kind == "dora":
        y = adapter["magnitude"] / column_norm(kernel, adapter["a"], adapter["b"], config.scaling, scale) * y
    return (y if bias is None else y + bias).astype(x.dtype)


def merge(backbone: dict, adapter: dict, config: AdapterConfig) -> dict:
    """The backbone with the adapter inside its kernels, in their dtype; computed in float32, a layer at a time.

    ValueError if the adapter's products are not the config's targets, or the kernels are int8: what an adapter adds is
    smaller than their steps.
    """
    if any("kernel_scale" in leaves for leaves in backbone["layers"].values()):
        raise ValueError("An adapter is not merged into int8 kernels; take the model that they were made from.")
    kernels, merged = _kernels(backbone), dict(backbone["layers"])
    check(adapter, config, kernels)

    def one(leaves: tuple[Array, dict]) -> Array:
        kernel, low = leaves
        full = kernel + config.scaling * jnp.matmul(low["a"], low["b"], precision=jax.lax.Precision.HIGHEST)
        if config.kind == "dora":
            full = low["magnitude"] / column_norm(kernel, low["a"], low["b"], config.scaling) * full
        return full.astype(kernel.dtype)

    for name, low in adapter["layers"].items():
        merged[name] = {**merged[name], "kernel": jax.lax.map(one, (kernels[name], low))}
    return {**backbone, "layers": merged}


def check(adapter: dict, config: AdapterConfig, names: Iterable[str]) -> None:
    """ValueError unless the adapter has exactly the config's targets and arrays."""
    wanted = targets(config, names)
    arrays = {"a", "b"} | ({"magnitude"} if config.kind == "dora" else set())
    if sorted(adapter["layers"]) != wanted or any(set(low) != arrays for low in adapter["layers"].values()):
        actual = {name: sorted(low) for name, low in adapter["layers"].items()}
        raise ValueError(f"A {config.kind} adapter on {', '.join(wanted)} has {sorted(arrays)} each, got {actual}.")
