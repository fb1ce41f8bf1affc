"""How many updates, FLOPs and chip hours a training costs, without soft-masking and with it at every budget:

    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py
    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py --topology=v5e:4x4 --config.mesh.fsdp=4
    python -m softmask_jax.compile.plan --config=configs/stdlib.py --run=runs/stdlib
    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py --seconds=0.9 --two_pass_seconds=1.2 --chips=16

iso_update is as many updates as a binary run makes. The paper (section 4) counts a soft-masked update as two forward passes
and gives it half the updates: iso_compute_paper. By cost an update is about 3 forward passes (2 with a frozen base, one
more with remat "full"), and p_sm more with soft-masking: iso_flops. Seconds of a step come from the TPU compiler's plan
(--topology, a prediction; [aot]), from the log of a run (--run), or from the command line.
"""
import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import numpy as np

from softmask_jax.config.command_line import command, command_parser, split_overrides
from softmask_jax.io import run_log
from softmask_jax.io.files import check_writable, write_json
from softmask_jax.report.chart_axes import number
from softmask_jax.report.markdown import table

BUDGETS = ("iso_update", "iso_compute_paper", "iso_flops")
LEAST_ROWS = 3


@dataclasses.dataclass(frozen=True)
class Step:
    """Cost of one update, (plain, with two passes). seconds: of the whole slice, (low, high) each."""

    flops: tuple[float, float]
    tokens: int
    seconds: tuple[tuple[float, float], tuple[float, float]] | None = None
    chips: int = 1
    source: str = ""

    def mixed(self, pair: Sequence[float], share: float) -> float:
        """Mean cost where `share` of the steps take two passes."""
        plain, both = pair
        return plain + share * (both - plain)


@dataclasses.dataclass(frozen=True)
class Line:
    """One way to train. hours: chip hours of all of it, (low, high); None where no seconds are known."""

    name: str
    updates: int
    flops: float
    ratio: float
    tokens: float
    hours: tuple[float, float] | None


def plan(config, step: Step) -> list[Line]:
    """A binary training of `config.train.steps` updates, and a soft-masked one at every budget.

    Raises:
      ValueError: the config is of a binary model.
    """
    if config.soft_mask.variant == "none":
        raise ValueError("This config trains a binary model; give the soft-masked one, the plan shows both.")
    plain = step.flops[0] / (step.flops[1] - step.flops[0])
    budgets = {
        name: dataclasses.replace(config, train=dataclasses.replace(config.train, budget=name)).bought(plain)
        for name in BUDGETS
    }
    ways = [("binary", config.train.steps, 0.0)]
    ways += [(f"soft-masked, {name}", updates, config.soft_mask.p_sm) for name, updates in budgets.items()]
    base, lines = config.train.steps * step.flops[0], []
    for name, updates, share in ways:
        flops, hours = updates * step.mixed(step.flops, share), None
        if step.seconds:
            ends = (step.mixed(pair, share) for pair in zip(*step.seconds))
            hours = tuple(updates * seconds * step.chips / 3600 for seconds in ends)
        lines.append(Line(name, updates, flops, flops / base, float(updates) * step.tokens, hours))
    return lines


def counted(config, *, vocab_size: int = 0, length: int = 0) -> Step:
    """FLOPs of one update with the recomputation of `remat`; conversations count as rows of the greatest length."""
    import jax

    from softmask_jax.distributed import sharding
    from softmask_jax.training import update_flops
    from softmask_jax.compile import programs

    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    denoiser = programs.build(config, mesh, vocab_size=vocab_size or programs.VOCAB_SIZE)
    length = length or config.longest_row
    tokens = config.train.global_batch_size * length
    pair = (
        update_flops.model_flops(denoiser, config.model, tokens, length, two_passes=two, again=True) for two in (False, True)
    )
    return Step(tuple(pair), tokens)


def compiled(config, topology_name: str, *, vocab_size: int = 0, length: int = 0, cache=None) -> tuple[tuple, int]:
    """(seconds of a plain and of a two-pass step, each (low, high); chips) by the roofline of the compiled programs."""
    from softmask_jax.compile import programs, reading
    from softmask_jax.compile.roofline import roofline
    from softmask_jax.compile.topology import Topology

    topology, seconds = Topology(topology_name), []
    for variant in ("none", config.soft_mask.variant):
        one = dataclasses.replace(config, soft_mask=dataclasses.replace(config.soft_mask, variant=variant))
        program = programs.training(one, topology.devices(), vocab_size=vocab_size or programs.VOCAB_SIZE, length=length)
        read = reading.read(program, topology, one.model, cache=cache)
        if not read.fits:
            raise ValueError(
                f"The step does not fit {topology_name}; python -m softmask_jax.compile --topology={topology_name} says why."
            )
        # On a slice with more chips than rows the program has more rows than the config.
        share = config.train.global_batch_size / program.rows
        seconds.append((roofline(read).best * share, roofline(read).worst * share))
    return tuple(seconds), topology.chips


