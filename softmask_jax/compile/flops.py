"""Floating-point operations of a program's matrix products, from its jaxpr; `update_flops` has the closed form.

XLA's own count takes a loop's body once. Here a scan is multiplied by its length, a kernel by its grid, what runs under
`shard_map` by the devices of its mesh; of a condition the costlier branch is counted, and a `while` whose length nobody
knows before it runs as often as `trips` says. A multiply-add counts as two; elementwise work is not counted.
"""
import dataclasses
import math
from collections.abc import Callable

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Count:
    """flops: of all devices together. unknown: loops of unknown length that were met."""

    flops: float = 0.0
    unknown: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.unknown + other.unknown)

    def times(self, n: float) -> "Count":
        return Count(self.flops * n, self.unknown)


def once(depth: int, holds_another: bool) -> float:
    """Turns of a loop of unknown length: one."""
    return 1


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr, trips: Callable[[int, bool], float] = once) -> Count:
    """Of a jaxpr, such as `jax.stages.Traced.jaxpr`.

    Args:
      trips: (depth among loops of unknown length, whether there is another one inside) -> turns.
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr), trips, 0)


def _count(jaxpr, trips, depth: int) -> Count:
    return sum((_equation(eqn, trips, depth) for eqn in jaxpr.eqns), Count())


def _equation(eqn, trips, depth: int) -> Count:
    name = eqn.primitive.name
    if name == "dot_general":
        return Count(_dot(eqn))
    if name == "conv_general_dilated":
        raise NotImplementedError("a convolution: none of our models has one, so there is no formula for it")
    inner = _inner(eqn)
    if name == "cond":
        return max((_count(branch, trips, depth) for branch in inner), key=lambda c: c.flops)
    if name == "while":
        body = eqn.params["body_jaxpr"].jaxpr
        turns = trips(depth, _holds_while(body))
        return _count(body, trips, depth + 1).times(turns) + Count(unknown=1)
    total = sum((_count(jaxpr, trips, depth) for jaxpr in inner), Count())
    if name == "scan":
        return total.times(eqn.params["length"])
    if name == "pallas_call":
        return total.times(math.prod(eqn.params["grid_mapping"].grid))
    if name == "shard_map":
        return total.times(eqn.params["mesh"].size)
    return total


def _inner(eqn) -> list:
    """The jaxprs in an equation's parameters, but for a custom derivative's rules, which were applied or never will be."""
    values = [v if isinstance(v, (tuple, list)) else [v] for v in eqn.params.values()]
    inner = [getattr(one, "jaxpr", one) for value in values for one in value]
    return [one for one in inner if isinstance(one, core.Jaxpr)]


def _holds_while(jaxpr) -> bool:
    return any(eqn.primitive.name == "while" or any(map(_holds_while, _inner(eqn))) for eqn in jaxpr.eqns)


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
