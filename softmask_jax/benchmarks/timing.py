"""Shared by benchmarks: interleaved timing, quartiles, machine name, flags, output."""
import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from softmask_jax.config import option_flags
from softmask_jax.config.command_line import command_parser
from softmask_jax.io.files import check_writable, write_json


def alternate(calls: Mapping[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each call, interleaved A B A B ... so that other load affects all alike.
    One untimed call each first; a call ends when its result is ready."""

    def timed(call: Callable) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    for call in calls.values():
        timed(call)
    return dict(zip(calls, np.transpose([[timed(call) for call in calls.values()] for _ in range(rounds)])))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def spread_text(spread: Mapping[str, float], form: str = ".3g") -> str:
    """`quartiles` as "median (lower to upper)"."""
    return f"{spread['median']:{form}} ({spread['lower_quartile']:{form}} to {spread['upper_quartile']:{form}})"


def spread(seconds: np.ndarray) -> dict[str, float]:
    """Quartiles, extremes and number of calls."""
    return quartiles(seconds) | {"min": float(min(seconds)), "max": float(max(seconds)), "calls": len(seconds)}


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Quartiles of the ratios of neighbouring calls."""
    return quartiles(above / below)


def ratio_text(ratio: Mapping[str, float]) -> str:
    return spread_text(ratio, ".2f")


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def machine() -> dict[str, str]:
    """Device and JAX version."""
    device, cores = jax.devices()[0], len(os.sched_getaffinity(0))
    name = f"{cores} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"
    return {"device": name, "jax": jax.__version__}


def positive(text: str) -> int:
    """Flag type: an integer above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, not {value}")
    return value


def writable(path: str) -> str:
    """Flag type of --json: fail before measuring."""
    check_writable(path)
    return path


def benchmark_parser(name: str, description: str, sizes: type | None = None) -> argparse.ArgumentParser:
    """Parser with --json; with `sizes` (a dataclass) also --device and a flag per field."""
    parser = command_parser(f"benchmarks.{name}", description)
    parser.add_argument("--json", type=writable, default="", help="write the figures here too; replaces the file")
    if sizes:
        parser.add_argument("--device", default="", help="cpu, gpu or tpu; the best there is by default")
        option_flags.add(parser.add_argument_group("sizes", " ".join(sizes.__doc__.split())), sizes, helps={})
    return parser


def prepare(flags: argparse.Namespace, sizes: type):
    """Select --device; return the sizes from the flags."""
    if flags.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(flags.device, flags.device))
    return sizes(**option_flags.present(flags, sizes))


def publish(text: str, figures: Mapping, json_path: str) -> None:
    """Print the tables; write the figures to --json."""
    print(text)
    if json_path:
        write_json(json_path, figures)