def measured(path: str) -> tuple[tuple, str]:
    """Seconds of a plain and of a two-pass step (each twice), from a straight line through a run's log, and their source.

    Each row of the log covers many steps and has the share of them that made two passes.

    Raises:
      ValueError: a run on conversations, whose lengths differ; too few rows, or all of the same share.
    """
    from softmask_jax import config as schema

    log = run_log.read(path)
    config = schema.from_dict(log.config)
    if config.data.source == "chat":
        raise ValueError(
            f"{path} was trained on conversations of any length, so its log does not say what a step took; give --seconds "
            "and --two_pass_seconds."
        )
    tokens = config.train.global_batch_size * config.data.seq_len
    (timed, speed), (counted_at, shares) = (log.column("train", name) for name in ("tokens_per_second", "two_pass_share"))
    _, at, also = np.intersect1d(timed, counted_at, return_indices=True)
    seconds, share = tokens / speed[at], shares[also]
    if len(share) < LEAST_ROWS or np.ptp(share) == 0:
        raise ValueError(
            f"{path} has {len(share)} timed rows whose shares of two-pass steps differ too little to tell both apart; let it "
            "run longer, or give --seconds and --two_pass_seconds."
        )
    # Pauses of a busy machine would pull a least-squares line.
    slope = _slope(share, seconds)
    plain = float(np.median(seconds - slope * share))
    pair = plain, plain + slope
    return tuple((value, value) for value in pair), f"the median over {len(share)} rows of the log of {path}"


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Theil-Sen estimator: median of the slopes between any two points of different x."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    return float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart]))


def text(config, step: Step, lines: Sequence[Line]) -> str:
    """The plan as a table and its assumptions."""
    header = ["training", "updates", "tokens", "FLOPs", "of binary"] + (["chip hours"] if step.seconds else [])
    rows = [
        [line.name, f"{line.updates:,}", f"{line.tokens:.3g}", f"{line.flops:.3e}", f"{line.ratio:.3f}",
         *([_range(line.hours)] if line.hours else [])]
        for line in lines
    ]  # fmt: skip
    parts = [table(header, rows), f"p_sm {config.soft_mask.p_sm}: {step.flops[1] / step.flops[0]:.3f} times the FLOPs for "
             f"an update with two passes. A batch is {step.tokens:,} tokens."]
    if step.seconds:
        plain, both = map(_range, step.seconds)
        parts.append(f"A step takes {plain} s, {both} s with two passes, on {step.chips} "
                     f"chip{'s' * (step.chips != 1)}: {step.source}.")
    return "\n\n".join(parts)


def _range(ends: tuple[float, float]) -> str:
    low, high = map(number, ends)
    return low if ends[0] == ends[1] else f"{low} to {high}"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser("compile.plan", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, help="a soft-masked config in configs/, or file:variant")
    add("--topology", default="", help="a TPU slice, such as v5e:4x4, for which the step is compiled; [aot]")
    add("--run", default="", help="a run's folder, whose log says how long its steps took")
    add("--seconds", type=float, help="of a plain step")
    add("--two_pass_seconds", type=float, help="of a step with two passes")
    add("--chips", type=int, default=1, help="that --run or --seconds were measured on")
    add("--vocab_size", type=int, default=0, help="tokens of a dit, the mask included (GPT-2's)")
    add("--length", type=int, default=0, help="tokens of a row; 0 is the config's, of conversations the longest")
    add("--json", default="", help="write the figures here too; replaces the file")
    add("--config.SECTION.KEY", metavar="VALUE", dest="_", help="override a key, as of softmask_jax.main")
    words, overrides = split_overrides(argv)
    flags = parser.parse_args(words)
    timed = flags.seconds is not None
    if timed != (flags.two_pass_seconds is not None):
        parser.error("--seconds and --two_pass_seconds go together")
    if bool(flags.topology) + bool(flags.run) + timed > 1:
        parser.error("give one of --topology, --run and --seconds")
    if timed and not 0 < flags.seconds <= flags.two_pass_seconds:
        parser.error("--seconds must be positive, and --two_pass_seconds not below it")
    if flags.chips < 1:
        parser.error("--chips must be at least 1")
    if min(flags.length, flags.vocab_size) < 0:
        parser.error("--length and --vocab_size are 0, for the usual ones, or positive")
    return flags, overrides


@command()
def main(argv: list[str]) -> None:
    """Exit status: 0 done; 1 something cannot be read, compiled or written; 2 the command line is wrong."""
    flags, overrides = parse(argv)
    # Nothing runs here: leave this machine's accelerator alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from softmask_jax import config as schema

    check_writable(flags.json)
    config = schema.load(flags.config, overrides)
    sizes = {"vocab_size": flags.vocab_size, "length": flags.length}
    step = counted(config, **sizes)
    plan(config, step)
    seconds, chips, source = None, flags.chips, "as given"
    if flags.topology:
        seconds, chips = compiled(config, flags.topology, **sizes)
        source = f"predicted from the program compiled for {flags.topology}, never run"
    elif flags.run:
        seconds, source = measured(flags.run)
    elif flags.seconds is not None:
        seconds = tuple((one, one) for one in (flags.seconds, flags.two_pass_seconds))
    if seconds:
        step = dataclasses.replace(step, seconds=seconds, chips=chips, source=source)
    lines = plan(config, step)
    print(text(config, step, lines))
    if flags.json:
        figures = {"lines": [dataclasses.asdict(line) for line in lines], "step": dataclasses.asdict(step)}
        write_json(flags.json, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    sys.exit(main())
