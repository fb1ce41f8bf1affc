"""Paired differences of runs' final models on the same masks; see `compare`."""
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

import softmask_jax
from softmask_jax import data
from softmask_jax.config.jax_settings import settled
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity.text_sets import own_text, trained_on
from softmask_jax.generate.model import Model
from softmask_jax.io.paths import to_path
from softmask_jax.report.markdown import table
from softmask_jax.report.verdict import relative
from softmask_jax.training.intervals import bracketed
from softmask_jax.training.perplexity import Nats, Perplexity
from softmask_jax.training.update_flops import mean_passes

LEAST_TOKENS = 100_000
EQUAL_WITHIN = 0.02
OVERLAY = "--curves_only overlays their curves all the same"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run with a checkpoint: folder and model."""

    path: Path
    model: Model

    @property
    def forwards_per_step(self) -> float:
        """Mean cost of a step in forward passes, recomputed ones (`remat`) included."""
        config = self.model.config
        return mean_passes(self.model.denoiser, config, config.data.seq_len)

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of this run's own steps, without those of a run whose weights it started from."""
        config = self.model.config
        tokens = self.model.step * config.train.global_batch_size * config.data.seq_len
        return tokens * self.forwards_per_step * self.model.denoiser.flops_per_token(config.data.seq_len)

    @functools.cached_property
    def perplexity(self) -> Perplexity:
        mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
        return Perplexity(self.model.denoiser, self.model.objective, mesh)


def load_run(path: str | Path) -> Run:
    """The newest whole checkpoint of a run's folder, with its EMA. FileNotFoundError if there is none."""
    path = to_path(path)
    return Run(path, softmask_jax.load(path))


def check_comparable(runs: Sequence[Run]) -> data.Windows:
    """The validation windows. ValueError if text, tokenizer, window length or noise differ, or the text has changed."""
    first = runs[0]
    for other in runs[1:]:
        pair, ours, theirs = f"{first.path} and {other.path}", first.model, other.model
        if ours.tokenizer.fingerprint() != theirs.tokenizer.fingerprint():
            raise ValueError(f"{pair} have different tokenizers: nats per token do not compare. {OVERLAY}.")
        if trained_on(first.path, ours.step) != trained_on(other.path, theirs.step):
            raise ValueError(f"{pair} were trained on different text, split or window length: train both from the same "
                             f"config.data. {OVERLAY}.")
        if ours.config.objective != theirs.config.objective:
            raise ValueError(f"{pair} have different config.objective: their masks would differ. {OVERLAY}.")
    return own_text(first.path, first.model, f"bring the files back. {OVERLAY}").windows


def score(run: Run, windows: data.Windows, *, draws: int, batch_size: int, seed: int) -> dict[str, Nats]:
    """NELBO of every window, averaged over `draws` masks: {"one_pass", "two_pass"}, the latter with soft-masking."""
    total, params = {}, jax.device_put(run.model.params, sharding.replicated(run.perplexity.mesh))
    for draw in range(draws):
        batches = data.validation_batches(windows, global_batch_size=batch_size)
        for name, nats in run.perplexity(params, batches, len(windows), seed + draw).items():
            total[name] = total.get(name, 0.0) + nats.windows
    return {name: Nats(nats / draws, windows.seq_len) for name, nats in total.items()}


