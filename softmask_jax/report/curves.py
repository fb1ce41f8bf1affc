"""Curves of runs, for their reports and comparisons: what is drawn of a `RunLog`, and against what."""
import numpy as np

from softmask_jax.io.run_log import RunLog, number
from softmask_jax.report.charts import Series, smoothed

ESTIMATES = {"one_pass": "one pass", "two_pass": "two passes"}
# What a curve may be drawn against, and how its axis is called.
STEPS, TOKENS, FLOPS = "step", "training tokens", "training FLOPs"
SCALARS = {
    "scale": "Scale ω_s",
    "centre": "Centre ω_b (nats)",
    "steepness": "Steepness ω_a",
    "temperature": "Temperature",
}


def trained(run: RunLog, name: str, label: str, **look) -> Series:
    """A value of the training rows against the step."""
    return Series(label, *run.column("train", name), **look)


def trained_smoothed(run: RunLog, name: str, label: str, **look) -> Series:
    """The same as a running mean."""
    steps, values = run.column("train", name)
    return Series(label, steps, smoothed(values), **look)


def perplexity(run: RunLog, estimate: str, label: str, **look) -> Series:
    """Validation perplexity against the step, with its 95 % interval; of the final validation where there was no other.

    estimate: "one_pass" or "two_pass".
    """
    kind = "validation" if len(run.column("validation", f"{estimate}/nelbo")[0]) else "final"
    columns = [run.column(kind, f"{estimate}/{name}") for name in ("nelbo", "nelbo_low", "nelbo_high")]
    steps, middle = columns[0]
    with np.errstate(over="ignore"):
        if any(len(values) != len(middle) for _, values in columns):
            return Series(label, steps, np.exp(middle), **look)
        low, high = (np.exp(values) for _, values in columns[1:])
        return Series(label, steps, np.exp(middle), low, high, **look)


def validation_loss(run: RunLog, label: str, **look) -> Series:
    """The validation loss of a run that has no perplexity, with its 95 % interval; as `perplexity`."""
    kind = "validation" if len(run.column("validation", "loss")[0]) else "final"
    (steps, middle), (_, low), (_, high) = (run.column(kind, name) for name in ("loss", "loss_low", "loss_high"))
    whole = len(middle) == len(low) == len(high)
    return Series(label, steps, middle, *((low, high) if whole else ()), **look)


def best_estimate(run: RunLog) -> str:
    """Two passes where the run has them, else one."""
    return "two_pass" if any(name.startswith("two_pass/") for _, name in run.columns) else "one_pass"


def against(run: RunLog, series: Series, axis: str) -> Series | None:
    """The same curve against tokens or FLOPs instead of steps; None where the run does not tell them."""
    if axis == STEPS:
        return series
    x = run.tokens(series.x) if axis == TOKENS else run.flops(series.x)
    return None if x is None else Series(series.name, x, series.y, series.low, series.high, series.faint, series.colour)


def cross_entropy_by_t(run: RunLog) -> tuple[list[str], list[float]]:
    """Bins of t and their mean cross-entropy (nats) in the newest training row."""
    found = {
        name.split("/", 1)[1]: value
        for name, entry in run.last.get("train", {}).items()
        if name.startswith("cross_entropy_by_t/") and (value := number(entry)) is not None
    }
    return list(found), list(found.values())


def scalars(run: RunLog) -> dict[str, str]:
    """The soft-masking scalars that the run logs, with their titles; the temperature only where it is learned."""
    found = {name: run.column("train", f"soft_mask/{name}")[1] for name in SCALARS}
    return {
        name: title for name, title in SCALARS.items()
        if len(found[name]) and (name != "temperature" or np.ptp(found[name]) > 0)
    }  # fmt: skip


def lambda_histogram(run: RunLog) -> tuple[list[str], list[float], int]:
    """Bins of lambda, the share of fed-back masks in each, and the step, of the newest row that has a histogram."""
    row = run.histogram or {}
    shares = [number(share) for share in row.get("lambda_histogram", ())]
    if not shares or None in shares:
        return [], [], 0
    return [f"{i / len(shares):.1f}" for i in range(len(shares))], shares, row["step"]


def throughput(run: RunLog) -> str:
    """Median and quartiles of the speed; "" where none was measured."""
    _, speed = run.column("train", "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if not len(speed):
        return ""
    low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75))
    said = f"Median {middle:,.0f} tokens/s, quartiles {low:,.0f} to {high:,.0f}"
    _, share = run.column("train", "model_flops_share")
    share = share[np.isfinite(share)]
    return said + (f"; {np.median(share):.1%} of the peak FLOPs." if len(share) else ".")
