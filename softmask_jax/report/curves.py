"""Curves of a `RunLog` for reports and comparisons, against steps, tokens or FLOPs."""
import dataclasses

import numpy as np

from softmask_jax.io.run_log import RunLog, number
from softmask_jax.report.charts import Series, smoothed

ESTIMATES = {"one_pass": "one pass, plain masks", "two_pass": "two passes, soft masks"}
# x axes
STEPS, TOKENS, FLOPS = "step", "training tokens", "training FLOPs"
SCALARS = {
    "scale": "Scale ω_s", "centre": "Centre ω_b (nats)", "steepness": "Steepness ω_a", "temperature": "Temperature",
}  # fmt: skip
MEANINGS = {
    "scale": "The largest λ that a mask can get.",
    "centre": "Where λ is half of its largest: at a prediction whose entropy is −ω_b.",
    "steepness": "How sharply λ falls as a prediction gets less sure.",
    "temperature": "Divides the logits of what is fed back: above 1 flattens it.",
}  # fmt: skip


def trained(run: RunLog, name: str, label: str, *, mean: bool = False, **look) -> Series:
    """A column of the training rows, or its running mean, against the step."""
    steps, values = run.column("train", name)
    return Series(label, steps, smoothed(values) if mean else values, **look)


def trained_both(run: RunLog, name: str) -> list[Series]:
    """All training rows, pale, behind their running mean."""
    rows = trained(run, name, "each logged row", faint=True, colour=0)
    return [rows, trained(run, name, "running mean", mean=True, colour=0)]


def perplexity(run: RunLog, estimate: str, label: str, **look) -> Series:
    """Validation perplexity ("one_pass" or "two_pass") against the step, with its 95 % interval."""
    nelbo = validated(run, f"{estimate}/nelbo", label, **look)
    with np.errstate(over="ignore"):
        scaled = {name: np.exp(values) for name in ("y", "low", "high") if (values := getattr(nelbo, name)) is not None}
    return dataclasses.replace(nelbo, **scaled)


def validated(run: RunLog, name: str, label: str, **look) -> Series:
    """A column of the validation rows, or else the final one; with its 95 % interval if complete."""
    kind = "validation" if len(run.column("validation", name)[0]) else "final"
    (steps, middle), (_, low), (_, high) = (run.column(kind, key) for key in (name, f"{name}_low", f"{name}_high"))
    interval = (low, high) if len(low) == len(high) == len(middle) else ()
    return Series(label, steps, middle, *interval, **look)


def against(run: RunLog, series: Series, axis: str) -> Series | None:
    """A curve over steps moved to tokens or FLOPs; None if the run does not log them."""
    if axis == STEPS or not len(series.x):
        return series
    x = run.tokens(series.x) if axis == TOKENS else run.flops(series.x)
    return None if x is None else dataclasses.replace(series, x=x)


def cross_entropy_by_t(run: RunLog) -> dict[str, float]:
    """Lower end of each bin of t -> mean cross-entropy (nats), from the newest training row."""
    prefix, row = "cross_entropy_by_t/", run.last.get("train", {})
    return {
        name.removeprefix(prefix).split("-")[0]: value for name, entry in row.items()
        if name.startswith(prefix) and (value := number(entry)) is not None
    }  # fmt: skip


def scalars(run: RunLog) -> dict[str, str]:
    """Logged soft-masking scalars -> titles; the temperature only if learned."""

    def logged(name: str) -> bool:
        _, values = run.column("train", f"soft_mask/{name}")
        return len(values) > 0 and (name != "temperature" or np.ptp(values) > 0)

    return {name: title for name, title in SCALARS.items() if logged(name)}


def lambda_histogram(run: RunLog) -> dict[str, float]:
    """Lower end of each bin of lambda -> share of fed-back masks, from the newest row with a histogram."""
    shares = [number(share) for share in (run.histogram or {}).get("lambda_histogram", ())]
    return {} if None in shares else {f"{i / len(shares):.1f}": share for i, share in enumerate(shares)}


def throughput(run: RunLog) -> str:
    """A sentence with median and quartiles of tokens/s; "" if not measured."""
    _, speed = run.column("train", "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if not len(speed):
        return ""
    low, middle, high = np.quantile(speed, (0.25, 0.5, 0.75))
    speeds = f"Median {middle:,.0f} tokens/s, quartiles {low:,.0f} to {high:,.0f}"
    _, share = run.column("train", "model_flops_share")
    share = share[np.isfinite(share)]
    return speeds + (f"; {np.median(share):.1%} of the peak FLOPs." if len(share) else ".")
