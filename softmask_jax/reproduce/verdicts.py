"""Sentences on what the study shows, and what it doesn't, from its figures."""
from collections.abc import Iterator, Mapping

from softmask_jax.report.verdict import relative
from softmask_jax.reproduce.study import SOFT

# What is measured of samples and answers: (words, unit, factor).
WORDS = {
    "nats": ("surprise of samples by an n-gram model", "nats per token", 1.0),
    "parses": ("lines of samples that parse", "points", 100.0),
    "entropy": ("entropy of a sample's tokens", "nats", 1.0),
    "right": ("puzzles solved", "points", 100.0),
}


def headlines(report: Mapping) -> list[str]:
    """What matters most, soft-masked against binary at equal FLOPs: puzzles solved in few steps, and perplexity."""
    solved = [row for row in report["answer_differences"]
              if (row["recipe"], row["feedback"], row["number"]) == (SOFT, True, "right") and row["steps"]]
    points = ", ".join(f"{shown(row['over_seeds'], 100.0, '+.1f')} in {row['steps']} steps" for row in solved)
    soft = next(row for row in report["nelbo"] if row["recipe"] == SOFT)["difference"]["over_seeds"]
    lower = relative([soft[name] for name in ("value", "low", "high")], " than binary")
    return [f"Puzzles at equal FLOPs, points more solved than by binary masking: {points}.",
            f"Python text at equal FLOPs: {lower}."]  # fmt: skip


def verdicts(report: Mapping) -> list[str]:
    return [*_nelbo(report), *_few_steps(report)]


def _nelbo(report: Mapping) -> Iterator[str]:
    by_name = {row["recipe"]: row for row in report["nelbo"]}
    soft = by_name[SOFT]
    yield _sentence("NELBO, soft-masked against binary at equal FLOPs", soft["difference"], "nats per token")
    if "binary_updates" in by_name:
        difference = [a - b for a, b in zip(soft["difference"]["by_seed"],
                                            by_name["binary_updates"]["difference"]["by_seed"], strict=True)]
        yield f"The same at equal updates, by seed: {', '.join(f'{one:+.4f}' for one in difference)} nats per token."
    yield _sentence("NELBO of the soft-masked model, two passes against one", soft["second_pass"], "nats per token")


def _few_steps(report: Mapping) -> Iterator[str]:
    rows = [row for row in report["answer_differences"] + report["sample_differences"]
            if row["recipe"] == SOFT and row["feedback"] and row["number"] != "entropy"]
    for row in rows:
        words, unit, factor = WORDS[row["number"]]
        at = "at the fewest steps, minus the same at all steps" if row["steps"] is None else f"at {row['steps']} steps"
        yield _sentence(f"{words[0].upper()}{words[1:]}, soft-masked less binary, {at}", row, unit, factor)


def _sentence(what: str, row: Mapping, unit: str, factor: float = 1.0) -> str:
    estimate = row["over_seeds"]
    return f"{what}: {shown(estimate, factor, '+.4f' if factor == 1 else '+.1f')} {unit}: {judged(estimate)}."


def shown(estimate: Mapping, factor: float = 1.0, form: str = ".4f") -> str:
    """A number with its interval."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return f"{factor * value:{form}}" + ("" if low is None else f" [{factor * low:{form}}, {factor * high:{form}}]")


def judged(estimate: Mapping) -> str:
    """What a difference and its interval say."""
    low, high = estimate["low"], estimate["high"]
    if low is None:
        return "one seed, no interval"
    if low <= 0 <= high:
        return f"no difference shown over {estimate['count']} seeds"
    if not estimate["better"]:
        return f"different over {estimate['count']} seeds"
    return f"{'better' if (low > 0) == (estimate['better'] == 'higher') else 'worse'} over {estimate['count']} seeds"
