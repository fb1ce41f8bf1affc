"""What the second pass costs, what the vocabulary costs, and the same step in PyTorch, on this machine:

    python -m softmask_jax.benchmarks.two_pass [--shapes=256x6x2048,256x6x50258] [--device=cpu] [--json=out.json]
    python -m softmask_jax.benchmarks.two_pass --against=torch

Seconds of a train step with one pass and with two, alternating, and their ratio beside its limit: with a forward pass
as 1 and a backward pass as 2, a plain step is 3 and two passes are 4/3 of it; with full rematerialisation 4, and 5/4.
Work that both kinds of step share (the optimiser, logits computed again) lowers the ratio, the sweep over the
vocabulary raises it. Then the vocabulary's operations at each width and vocabulary: seconds, sweeps beside
cross-entropy's forward pass, dense beside chunked with the planned temporary memory.

--against=torch measures our step and plain PyTorch steps instead, in turn, step by step, each in a process of its own:
seconds, tokens/s, peak memory. It needs PyTorch: pip install 'softmask_jax[bench]'."""
import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp

from softmask_jax.benchmarks import against_torch, vocabulary
from softmask_jax.benchmarks.random_step import RandomStep, Shape, Sizes, settings_of
from softmask_jax.benchmarks.timing import (
    alternate, benchmark_parser, machine, mebibytes, positive, prepare, publish, ratio, ratio_text, spread, spread_text,
)  # fmt: skip
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import settled
from softmask_jax.report.markdown import table

LIMITS = {"none": Fraction(4, 3), "full": Fraction(5, 4)}  # with a frozen base 3/2
# Few blocks where the vocabulary costs most: the ratio is then at its hardest, and a step takes seconds.
SHAPES = "256x6x2048,256x6x50258,256x6x152064,768x2x2048,768x2x50258,768x2x152064"
AGAINST = "256x6x50258"


def time_step(sizes: Sizes, shape: Shape, remat: str, steps: int) -> dict:
    """Single-pass and two-pass train steps, alternating.

    `Shape`; "remat" (see LIMITS); "single", "two_pass": `spread` of seconds; "ratio": `ratio` of the two; "limit";
    "temporary_bytes"."""
    single, two_pass = jnp.zeros(sizes.batch, bool), jnp.ones(sizes.batch, bool)
    step = RandomStep(settings_of(sizes, shape, remat), shape.vocab_size, single)
    seconds = alternate({"single": partial(step, single), "two_pass": partial(step, two_pass)}, steps)
    return shape._asdict() | {
        "remat": remat, **{kind: spread(values) for kind, values in seconds.items()},
        "ratio": ratio(seconds["two_pass"], seconds["single"]), "limit": float(LIMITS[remat]),
        "temporary_bytes": step.temporary_bytes,
    }  # fmt: skip


@settled()
def measure(sizes: Sizes, shapes: Sequence[Shape], remat: Sequence[str], steps: int, calls: int) -> dict:
    """JSON figures: `machine`, "sizes", "steps" (`time_step`), "vocabulary" (`vocabulary.compare`)."""
    tables = dict.fromkeys((shape.hidden_size, shape.vocab_size) for shape in shapes)
    batch = {name: getattr(sizes, name) for name in ("batch", "seq_len", "compute_dtype")}
    return machine() | {
        "sizes": dataclasses.asdict(sizes),
        "steps": [time_step(sizes, shape, policy, steps) for shape in shapes for policy in remat],
        "vocabulary": [vocabulary.compare(*table, **batch, calls=calls) for table in tables],
    }


def measure_against_torch(sizes: Sizes, shapes: Sequence[Shape], steps: int) -> dict:
    """JSON figures: `machine`, "sizes", "against_torch" (`against_torch.compare`)."""
    against_torch.check_installed()
    rows = [against_torch.compare(sizes, shape, jax.default_backend(), steps) for shape in shapes]
    return machine() | {"sizes": dataclasses.asdict(sizes), "against_torch": rows}


def markdown(figures: dict) -> str:
    """Figures of `measure` or `measure_against_torch` as tables for a README."""
    sizes = Sizes(**figures["sizes"])
    batch = f"{sizes.batch} x {sizes.seq_len} tokens, heads of {sizes.head_width}, {sizes.compute_dtype}"
    machine = f"Device: {figures['device']}; jax {figures['jax']}. {batch}; medians, quartiles in brackets."
    if "against_torch" in figures:
        rows = figures["against_torch"]
        calls = rows[0]["steps"][against_torch.OURS]["one_pass"]["seconds"]["calls"]
        return "\n\n".join([machine, f"Beside PyTorch {rows[0]['torch']}; {calls} steps of each kind, in turn.",
                            *against_torch.markdown(rows)])
    steps = [
        (str(row["hidden_size"]), str(row["num_blocks"]), f"{row['vocab_size']:,}", row["remat"],
         spread_text(row["single"]), spread_text(row["two_pass"]), ratio_text(row["ratio"]),
         f"{LIMITS[row['remat']]} = {row['limit']:.3f}", mebibytes(row["temporary_bytes"]))
        for row in figures["steps"]
    ]  # fmt: skip
    columns = "D", "blocks", "V", "remat", "one pass, s", "two passes, s", "ratio", "limit, in forwards"
    return "\n\n".join([
        machine, f"Train step: {figures['steps'][0]['single']['calls']} of each kind, alternating.",
        table((*columns, "temporary memory, MiB"), steps),
        "Vocabulary, all positions; temporary memory is what the compiled program needs beside arguments and results.",
        *vocabulary.markdown(figures["vocabulary"]),
    ])  # fmt: skip


def policy(name: str) -> str:
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name} is not among {', '.join(LIMITS)}")
    return name


def listed(value: Callable[[str], object]) -> Callable[[str], list]:
    """Flag type: comma-separated values, at least one."""

    def read(text: str) -> list:
        if not (values := [value(part) for part in text.split(",") if part]):
            raise argparse.ArgumentTypeError("needs at least one value")
        return values

    return read


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("two_pass", __doc__, Sizes)
    parser.add_argument("--against", choices=("torch",), help="compare with plain PyTorch steps instead; needs [bench]")
    parser.add_argument("--shapes", type=listed(Shape.parse),
                        help=f"width x blocks x vocabulary (default: {SHAPES}; against PyTorch {AGAINST})")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=8, help="timed train steps of each kind")
    parser.add_argument("--calls", type=positive, default=5, help="timed calls of each vocabulary operation")
    parser.add_argument("--remat", type=listed(policy), default="none", help=f"policies, of {', '.join(LIMITS)}")
    flags = parser.parse_args(argv)
    sizes, default = prepare(flags, Sizes), AGAINST if flags.against else SHAPES
    shapes = flags.shapes or listed(Shape.parse)(default)
    if flags.against:
        figures = measure_against_torch(sizes, shapes, flags.steps)
    else:
        figures = measure(sizes, shapes, flags.remat, flags.steps, flags.calls)
    publish(markdown(figures), figures, flags.json)


if __name__ == "__main__":
    sys.exit(main())
