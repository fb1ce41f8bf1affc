"""Parameters of a network as a nested dict: a shell (tables, final norm), and equal layers stacked on axis 0."""
import math
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from softmask_jax.models.nn.network_config import NetworkConfig


class Stack(NamedTuple):
    """Module classes of a network, made by `module(config, rngs)`, and the name of the layers' entry."""

    shell: type[nnx.Module]
    layer: type[nnx.Module]
    name: str

    def init(self, config: NetworkConfig, key: Array) -> dict:
        """Fresh parameters."""

        def make(module: type[nnx.Module], key: Array) -> dict:
            return nnx.to_pure_dict(nnx.state(module(config, nnx.Rngs(params=key)), nnx.Param))

        shell_key, layers_key = jax.random.split(key)
        layers = jax.vmap(partial(make, self.layer))(jax.random.split(layers_key, config.depth))
        return {**make(self.shell, shell_key), self.name: layers}

    def logical_axes(self, config: NetworkConfig) -> dict:
        """The tree of `init` with a tuple of logical axis names for every array."""

        def axes(module: type[nnx.Module], *front: str) -> dict:
            flat = nnx.to_flat_state(_split(module, config)[1])
            return nnx.traversals.unflatten_mapping({path: (*front, *x.get_metadata("axes")) for path, x in flat})

        return {**axes(self.shell), self.name: axes(self.layer, "layers")}

    def merged_shell(self, config: NetworkConfig, params: dict) -> nnx.Module:
        """The shell module with these parameters."""
        own = {name: tree for name, tree in params.items() if name != self.name}
        return nnx.merge(_split(self.shell, config)[0], own)

    def merged_layer(self, config: NetworkConfig, parameters: dict) -> nnx.Module:
        """A layer module with these parameters (one slice of the stack)."""
        return nnx.merge(_split(self.layer, config)[0], parameters)

    def num_params(self, config: NetworkConfig) -> int:
        """Number of parameters without vocabulary padding."""
        shapes = jax.eval_shape(partial(self.init, config), jax.random.key(0, impl="threefry2x32"))

        def count(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> int:
            real = {"vocab": config.vocab_size}
            return math.prod(real.get(axis, size) for axis, size in zip(axes, leaf.shape, strict=True))

        return sum(jax.tree.leaves(jax.tree.map(count, shapes, self.logical_axes(config))))


@lru_cache
def _split(module: type[nnx.Module], config: NetworkConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of a module and shapes of its parameters; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: module(config, nnx.Rngs(params=0))))


def embedding(params: dict) -> Array:
    """Embedding table [Vpad D]."""
    return params["embed"]["table"]


def embed(params: dict, tokens: Array) -> Array:
    """Token ids [B L] -> rows [B L D]; an id outside the table gives NaN, never another token's row."""
    return jnp.asarray(embedding(params)).at[tokens].get(mode="fill", fill_value=jnp.nan)
