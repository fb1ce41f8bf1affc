"""Alternating timings, and on what they were taken."""
import dataclasses
import os
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of one call, in the order measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def to_dict(self) -> dict[str, float]:
        low, middle, high = (float(x) for x in np.quantile(self.seconds, (0.25, 0.5, 0.75)))
        return {"median": middle, "lower_quartile": low, "upper_quartile": high, "min": min(self.seconds),
                "max": max(self.seconds), "calls": len(self.seconds)}  # fmt: skip


def alternate(calls: Mapping[str, Callable], rounds: int) -> dict[str, Spread]:
    """Time the calls in turn, A B A B ...: what else the machine does meets all of them alike.

    Each is called once before the clock starts; a call ends when its result is there.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: Spread(tuple(found)) for name, found in seconds.items()}


def device_name() -> str:
    """What a table was measured on."""
    device = jax.devices()[0]
    return f"{len(os.sched_getaffinity(0))} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"
