"""Everything a step changes, as arrays only."""
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from softmask_jax.config.jax_settings import root_key
from softmask_jax.distributed import sharding


# Dozens of random draws, each used once: on a CPU LLVM takes a third less for the same numbers.
QUICK = {"cpu": {"xla_backend_optimization_level": 1}}


class TrainState(NamedTuple):
    step: jax.Array  # [] int32, updates done
    params: dict  # {"backbone", "soft_mask"}, trained; float32
    ema: dict  # of the backbone; float32
    opt_state: optax.OptState  # float32
    frozen: dict = {}  # rest of the backbone, an adapter's base, in its own dtype; never changed, never saved

    def eval_params(self) -> dict:
        """EMA of the backbone with the raw scalars: what is evaluated."""
        return whole({"backbone": self.ema, "soft_mask": self.params["soft_mask"]}, self.frozen)


def whole(params: dict, frozen: dict) -> dict:
    """All parameters of the network, as a denoiser reads them: {"backbone", "soft_mask"}."""
    return params | {"backbone": frozen | params["backbone"]}


def fresh(params: dict, tx: optax.GradientTransformation, frozen: tuple[str, ...] = ()) -> TrainState:
    """State before the first update; the EMA starts from the parameters. frozen: untrained parts of the backbone."""
    params, base = split(params, frozen)
    # In bfloat16 an update of less than 1/256 of a weight would vanish.
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ema = jax.tree.map(jnp.copy, params["backbone"])
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params), base)


def split(params: dict, frozen: tuple[str, ...]) -> tuple[dict, dict]:
    """(trained, frozen) parts of a tree {"backbone", "soft_mask"}."""
    backbone = params["backbone"]
    trained = {name: entry for name, entry in backbone.items() if name not in frozen}
    return params | {"backbone": trained}, {name: backbone[name] for name in frozen}


def abstract(denoiser, tx, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; optimiser and EMA lie like their parameters."""
    shapes = jax.eval_shape(lambda key: fresh(denoiser.init(key), tx, denoiser.frozen), root_key(0))
    axes, frozen_axes = split(denoiser.axes, denoiser.frozen)
    of_params = sharding.param_shardings(mesh, axes, shapes.params)
    everywhere = sharding.replicated(mesh)
    of_moments = _like_params(shapes.opt_state, of_params, everywhere)
    of_frozen = sharding.param_shardings(mesh, frozen_axes, shapes.frozen)
    layout = TrainState(everywhere, of_params, of_params["backbone"], of_moments, of_frozen)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def _like_params(opt_state, of_params, otherwise):
    """Moments lie like the parameter whose keys end their path; counters lie everywhere."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(of_params))

    def layout(path, _):
        keys = itertools.takewhile(lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path))
        return by_path.get(tuple(keys)[::-1], otherwise)

    return jax.tree_util.tree_map_with_path(layout, opt_state)


def initialise(denoiser, tx, mesh, seed: int, base: dict | None = None) -> TrainState:
    """A fresh state, made on its devices; the same numbers on any mesh. base: donated values of some parameters."""
    layout = jax.tree.map(lambda s: s.sharding, abstract(denoiser, tx, mesh))

    def make(base, key):
        return fresh(denoiser.init(key, base), tx, denoiser.frozen)

    options = QUICK.get(mesh.devices.flat[0].platform)
    return jax.jit(make, out_shardings=layout, donate_argnums=0, compiler_options=options)(base, root_key(seed))


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every floating-point array of the tree is finite: a bool scalar."""
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack(leaves).all()
