"""Equal layers as one `lax.scan` over stacked parameters, with rematerialisation chosen by name.
Unrolled, a deep model compiles many times slower."""
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Layer = Callable[[Tree, jax.Array, Any], Any]

KEPT = "attention kernel"  # name of its results
# name -> what is kept for the backward pass
REMAT = {
    "none": "everything is kept: fastest, most memory",
    "attention": "everything but the L x L attention weights, which are computed again",
    "products": "results of all products and of a TPU's attention kernel are kept, elementwise work is done again",
    "dots": "results of products with weights are kept, attention and elementwise work is done again",
    "mlp": "results of a gated MLP's first two products are kept, the rest is done again (kind dream)",
    "full": "only each layer's input is kept, the layer is computed again: least memory",
}

# What "mlp" keeps, named by `jax.ad_checkpoint.checkpoint_name`: most FLOPs a byte, and never float32.
MLP = ("gate", "up")


def check_remat(name: str, policies: Iterable[str] = REMAT) -> str:
    """The name, if it is among these rematerialisation policies; else ValueError."""
    if name not in policies:
        raise ValueError(f"Unknown remat policy {name!r}; choose one of {', '.join(policies)}.")
    return name


def remat_attention(attention: Callable, name: str) -> Callable:
    """Attention under a policy: "attention" keeps only its inputs."""
    return jax.checkpoint(attention, prevent_cse=False) if check_remat(name) == "attention" else attention


def remat_layer(layer: Callable, name: str, *, in_scan: bool = True) -> Callable:
    """A layer under a policy; in_scan: whether it is the body of a `lax.scan`."""
    # A loop already keeps XLA from merging the recomputation with the original.
    if check_remat(name) == "full":
        return jax.checkpoint(layer, prevent_cse=not in_scan)
    if name == "products":
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(KEPT))
        return jax.checkpoint(layer, prevent_cse=not in_scan, policy=policy)
    if name == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, prevent_cse=not in_scan, policy=policy)
    if name == "mlp":
        policy = jax.checkpoint_policies.save_only_these_names(*MLP)
        return jax.checkpoint(layer, prevent_cse=not in_scan, policy=policy)
    return layer


def scan_layers(layer: Layer, stacked: Tree, x: Any, *, remat: str = "none", unroll: bool = False,
                keep: bool = False) -> Any:
    """Apply layer(parameters, index, x) -> x for every layer in turn.

    stacked: pytree with layers on axis 0. x: carry, any pytree of fixed shapes. remat: a name of REMAT. unroll: a
    Python loop instead. keep: layer returns (x, extra); the result is (x, extras stacked on axis 0)."""
    layer = remat_layer(layer, remat, in_scan=not unroll)
    depths = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(depths) != 1:
        raise ValueError(f"Stacked parameters disagree on the number of layers: {sorted(depths)}.")
    (depth,) = depths

    def body(carry, one):
        parameters, index = one
        out = layer(parameters, index, carry)
        return out if keep else (out, None)

    if unroll:
        extras = []
        for i in range(depth):
            x, extra = body(x, (jax.tree.map(lambda leaf: leaf[i], stacked), jnp.int32(i)))
            extras.append(extra)
        return (x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *extras)) if keep else x
    x, extras = jax.lax.scan(body, x, (stacked, jnp.arange(depth, dtype=jnp.int32)))
    return (x, extras) if keep else x
