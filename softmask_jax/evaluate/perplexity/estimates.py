"""From the columns of a record to estimates: means over windows, perplexity, paired differences, cross-entropy by t.

Standard errors are over windows, each the mean of its draws. They cover which windows there happen to be, and the draws
(those on the safe side, as draws that are stratified over windows vary less in the mean than on their own); not which
checkpoint, nor that windows next to each other may be of one document.
"""
import math
from collections.abc import Mapping

import numpy as np

from softmask_jax.evaluate.perplexity.records import Columns
from softmask_jax.evaluate.task import Estimate


def estimates(
    found: Columns, metric: str, tokens: int, unit: str, characters: np.ndarray | None = None
) -> dict[str, Estimate]:
    """By name: `metric` of the model as it is meant to be used (`Columns.best`) and, of a soft-masked one, "one_pass/..."
    and what two passes gain, paired. An NELBO's perplexity comes before it.

    tokens: what the sums of a window are divided by. characters: how many each window [W] has, for "bits_per_character".
    """
    means = {name: found.values[name].mean(1) / tokens for name in {*found.passes, found.best}}
    named = {"": found.best} | ({} if len(found.passes) == 1 else {"one_pass/": "one_pass"})
    named |= {} if found.best in found.passes else {"two_pass/": "two_pass"}
    made = {}
    for prefix, name in named.items():
        made |= _with_perplexity(prefix, metric, Estimate.of_mean(means[name], unit=unit, better="lower"))
        if characters is not None:
            bits = found.values[name].mean(1) / math.log(2)
            made[f"{prefix}bits_per_character"] = Estimate.of_ratio(bits, characters, unit="bits", better="lower")
    if len(found.passes) > 1:
        made[f"gain/{metric}"] = Estimate.of_mean(means["one_pass"] - means["two_pass"], unit=unit, better="higher")
    return made


def _with_perplexity(prefix: str, metric: str, estimate: Estimate) -> dict[str, Estimate]:
    made = {f"{prefix}{metric}": estimate}
    if metric == "nelbo":
        made = {f"{prefix}perplexity": estimate.mapped(lambda nats: math.exp(min(nats, 700.0)), unit="")} | made
    return made


def differences(baseline: Columns, other: Columns, metric: str, tokens: int, unit: str) -> dict[str, Estimate]:
    """`other` - `baseline`, window by window: each as it is meant to be used, both with one pass, and what each gains.

    {} unless both have the same windows, t (but for rounding, on other devices) and numbers of masks.
    """
    a, b = baseline.values, other.values
    if not (
        np.array_equal(baseline.numbers, other.numbers) and np.array_equal(a["masked"], b["masked"])
        and np.allclose(a["t"], b["t"], rtol=1e-6, atol=0.0)
    ):
        return {}

    def difference(theirs: np.ndarray, ours: np.ndarray, better: str) -> Estimate:
        return Estimate.of_mean((ours - theirs).mean(1) / tokens, unit=unit, better=better)

    made = {metric: difference(a[baseline.best], b[other.best], "lower")}
    if len(baseline.passes) + len(other.passes) > 2:
        made[f"one_pass/{metric}"] = difference(a["one_pass"], b["one_pass"], "lower")
    if len(baseline.passes) == len(other.passes) == 2:
        gains = (values["one_pass"] - values["two_pass"] for values in (a, b))
        made[f"gain/{metric}"] = difference(*gains, "higher")
    return made


def cross_entropy_by_t(found: Columns, bins: int) -> list[Mapping]:
    """Unweighted: nats per masked token in each of `bins` equal parts of [0, 1] of t that has masks.

    Returns:
      by bin "t": [from, to], "rows" (windows under a draw), "masked" tokens, and by pass {"value", "low", "high"}; the
      interval is over windows, of a ratio of sums, and None for a single window.
    """
    t, masked = found.values["t"], found.values["masked"]
    of_bin = np.minimum((t * bins).astype(int), bins - 1)
    made = []
    for number in range(bins):
        here = of_bin == number
        tokens = np.where(here, masked, 0.0).sum(1)
        if not tokens.sum():
            continue
        row = {"t": [number / bins, (number + 1) / bins], "rows": int(here.sum()), "masked": int(tokens.sum())}
        for name in found.passes:
            nats = np.where(here, found.values[f"{name}_cross_entropy"], 0.0).sum(1)
            ratio = Estimate.of_ratio(nats[tokens > 0], tokens[tokens > 0])
            row[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
        made.append(row)
    return made
