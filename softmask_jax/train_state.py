"""Everything a step changes, as arrays only."""
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from softmask_jax import sharding


class TrainState(NamedTuple):
    """step: int32 scalar, updates done. params: {"backbone", "soft_mask"}. ema: the backbone's, float32."""

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState

    def eval_params(self) -> dict:
        """EMA of the backbone with the raw scalars: what is evaluated."""
        return {"backbone": self.ema, "soft_mask": self.params["soft_mask"]}


def fresh(params: dict, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the EMA starts from the parameters."""
    ema = jax.tree.map(jnp.copy, params["backbone"])
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def abstract(denoiser, tx, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating it: optimiser and EMA lie like their parameters."""
    shapes = jax.eval_shape(lambda key: fresh(denoiser.init(key), tx), jax.random.key(0))
    of_params = sharding.param_shardings(mesh, denoiser.axes, shapes.params)
    everywhere = sharding.replicated(mesh)
    layout = TrainState(
        everywhere, of_params, of_params["backbone"], _like_params(shapes.opt_state, of_params, everywhere)
    )
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def _like_params(opt_state, of_params, otherwise):
    """Moments lie like the parameter whose keys end their path; counters lie everywhere."""
    by_path = {tuple(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(of_params)[0]}

    def one(path, _):
        keys = list(itertools.takewhile(lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path)))
        return by_path.get(tuple(reversed(keys)), otherwise)

    return jax.tree_util.tree_map_with_path(one, opt_state)


def initialise(denoiser, tx, mesh, seed: int) -> TrainState:
    """A fresh state, made on its devices; the same numbers on any mesh."""
    layout = jax.tree.map(lambda s: s.sharding, abstract(denoiser, tx, mesh))
    return jax.jit(lambda key: fresh(denoiser.init(key), tx), out_shardings=layout)(jax.random.key(seed))


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every floating-point array of the tree is finite: a bool scalar."""
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack(leaves).all()
