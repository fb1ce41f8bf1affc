"""Low-rank adapters on a frozen base as in PEFT: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

    LoRA   y = x W + s (x a) b + bias
    DoRA   y = m / ||W + s a b|| * (x W + s (x a) b) + bias,        s = alpha / rank, a norm per output

No gradient flows through the norm. W may be int8 (`layers.quantised`). An adapter is a float32 tree
{"layers": {name: {"a" [N in r], "b" [N r out], "magnitude" [N out] (DoRA only)}}}; N layers, r rank. `prepared` puts
"factor" [N out] = m / ||W + s a b|| in the place of the magnitude."""
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
    """Kind and targets of an adapter. ValueError for impossible values."""

    kind: str
    rank: int
    alpha: float
    # On the input of the low-rank branch alone, if dropout keys are given. (PEFT's DoRA also drops the input of W in
    # its correction m / ||.|| - 1, at the cost of a second product with W.)
    dropout: float
    targets: str  # regular expression, searched in the names of a layer's products

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
    """Sorted names of the products with an adapter; ValueError if there are none."""
    names = sorted(names)
    matches = [name for name in names if re.search(config.targets, name)]
    if not matches:
        raise ValueError(f"AdapterConfig.targets {config.targets!r} matches none of {', '.join(names)}.")
    return matches


def fold_name(key: Array, name: str) -> Array:
    """Key of one product, independent of which others exist."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _kernels(backbone: dict) -> dict[str, Array]:
    return {name: leaves["kernel"] for name, leaves in backbone["layers"].items() if "kernel" in leaves}


def init(backbone: dict, config: AdapterConfig, key: Array) -> dict:
    """A fresh adapter that changes nothing: PyTorch's default for a, b zero, magnitude = ||W||."""
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
    """The tree of `init` as logical axis names, from those of the backbone; the rank's axis is "rank"."""
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
    """||W + s a b|| per output: kernel [in, out], a [in, r], b [r, out] -> [out] float32, no gradient.

    W = kernel * scale if scale [out] is given. Expanded to ||W||^2 + 2 s <W, a b> + s^2 ||a b||^2, without a second
    array of W's size; within 1e-6 of the direct norm unless the adapter cancels W."""
    kernel, a, b = jax.lax.stop_gradient((kernel, a, b))
    scale = 1.0 if scale is None else jax.lax.stop_gradient(scale)
    highest = jax.lax.Precision.HIGHEST
    across = (jnp.matmul(a.T, kernel.astype(jnp.float32), precision=highest) * b).sum(0)
    own = (jnp.matmul(jnp.matmul(a.T, a, precision=highest), b, precision=highest) * b).sum(0)
    square = scale**2 * _square_norm(kernel) + 2 * scaling * scale * across + scaling**2 * own
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


def prepared(backbone: dict, config: AdapterConfig) -> dict:
    """The backbone of many calls with the same parameters: norms of DoRA computed once, not by every call, for which
    they would read all kernels again. The same outputs; not to be trained."""
    if config.kind != "dora":
        return backbone
    adapter, frozen = {}, backbone["layers"]

    def one(leaves: tuple[Array, Array | None, dict]) -> Array:
        kernel, scale, low = leaves
        return _factor(kernel, low, config, scale)

    for name, low in backbone["adapter"]["layers"].items():
        factor = jax.lax.map(one, (frozen[name]["kernel"], frozen[name].get("kernel_scale"), low))
        adapter[name] = {"a": low["a"], "b": low["b"], "factor": factor}
    return {**backbone, "adapter": {"layers": adapter}}


def _factor(kernel: Array, adapter: dict, config: AdapterConfig, scale: Array | None) -> Array:
    """m / ||W + s a b|| of one layer, [out] float32."""
    return adapter["magnitude"] / column_norm(kernel, adapter["a"], adapter["b"], config.scaling, scale)


def apply(kernel: Array, bias: Array | None, adapter: dict, x: Array, config: AdapterConfig,
          keys: Array | None = None, scale: Array | None = None) -> Array:
    """Adapted product x [B L in] -> [B L out] in the dtype of x; adapter: of one layer.
    keys: [B] typed keys, for dropout. scale: [out] float32, if W = kernel * scale."""
    dropped = layers.dropout(x, keys, config.dropout) if config.dropout > 0 else x
    low = layers.wide_product(layers.wide_product(dropped, adapter["a"]).astype(x.dtype), adapter["b"])
    # Round once, at the end: bfloat16 would lose changes of the magnitude below 1/256.
    y = layers.wide_product(x, kernel)
    y = (y if scale is None else y * jax.lax.stop_gradient(scale)) + config.scaling * low
    if config.kind == "dora":
        y = (adapter["factor"] if "factor" in adapter else _factor(kernel, adapter, config, scale)) * y
    return (y if bias is None else y + bias).astype(x.dtype)


def merge(backbone: dict, adapter: dict, config: AdapterConfig) -> dict:
    """The backbone with the adapter merged into its kernels, in float32, layer by layer.

    ValueError for other products than the config's targets, or int8 kernels, whose steps are larger than the update."""
    if any("kernel_scale" in leaves for leaves in backbone["layers"].values()):
        raise ValueError("An adapter is not merged into int8 kernels; take the model that they were made from.")
    kernels, merged = _kernels(backbone), dict(backbone["layers"])
    check(adapter, config, kernels)

    def one(leaves: tuple[Array, dict]) -> Array:
        kernel, low = leaves
        full = kernel + config.scaling * jnp.matmul(low["a"], low["b"], precision=jax.lax.Precision.HIGHEST)
        if config.kind == "dora":
            full = _factor(kernel, low, config, None) * full
        return full.astype(kernel.dtype)

    for name, low in adapter["layers"].items():
        merged[name] = {**merged[name], "kernel": jax.lax.map(one, (kernels[name], low))}
    return {**backbone, "layers": merged}


def check(adapter: dict, config: AdapterConfig, names: Iterable[str]) -> None:
    """ValueError unless the adapter has exactly the config's targets and arrays, or is `prepared`."""
    wanted = targets(config, names)
    arrays = {"a", "b"} | ({"magnitude"} if config.kind == "dora" else set())
    ready = {"a", "b", "factor"} if config.kind == "dora" else arrays
    sets = {frozenset(low) for low in adapter["layers"].values()}
    if sorted(adapter["layers"]) != wanted or sets not in ({frozenset(arrays)}, {frozenset(ready)}):
        actual = {name: sorted(low) for name, low in adapter["layers"].items()}
        raise ValueError(f"A {config.kind} adapter on {', '.join(wanted)} has {sorted(arrays)} each, got {actual}.")
