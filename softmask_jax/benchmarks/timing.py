"""Alternating timings and their quartiles, the device that they were taken on, and the flags of every benchmark."""
import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from softmask_jax.config.command_line import command_parser
from softmask_jax.io.files import check_writable, write_json


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of one call, in the order measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def to_dict(self) -> dict[str, float]:
        ends = {"min": min(self.seconds), "max": max(self.seconds), "calls": len(self.seconds)}
        return quartiles(self.seconds) | ends


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
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = (float(x) for x in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def spread_text(spread: Mapping[str, float], form: str = ".3g") -> str:
    """`quartiles` as "median (lower to upper)"."""
    return f"{spread['median']:{form}} ({spread['lower_quartile']:{form}} to {spread['upper_quartile']:{form}})"


def device_name() -> str:
    device = jax.devices()[0]
    return f"{len(os.sched_getaffinity(0))} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"


def benchmark_parser(name: str, description: str, sizes: type | None = None) -> argparse.ArgumentParser:
    """Parser with --json and, for benchmarks with `sizes` (a dataclass), --device and a flag for each of its fields."""
    parser = command_parser(f"benchmarks.{name}", description)
    parser.add_argument("--json", default="", help="write the figures here too; replaces the file")
    if sizes:
        parser.add_argument("--device", default="", help="cpu, gpu or tpu; the best there is by default")
        group = parser.add_argument_group("sizes", " ".join(sizes.__doc__.split()))
        for field in dataclasses.fields(sizes):
            group.add_argument(f"--{field.name}", type=field.type, default=field.default, help="(default: %(default)s)")
    return parser


def prepare(flags: argparse.Namespace, sizes: type):
    """Choose --device, check that --json can be written, and return the sizes that the flags give."""
    if flags.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(flags.device, flags.device))
    check_writable(flags.json)
    return sizes(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(sizes)})


def publish(text: str, figures: Mapping, json_path: str) -> None:
    """Print the tables; write the figures where --json says."""
    print(text)
    if json_path:
        write_json(json_path, figures)
