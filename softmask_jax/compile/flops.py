"""FLOPs of a program's matrix products, counted in its jaxpr (a multiply-add is 2); closed form: `update_flops`.

Unlike XLA's own count, loops are multiplied by their trip counts; conditionals count their costliest branch."""
import math
from collections.abc import Callable

from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

# primitive -> how often its body runs over all devices, from its parameters
TURNS = {
    "scan": lambda params: params["length"],
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
    "shard_map": lambda params: math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]),
}


def count(
    jaxpr: core.ClosedJaxpr | core.Jaxpr, trips: Callable[[str, int], float] = lambda scope, depth: 1, depth: int = 0
) -> float:
    """FLOPs of a jaxpr, of all devices together. trips(scope, depth): trip count of a `while`, by its scope of names
    and the number of others around it."""
    return sum(_equation(eqn, trips, depth) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def live(jaxpr: core.ClosedJaxpr) -> core.Jaxpr:
    """A jaxpr without what no output needs, such as a frozen kernel's gradient: XLA does not compute it either."""
    return dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0]


def _equation(eqn, trips, depth: int) -> float:
    name, inner = eqn.primitive.name, _inner(eqn)
    if not eqn.outvars and not eqn.effects:  # all results were kept by rematerialisation: XLA drops it
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        raise NotImplementedError("convolutions are not counted")
    if name == "cond":
        return max(count(branch, trips, depth) for branch in inner)
    if name == "while":
        scope = str(eqn.source_info.name_stack)
        return trips(scope, depth) * count(eqn.params["body_jaxpr"], trips, depth + 1)
    turns = TURNS[name](eqn.params) if name in TURNS else 1
    return turns * sum(count(jaxpr, trips, depth) for jaxpr in inner)


def _inner(eqn) -> list:
    """Jaxprs among an equation's parameters; a custom derivative's rules are functions and not counted."""
    values = [v if isinstance(v, (tuple, list)) else [v] for v in eqn.params.values()]
    inner = [getattr(one, "jaxpr", one) for value in values for one in value]
    return [one for one in inner if isinstance(one, core.Jaxpr)]
