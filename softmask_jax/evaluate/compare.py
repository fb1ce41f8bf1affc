"""Runs side by side: their curves on one page, and paired differences of their final models on the same masks:

    python -m softmask_jax.evaluate.compare runs/binary runs/stdlib [runs/more ...] [--draws 4] [--json out.json]

The first run is the baseline. Every window of the validation split is masked several times; the NELBO of a window is
the mean over its draws, and the 95 % intervals are over windows, paired where two estimates are compared. Training is
counted in forward passes, as the paper's method has it: 3 for a plain step, 3 + p_sm for a soft-masked one.
`--curves_only` overlays the curves of any runs, also of unfinished ones or of runs on different text.
"""
import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import softmask_jax
from softmask_jax import data
from softmask_jax.config.command_line import command, command_parser
from softmask_jax.config.jax_settings import settled
from softmask_jax.distributed import sharding
from softmask_jax.generate.model import Model
from softmask_jax.io import run_log, tree_files
from softmask_jax.io.files import check_writable, write_atomically, write_json
from softmask_jax.report import compare_page
from softmask_jax.report.markdown import table
from softmask_jax.training.intervals import bracketed
from softmask_jax.training.perplexity import Nats, Perplexity
from softmask_jax.training.update_flops import plain_passes

LEAST_TOKENS = 100_000
EQUAL_WITHIN = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run with a checkpoint: its folder, its model, and the fingerprint of the text it was trained on."""

    path: Path
    model: Model
    fingerprint: str

    @property
    def forwards_per_step(self) -> float:
        """What a step costs, on average, in forward passes; what is computed again (`remat`) counts, too."""
        config = self.model.config
        plain = plain_passes(self.model.denoiser, config.model, config.data.seq_len)
        return plain + (config.soft_mask.p_sm if config.soft_mask.variant != "none" else 0.0)

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of this run's own steps; of a run that started from another's weights without those."""
        config = self.model.config
        tokens = self.model.step * config.train.global_batch_size * config.data.seq_len
        return tokens * self.forwards_per_step * self.model.denoiser.flops_per_token(config.data.seq_len)

    @functools.cached_property
    def perplexity(self) -> Perplexity:
        return Perplexity(self.model.denoiser, self.model.objective, sharding.make_mesh(data=1, devices=jax.devices()[:1]))


def load_run(path: str | Path) -> Run:
    """The newest whole checkpoint of a run's folder, with its EMA. FileNotFoundError if there is none."""
    path = Path(os.path.expanduser(path))
    model = softmask_jax.load(path)
    checkpoint = path / "checkpoints" / str(model.step)
    stored = tree_files.read_json(checkpoint, tree_files.verify(checkpoint, ["data"]))
    return Run(path, model, stored["cursor"]["data"])


def check_comparable(runs: Sequence[Run]) -> data.Data:
    """The text all were trained on, whose validation split scores them.

    Raises:
      ValueError: other text, split, tokenizer, window length or noise; or the text on this machine is no longer theirs.
    """
    first = runs[0]
    for other in runs[1:]:
        pair, ours, theirs = f"{first.path} and {other.path}", first.model, other.model
        if ours.tokenizer.fingerprint() != theirs.tokenizer.fingerprint():
            raise ValueError(f"{pair} have different tokenizers: nats per token do not compare. {_OVERLAY}")
        if first.fingerprint != other.fingerprint:
            raise ValueError(
                f"{pair} were trained on different text, split or window length (fingerprints "
                f"{first.fingerprint[:12]} and {other.fingerprint[:12]}): train both from the same config.data. "
                f"{_OVERLAY}"
            )
        if ours.config.objective != theirs.config.objective:
            raise ValueError(f"{pair} have different config.objective: their masks would differ. {_OVERLAY}")
    built = data.build(first.model.config.data)
    if built.info["fingerprint"] != first.fingerprint:
        raise ValueError(
            f"The text that config.data of {first.path} describes has changed since the run (fingerprint "
            f"{built.info['fingerprint'][:12]} instead of {first.fingerprint[:12]}): bring the files back. {_OVERLAY}"
        )
    return built


