"""First sentences of pages: what was measured, as numbers with 95 % intervals."""
import math
from collections.abc import Mapping, Sequence

from softmask_jax.io.run_log import RunLog, number as number_of
from softmask_jax.report.chart_axes import number
from softmask_jax.report.scored import taken_on

BRACKETS = "In brackets: 95 % intervals"


def relative(nats: Sequence[float | None], than: str = "") -> str:
    """A difference (mean, low, high) of nats per token as one of perplexity: "1.3 % lower perplexity on the same masks
    [0.9, 1.7]". than: such as " than binary"."""
    (mean, *ends), has_interval = [_percent(value) for value in nats], None not in nats
    digits = ".1f" if abs(mean) >= 0.095 or not mean else ".2f"
    if has_interval and min(ends) <= 0 <= max(ends):
        interval = _ends(ends, f"+{digits}")
        return f"no measurable difference in perplexity{than} on the same masks: {mean:+{digits}} %{interval}"
    sign, word = (-1, "lower") if mean < 0 else (1, "higher")
    interval = _ends(sorted(sign * end for end in ends), digits) if has_interval else " (no interval)"
    return f"{abs(mean):{digits}} % {word} perplexity{than} on the same masks{interval}"


def of_run(run: RunLog, row: Mapping) -> tuple[str, str]:
    """The verdict on a run's newest validation `row`, and a sentence on what it was taken on; ("", "") without one."""
    scores = {name: value for name, entry in row.items() if (value := number_of(entry)) is not None}
    basis = taken_on(row)
    on = f" on {basis}" if basis else ""
    unit = "conversations" if any(name.endswith("loss") for name in scores) else "windows"
    small = f"Taken{on}, each masked once. {BRACKETS} over {unit}." if basis else f"{BRACKETS} over {unit}."
    if "gain/nelbo" in scores:
        gain = [-scores["gain/nelbo"], *(_negated(scores.get(f"gain/{end}")) for end in ("high", "low"))]
        one, two = (number(_exp(scores[f"{name}/nelbo"])) for name in ("one_pass", "two_pass"))
        small = f"Perplexity {two} with soft masks, {one} with plain ones. {small}"
        return f"With soft-masking {relative(gain)}.", small
    if "gain/loss" in scores:
        change, word = scores["gain/loss"], "lower" if scores["gain/loss"] >= 0 else "higher"
        ends = [scores.get(f"gain/loss_{end}") for end in ("low", "high")]
        ends = _ends(sorted(end if change >= 0 else -end for end in ends), ".4f") if None not in ends else ""
        return f"With soft-masking {abs(change):.4f} nats {word} validation loss on the same masks{ends}.", small
    for name, what in (("one_pass/nelbo", "Perplexity per token"), ("loss", "Validation loss")):
        if name in scores:
            show = (lambda nats: number(_exp(nats))) if name == "one_pass/nelbo" else "{:.4f}".format
            ends = [scores.get(f"{name}_{end}") for end in ("low", "high")]
            ends = f" [{show(ends[0])}, {show(ends[1])}]" if None not in ends else ""
            masks = " with plain masks" if not run.soft_masked and name == "one_pass/nelbo" else ""
            return f"{what} {show(scores[name])}{ends}{masks}.", small
    return "", ""


def _percent(nats: float | None) -> float | None:
    return None if nats is None else 100 * math.expm1(nats) if nats < 340 else math.inf


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 340 else math.inf if nats == nats else nats


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _ends(ends: Sequence[float], form: str) -> str:
    return f" [{ends[0]:{form}}, {ends[1]:{form}}]"
