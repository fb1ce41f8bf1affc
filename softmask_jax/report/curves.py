"""Curves of a `RunLog` for reports and comparisons, against steps, tokens or FLOPs."""
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from softmask_jax.io.run_log import RunLog, number
from softmask_jax.report.charts import Series, smoothed

ESTIMATES = {"one_pass": "one pass", "two_pass": "two passes"}
# Names of x axes.
STEPS, TOKENS, FLOPS = "step", "training tokens", "training FLOPs"
SCALARS = {
    "scale": "Scale ω_s", "centre": "Centre ω_b (nats)", "steepness": "Steepness ω_a", "temperature": "Temperature",
}  # fmt: skip


def trained(run: RunLog, name: str, label: str, **look) -> Series:
    """A value of the training rows against the step."""
    return Series(label, *run.column("train", name), **look)


def trained_smoothed(run: RunLog, name: str, label: str, **look) -> Series:
    """`trained` as a running mean."""
    steps, values = run.column("train", name)
    return Series(label, steps, smoothed(values), **look)


def trained_both(run: RunLog, name: str) -> list[Series]:
    """Every training row, pale, behind its running mean."""
    return [trained(run, name, "each row", faint=True, colour=0), trained_smoothed(run, name, "running mean", colour=0)]


def perplexity(run: RunLog, estimate: str, label: str, **look) -> Series:
    """Validation perplexity ("one_pass" or "two_pass") against the step, with its 95 % interval."""
    return _validated(run, f"{estimate}/nelbo", label, np.exp, look)


def validation_loss(run: RunLog, label: str, **look) -> Series:
    """The validation loss of a run that has no perplexity, with its 95 % interval."""
    return _validated(run, "loss", label, np.asarray, look)


def _validated(run: RunLog, name: str, label: str, scale: Callable, look: Mapping) -> Series:
    """A column of the validation rows, or of the final one's where there is no other, and its interval if complete."""
    kind = "validation" if len(run.column("validation", name)[0]) else "final"
    (steps, middle), (_, low), (_, high) = (run.column(kind, key) for key in (name, f"{name}_low", f"{name}_high"))
    interval = (low, high) if len(low) == len(high) == len(middle) else ()
    with np.errstate(over="ignore"):
        return Series(label, steps, *map(scale, (middle, *interval)), **look)


def best_estimate(run: RunLog) -> str:
    """Two passes where the run has them, else one."""
    return "two_pass" if any(name.startswith("two_pass/") for _, name in run.columns) else "one_pass"


def against(run: RunLog, series: Series, axis: str) -> Series | None:
    """A curve over steps moved to tokens or FLOPs; None where the run does not log them."""
    if axis == STEPS:
        return series
    x = run.tokens(series.x) if axis == TOKENS else run.flops(series.x)
    return None if x is None else dataclasses.replace(series, x=x)


def cross_entropy_by_t(run: RunLog) -> tuple[list[str], list[float]]:
    """Bins of t and their mean cross-entropy (nats) in the newest training row."""
    bins = {
        name.split("/", 1)[1]: value for name, entry in run.last.get("train", {}).items()
        if name.startswith("cross_entropy_by_t/") and (value := number(entry)) is not None
    }  # fmt: skip
    return list(bins), list(bins.values())


def scalars(run: RunLog) -> dict[str, str]:
    """The soft-masking scalars that the run logs, with their titles; the temperature only where it is learned."""
    values = {name: run.column("train", f"soft_mask/{name}")[1] for name in SCALARS}
    return {
        name: title for name, title in SCALARS.items()
        if len(values[name]) and (name != "temperature" or np.ptp(values[name]) > 0)
    }  # fmt: skip


def lambda_histogram(run: RunLog) -> tuple[list[str], list[float], int]:
    """Bins of lambda, the share of fed-back masks in each, and the step of the newest row with a histogram."""
    row = run.histogram or {}
    shares = [number(share) for share in row.get("lambda_histogram", ())]
    if not shares or None in shares:
        return [], [], 0
    return [f"{i / len(shares):.1f}" for i in range(len(shares))], shares, row["step"]


def throughput(run: RunLog) -> str:
    """Median and quartiles of tokens/s as a sentence; "" where none was measured."""
    _, speed = run.column("train", "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if not len(speed):
        return ""
    low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75))
    speeds = f"Median {middle:,.0f} tokens/s, quartiles {low:,.0f} to {high:,.0f}"
    _, share = run.column("train", "model_flops_share")
    share = share[np.isfinite(share)]
    return speeds + (f"; {np.median(share):.1%} of the peak FLOPs." if len(share) else ".")
