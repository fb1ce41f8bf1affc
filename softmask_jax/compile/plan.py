"""How many updates, FLOPs and chip hours a training costs, without soft-masking and with it at every budget:

    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py
    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py --topology=v5e:4x4 --config.mesh.fsdp=4
    python -m softmask_jax.compile.plan --config=configs/stdlib.py --run=runs/stdlib
    python -m softmask_jax.compile.plan --config=configs/mdlm_owt.py --seconds=0.9 --two_pass_seconds=1.2 --chips=16

iso_update is as many updates as a binary run makes. The paper (section 4) counts a soft-masked update as two forward
passes and gives it half the updates: iso_compute_paper. By cost an update is about 3 forward passes (2 with a frozen
base, one more with remat "full"), and p_sm more with soft-masking: iso_flops. Seconds of a step come from the TPU
compiler's plan (--topology, a prediction; [aot]), from the log of a run (--run), or from the command line."""
import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import numpy as np

from softmask_jax import config as schema
from softmask_jax.config.command_line import command, command_parser, split_overrides
from softmask_jax.io import run_log
from softmask_jax.io.files import check_writable, write_json
from softmask_jax.report.chart_axes import number
from softmask_jax.report.markdown import table

BUDGETS = ("iso_update", "iso_compute_paper", "iso_flops")
LEAST_ROWS = 3
Ends = tuple[float, float]  # low, high


@dataclasses.dataclass(frozen=True)
class Step:
    """Cost of one update; pairs are (single-pass, two-pass)."""

    flops: tuple[float, float]
    tokens: int
    seconds: tuple[Ends, Ends] | None = None  # of the whole slice
    chips: int = 1
    source: str = ""

    def mixed(self, pair: Sequence[float], share: float) -> float:
        """Mean cost when `share` of the steps take two passes."""
        plain, both = pair
        return plain + share * (both - plain)


@dataclasses.dataclass(frozen=True)
class Line:
    """One training budget."""

    name: str
    updates: int
    flops: float
    ratio: float
    tokens: float
    hours: Ends | None  # chip hours in total; None if step times are unknown


def plan(config, step: Step) -> list[Line]:
    """A binary run of `config.train.steps` updates, a soft-masked one per budget. ValueError for a binary config."""
    if config.soft_mask.variant == "none":
        raise ValueError("This config trains a binary model; give the soft-masked one, the plan shows both.")
    if not config.counted:
        raise ValueError("config.train.epochs are counted in the data; give --config.train.epochs=0 and the steps.")
    plain = step.flops[0] / (step.flops[1] - step.flops[0])
    ways, lines = [("binary", config.train.steps, 0.0)], []
    for name in BUDGETS:
        budgeted = dataclasses.replace(config, train=dataclasses.replace(config.train, budget=name))
        ways.append((f"soft-masked, {name}", budgeted.bought(plain), config.soft_mask.p_sm))
    for name, updates, share in ways:
        flops, hours = updates * step.mixed(step.flops, share), None
        if step.seconds:
            ends = (step.mixed(pair, share) for pair in zip(*step.seconds))
            hours = tuple(updates * seconds * step.chips / 3600 for seconds in ends)
        ratio = flops / (config.train.steps * step.flops[0])
        lines.append(Line(name, updates, flops, ratio, float(updates) * step.tokens, hours))
    return lines


def counted(config, *, length: int = 0, **sizes) -> Step:
    """FLOPs of one update including `remat`; conversations count as rows of maximal length."""
    import jax

    from softmask_jax.compile import programs
    from softmask_jax.distributed import sharding
    from softmask_jax.training.update_flops import model_flops

    denoiser = programs.build(config, sharding.make_mesh(data=1, devices=jax.devices()[:1]), **sizes)
    length = length or config.longest_row
    tokens = config.train.global_batch_size * length
    pair = (model_flops(denoiser, config.model, tokens, length, two_passes=two, again=True) for two in (False, True))
    return Step(tuple(pair), tokens)