_OVERLAY = "--curves_only overlays their curves all the same."


def score(run: Run, windows: data.Windows, *, draws: int, batch_size: int, seed: int) -> dict[str, Nats]:
    """NELBO of every window, averaged over `draws` masks: {"one_pass", "two_pass"}, the second not for a binary model.

    The masks depend on the window's number, the draw and the seed alone.
    """
    total, params = {}, jax.device_put(run.model.params, sharding.replicated(run.perplexity.mesh))
    for draw in range(draws):
        batches = data.validation_batches(windows, global_batch_size=batch_size)
        for name, nats in run.perplexity(params, batches, len(windows), seed + draw).items():
            total[name] = total.get(name, 0.0) + nats.windows
    return {name: Nats(found / draws, windows.seq_len) for name, found in total.items()}


@settled()
def compare(runs: Sequence[Run], *, draws: int = 4, batch_size: int = 16, seed: int = 40_000) -> dict:
    """Score runs on the same masks, with as many draws as 100,000 tokens need, at least `draws`.

    Returns:
      JSON values: "baseline", the first run's name; "runs" by name, each "path", "step", "planned_steps", "init" (what
      it started from), "flops", "flops_ratio" to the baseline, "equal_flops" within 2 %, "forwards_per_step" and
      "nelbo" {"one_pass", "two_pass"} as (mean, low, high) in nats per token, without ends (None) for a single window;
      "differences" the same way by what is subtracted from what, paired (negative: the first is better): each run's
      best estimate and the baseline's, and two passes and one of each soft-masked run; "validation" {"windows",
      "draws", "tokens"}.

    Raises:
      ValueError: see `check_comparable`.
    """
    windows = check_comparable(runs).validation
    draws = max(draws, math.ceil(LEAST_TOKENS / (len(windows) * windows.seq_len)))
    names = run_names([run.path for run in runs])
    scores = {
        name: score(run, windows, draws=draws, batch_size=batch_size, seed=seed) for name, run in zip(names, runs)
    }
    soft = [name for name in names if "two_pass" in scores[name]]
    best = {name: ("two_pass", f"{name}, two passes") if name in soft else ("one_pass", name) for name in names}
    baseline, differences = names[0], {}
    for name in names[1:]:
        (ours, label), (theirs, base) = best[name], best[baseline]
        differences[f"{label} - {base}"] = _estimate(scores[name][ours], scores[baseline][theirs])
    for name in soft:
        pair = scores[name]["two_pass"], scores[name]["one_pass"]
        differences[f"{name}, two passes - {name}, one pass"] = _estimate(*pair)
    return {
        "baseline": baseline,
        "runs": {name: _describe(run, scores[name], runs[0]) for name, run in zip(names, runs)},
        "differences": differences,
        "validation": {"windows": len(windows), "draws": draws, "tokens": len(windows) * draws * windows.seq_len},
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each: its folder's, with as much of what is above as tells them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _describe(run: Run, scores: dict[str, Nats], baseline: Run) -> dict:
    ratio = run.flops / baseline.flops
    return {
        "path": str(run.path),
        "step": run.model.step,
        "planned_steps": run.model.config.updates,
        "init": run.model.config.init.checkpoint,
        "flops": run.flops,
        "flops_ratio": ratio,
        "equal_flops": abs(ratio - 1.0) <= EQUAL_WITHIN,
        "forwards_per_step": run.forwards_per_step,
        "nelbo": {name: _estimate(nats) for name, nats in scores.items()},
    }


def _estimate(nats: Nats, other: Nats | None = None) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of the NELBO, or of its difference to another on the same masks; nats per token."""
    return nats.mean - (0.0 if other is None else other.mean), *nats.interval(other)


def tables(found: dict) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(header, rows) of what `compare` returns: the runs, and their differences."""
    rows = []
    for name, run in found["runs"].items():
        nelbo = {key: f"{value:.4f}{bracketed(low, high)}" for key, (value, low, high) in run["nelbo"].items()}
        steps = f"{run['step']:,}" + (f" of {run['planned_steps']:,}" if run["step"] < run["planned_steps"] else "")
        rows.append((f"{name} ({run['path']})", steps, f"{run['forwards_per_step']:.2f}", f"{run['flops']:.3e}",
                     nelbo["one_pass"], nelbo.get("two_pass", "as one pass")))  # fmt: skip
    differences = [
        (name, f"{value:+.4f}{bracketed(low, high, '+.4f')}",
         "no interval" if low is None else "no" if low <= 0 <= high else "yes")
        for name, (value, low, high) in found["differences"].items()
    ]
    return [
        (("run", "steps", "forwards a step", "training FLOPs", "one pass", "two passes"), rows),
        (("paired difference (negative: the first is better)", "nats per token", "interval excludes 0"), differences),
    ]


def introduction(found: dict) -> str:
    """What the numbers of the tables are."""
    used = found["validation"]
    return (
        f"NELBO in nats per token with 95 % intervals, on {used['windows']:,} validation windows x {used['draws']} "
        f"draws ({used['tokens']:,} tokens), the same masks for all."
    )


def verdicts(found: dict) -> list[str]:
    """What each run's training cost beside the baseline's, and from where a run started that did not start anew."""
    baseline, said = found["baseline"], []
    for name, run in found["runs"].items():
        if run["init"]:
            said.append(f"{name} started from the weights of {run['init']}, whose training is not counted.")
        if name == baseline:
            continue
        ratio = f"{name} / {baseline} = {run['flops_ratio']:.4f}"
        if run["equal_flops"]:
            said.append(f"Training FLOPs are equal within 2 % ({ratio}).")
        else:
            steps = round(run["step"] / run["flops_ratio"])
            said.append(
                f"Training FLOPs are NOT equal within 2 % ({ratio}): at {steps:,} steps {name} would have cost what "
                f"{baseline} did."
            )
    return said


def markdown(found: dict) -> str:
    """What `compare` returns, for a README."""
    return "\n\n".join([introduction(found), *(table(*one) for one in tables(found)), "\n".join(verdicts(found))])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("evaluate.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, the baseline first")
    parser.add_argument("--draws", type=int, default=4, help="masks a window; more where 100,000 tokens need them")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time")
    parser.add_argument("--seed", type=int, default=40_000, help="of the masks")
    parser.add_argument("--out", default="compare.html", help="the page; replaces the file, compare.html by default")
    parser.add_argument("--json", default="", help="write the figures of the tables here too; replaces the file")
    parser.add_argument("--curves_only", action="store_true", help="score nothing: overlay the curves of any runs")
    flags = parser.parse_args(argv)
    flags.out, flags.json = map(os.path.expanduser, (flags.out, flags.json))
    if len(flags.runs) < 2:
        parser.error("give two runs or more")
    if flags.draws < 1 or flags.batch_size < 1:
        parser.error("--draws and --batch_size must be positive")
    if flags.curves_only and flags.json:
        parser.error("--json holds the tables, which --curves_only leaves out")
    return flags


@command()
def main(argv: list[str]) -> None:
    """Exit status: 0 done; 1 the runs don't compare, or something cannot be read or written; 2 wrong command line."""
    flags = parse(argv)
    check_writable(flags.json)
    check_writable(flags.out, "--out")
    logs, content = [run_log.read(path) for path in flags.runs], []
    if not flags.curves_only:
        found = compare(
            [load_run(path) for path in flags.runs], draws=flags.draws, batch_size=flags.batch_size, seed=flags.seed
        )
        print(markdown(found), end="\n\n")
        if flags.json:
            write_json(flags.json, found)
        content = [introduction(found), *tables(found), *verdicts(found)]
    names = run_names([log.path for log in logs])
    write_atomically(flags.out, compare_page.build(dict(zip(names, logs)), content), elsewhere="give another --out")
    print(f"Page  {flags.out}")


if __name__ == "__main__":
    sys.exit(main())
