"""Estimates from a record's columns: means over windows, perplexity, paired differences, cross-entropy by t.

Standard errors are over windows, each the mean of its draws: an upper bound, as draws stratified over windows vary less
in the mean. They do not cover the choice of the checkpoint, nor the dependence of windows of one document."""
import math

import numpy as np

from softmask_jax.evaluate.perplexity.records import Columns
from softmask_jax.evaluate.task import Estimate


def estimates(
    columns: Columns, metric: str, tokens: int, unit: str, characters: np.ndarray | None = None
) -> dict[str, Estimate]:
    """`metric` of the pass that counts (`Columns.best`), after its perplexity if it is an NELBO; with soft-masking also
    of one pass, and the gain of two. tokens: divisor of a window's sums. characters [W]: for bits per character."""
    means = {name: columns.values[name].mean(1) / tokens for name in {*columns.passes, columns.best}}
    prefixes = {"": columns.best}
    if len(columns.passes) > 1:
        prefixes["one_pass/"] = "one_pass"
    if columns.best not in columns.passes:
        prefixes["two_pass/"] = "two_pass"
    values = {}
    for prefix, name in prefixes.items():
        estimate = Estimate.of_mean(means[name], unit=unit, better="lower")
        if metric == "nelbo":
            values[f"{prefix}perplexity"] = estimate.mapped(lambda nats: math.exp(min(nats, 700.0)), unit="")
        values[f"{prefix}{metric}"] = estimate
        if characters is not None:
            bits = columns.values[name].mean(1) / math.log(2)
            values[f"{prefix}bits_per_character"] = Estimate.of_ratio(bits, characters, unit="bits", better="lower")
    if len(columns.passes) > 1:
        values[f"gain/{metric}"] = Estimate.of_mean(means["one_pass"] - means["two_pass"], unit=unit, better="higher")
    return values


def differences(baseline: Columns, other: Columns, metric: str, tokens: int, unit: str) -> dict[str, Estimate]:
    """`other` - `baseline`, paired by window: the pass that counts, one pass, and the gain; {} if windows, t (up to
    rounding on other devices) or numbers of masks differ."""
    a, b = baseline.values, other.values
    if not (
        np.array_equal(baseline.numbers, other.numbers) and np.array_equal(a["masked"], b["masked"])
        and np.allclose(a["t"], b["t"], rtol=1e-6, atol=0.0)
    ):  # fmt: skip
        return {}
    pairs = {metric: (a[baseline.best], b[other.best], "lower")}
    if len(baseline.passes) + len(other.passes) > 2:
        pairs[f"one_pass/{metric}"] = a["one_pass"], b["one_pass"], "lower"
    if len(baseline.passes) == len(other.passes) == 2:
        pairs[f"gain/{metric}"] = *(values["one_pass"] - values["two_pass"] for values in (a, b)), "higher"
    return {
        name: Estimate.of_mean((ours - theirs).mean(1) / tokens, unit=unit, better=better)
        for name, (theirs, ours, better) in pairs.items()
    }


def cross_entropy_by_t(columns: Columns, bins: int) -> list[dict]:
    """Unweighted nats per masked token for each of `bins` equal parts of t in [0, 1] with masks: "t": [from, to],
    "rows" (windows under a draw), "masked" tokens, and by pass {"value", "low", "high"}."""
    t, masked = columns.values["t"], columns.values["masked"]
    bin_of = np.minimum((t * bins).astype(int), bins - 1)
    table = []
    for number in range(bins):
        inside = bin_of == number
        tokens = np.where(inside, masked, 0.0).sum(1)
        if not tokens.sum():
            continue
        row = {"t": [number / bins, (number + 1) / bins], "rows": int(inside.sum()), "masked": int(tokens.sum())}
        for name in columns.passes:
            nats = np.where(inside, columns.values[f"{name}_cross_entropy"], 0.0).sum(1)
            ratio = Estimate.of_ratio(nats[tokens > 0], tokens[tokens > 0])
            row[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
        table.append(row)
    return table