def compiled(config, topology_name: str, **sizes) -> dict:
    """Seconds, chips and source of `Step`, from rooflines of the programs with and without soft-masking."""
    from softmask_jax.compile import programs, reading
    from softmask_jax.compile.report import roofline
    from softmask_jax.compile.topology import Topology

    topology, seconds = Topology(topology_name), []
    for variant in ("none", config.soft_mask.variant):
        one = dataclasses.replace(config, soft_mask=dataclasses.replace(config.soft_mask, variant=variant))
        program = programs.training(one, topology.devices(), **sizes)
        read = reading.read(program, topology, one.model)
        if not read.fits:
            raise ValueError(f"The step does not fit: see python -m softmask_jax.compile --topology={topology_name}.")
        # The program has more rows than the config on a slice with more chips than rows.
        share, times = config.train.global_batch_size / program.rows, roofline(read)
        seconds.append((times.best_s * share, times.worst_s * share))
    source = f"predicted from the program compiled for {topology_name}, never run"
    return {"seconds": tuple(seconds), "chips": topology.chips, "source": source}


def measured(path: str) -> dict:
    """Seconds and source of `Step`, fitted to a run's log against the share of two-pass steps in each row.
    ValueError for conversations (their lengths differ), too few rows or equal shares."""
    log = run_log.read(path)
    config = schema.from_dict(log.config)
    if config.data.source == "chat":
        raise ValueError(f"{path} was trained on conversations of any length; give --seconds and --two_pass_seconds.")
    from scipy.stats import theilslopes

    tokens = config.train.global_batch_size * config.data.seq_len
    timed, speed = log.column("train", "tokens_per_second")
    counted_at, shares = log.column("train", "two_pass_share")
    _, at, also = np.intersect1d(timed, counted_at, return_indices=True)
    seconds, share = tokens / speed[at], shares[also]
    if len(share) < LEAST_ROWS or np.ptp(share) == 0:
        reason = f"{len(share)} timed rows whose shares of two-pass steps differ too little to tell both apart"
        raise ValueError(f"{path} has {reason}; let it run longer, or give --seconds and --two_pass_seconds.")
    # Theil-Sen, as pauses of a busy machine would bias least squares.
    line = theilslopes(seconds, share, method="joint")
    plain, both = float(line.intercept), float(line.intercept + line.slope)
    source = f"the median over {len(share)} rows of the log of {path}"
    return {"seconds": ((plain, plain), (both, both)), "source": source}


def text(config, step: Step, lines: Sequence[Line]) -> str:
    """The plan as a table, with its assumptions."""
    header = ["training", "updates", "tokens", "FLOPs", "of binary"] + ["chip hours"] * bool(step.seconds)
    rows = [
        [line.name, f"{line.updates:,}", f"{line.tokens:.3g}", f"{line.flops:.3e}", f"{line.ratio:.3f}",
         *([_range(line.hours)] if line.hours else [])]
        for line in lines
    ]  # fmt: skip
    ratio = f"{step.flops[1] / step.flops[0]:.3f} times the FLOPs for an update with two passes"
    parts = [table(header, rows), f"p_sm {config.soft_mask.p_sm}: {ratio}. A batch is {step.tokens:,} tokens."]
    if step.seconds:
        plain, both = map(_range, step.seconds)
        chips = f"{step.chips} chip{'s' * (step.chips != 1)}"
        parts.append(f"A step takes {plain} s, {both} s with two passes, on {chips}: {step.source}.")
    return "\n\n".join(parts)


def _range(ends: Ends) -> str:
    low, high = map(number, ends)
    return low if ends[0] == ends[1] else f"{low} to {high}"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser("compile.plan", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, help="a soft-masked one: a name such as mdlm_owt, or a file")
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
    """Exit status: 0 done, 1 reading, compiling or writing failed, 2 usage error."""
    flags, overrides = parse(argv)
    # Nothing runs here: leave the accelerator alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    check_writable(flags.json)
    config = schema.load(flags.config, overrides)
    sizes = {"vocab_size": flags.vocab_size, "length": flags.length}
    step = counted(config, **sizes)
    plan(config, step)  # fail before compiling
    if flags.topology:
        step = dataclasses.replace(step, **compiled(config, flags.topology, **sizes))
    elif flags.run:
        step = dataclasses.replace(step, **measured(flags.run), chips=flags.chips)
    elif flags.seconds is not None:
        seconds = tuple((one, one) for one in (flags.seconds, flags.two_pass_seconds))
        step = dataclasses.replace(step, seconds=seconds, chips=flags.chips, source="from the command line")
    lines = plan(config, step)
    print(text(config, step, lines))
    if flags.json:
        write_json(flags.json, {"lines": list(map(dataclasses.asdict, lines)), "step": dataclasses.asdict(step)})


if __name__ == "__main__":
    sys.exit(main())