@settled()
def compare(runs: Sequence[Run], *, draws: int = 4, batch_size: int = 16, seed: int = 40_000) -> dict:
    """Score runs on the same masks, with at least `draws` draws, more if 100,000 tokens need them.

    Returns JSON values, estimates as (mean, low, high) in nats per token (low and high None for a single window):
      "baseline": the first run's name. "validation": {"windows", "draws", "tokens"}.
      "runs": by name {"path", "step", "planned_steps", "init" (checkpoint it started from), "flops", "flops_ratio" (to
        the baseline), "equal_flops" (within 2 %), "forwards_per_step", "nelbo": {"one_pass", "two_pass"}}.
      "differences": paired, by "first - second": a run's best estimate and the baseline's; two passes of a run and one.
    ValueError: see `check_comparable`."""
    windows = check_comparable(runs)
    draws = max(draws, math.ceil(LEAST_TOKENS / (len(windows) * windows.seq_len)))
    named = dict(zip(run_names([run.path for run in runs]), runs))
    scores = {name: score(run, windows, draws=draws, batch_size=batch_size, seed=seed) for name, run in named.items()}
    best = {
        name: (f"{name}, two passes", nats["two_pass"]) if "two_pass" in nats else (name, nats["one_pass"])
        for name, nats in scores.items()
    }
    (base, theirs), *others = best.values()
    differences = {f"{label} - {base}": _estimate(ours, theirs) for label, ours in others}
    for name, nats in scores.items():
        if "two_pass" in nats:
            differences[f"{name}, two passes - {name}, one pass"] = _estimate(nats["two_pass"], nats["one_pass"])
    return {
        "baseline": next(iter(scores)),
        "runs": {name: _described(run, scores[name], runs[0]) for name, run in named.items()},
        "differences": differences,
        "validation": {"windows": len(windows), "draws": draws, "tokens": len(windows) * draws * windows.seq_len},
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """Short unique names: the ends of the paths that tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _described(run: Run, scores: dict[str, Nats], baseline: Run) -> dict:
    ratio = run.flops / baseline.flops
    return {
        "path": str(run.path), "step": run.model.step, "planned_steps": run.model.config.updates,
        "init": run.model.config.init.checkpoint, "flops": run.flops, "flops_ratio": ratio,
        "equal_flops": abs(ratio - 1.0) <= EQUAL_WITHIN, "forwards_per_step": run.forwards_per_step,
        "nelbo": {name: _estimate(nats) for name, nats in scores.items()},
    }  # fmt: skip


def _estimate(nats: Nats, other: Nats | None = None) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of the NELBO, or of its paired difference to another; nats per token."""
    return nats.mean - (0.0 if other is None else other.mean), *nats.interval(other)


def tables(report: dict) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Header and rows of the runs and of their differences; report: what `compare` returns."""
    rows = []
    for name, run in report["runs"].items():
        nelbo = {key: f"{value:.4f}{bracketed(low, high)}" for key, (value, low, high) in run["nelbo"].items()}
        steps = f"{run['step']:,}" + (f" of {run['planned_steps']:,}" if run["step"] < run["planned_steps"] else "")
        rows.append((f"{name} ({run['path']})", steps, f"{run['forwards_per_step']:.2f}", f"{run['flops']:.3e}",
                     nelbo["one_pass"], nelbo.get("two_pass", "as one pass")))  # fmt: skip
    differences = [
        (name, f"{value:+.4f}{bracketed(low, high, '+.4f')}",
         "no interval" if low is None else "no" if low <= 0 <= high else "yes")
        for name, (value, low, high) in report["differences"].items()
    ]  # fmt: skip
    return [
        (("run", "steps", "forwards a step", "training FLOPs", "one pass", "two passes"), rows),
        (("paired difference (negative: the first is better)", "nats per token", "interval excludes 0"), differences),
    ]


def introduction(report: dict) -> str:
    used = report["validation"]
    return (f"NELBO in nats per token with 95 % intervals, on {used['windows']:,} validation windows x {used['draws']} "
            f"draws ({used['tokens']:,} tokens), the same masks for all.")


def verdicts(report: dict) -> list[str]:
    """A sentence on the paired difference of each run to the baseline, with what training cost beside it."""
    others, sentences = [name for name in report["runs"] if name != report["baseline"]], []
    for name, (label, nats) in zip(others, report["differences"].items()):  # these come first
        run, (ours, _, base) = report["runs"][name], label.rpartition(" - ")
        cost = "equal training FLOPs" if run["equal_flops"] else f"{run['flops_ratio']:.2f} times the training FLOPs"
        sentences.append(f"{ours}: {relative(nats, f' than {base}')}, at {cost}.")
    return sentences


def costs(report: dict) -> list[str]:
    """Sentences on each run's training cost beside the baseline's, and on its initial weights."""
    baseline, sentences = report["baseline"], []
    for name, run in report["runs"].items():
        if run["init"]:
            sentences.append(f"{name} started from the weights of {run['init']}, whose training is not counted.")
        ratio = f"{name} / {baseline} = {run['flops_ratio']:.4f}"
        if name != baseline and run["equal_flops"]:
            sentences.append(f"Training FLOPs are equal within 2 % ({ratio}).")
        elif name != baseline:
            steps = round(run["step"] / run["flops_ratio"])
            sentences.append(f"Training FLOPs are NOT equal within 2 % ({ratio}): at {steps:,} steps {name} would have "
                             f"cost what {baseline} did.")
    return sentences


def markdown(report: dict) -> str:
    sentences = "\n".join([*costs(report), *verdicts(report)])
    return "\n\n".join([introduction(report), *(table(*one) for one in tables(report)), sentences])
