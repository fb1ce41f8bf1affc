"""An evaluation's numbers as Markdown tables and lines of the log."""
from collections.abc import Mapping, Sequence

from softmask_jax.evaluate.task import Result
from softmask_jax.report import chart_axes
from softmask_jax.report.markdown import table

# Estimates shown in a log line.
SHOWN = 2


def number(value: float | str | None) -> str:
    """Four significant digits, integers in full; "" for None. NaN and infinities are texts, as in the JSON files."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else chart_axes.number(value)


def estimate(one: Mapping | None) -> str:
    """Such as "27.98 [24.5, 31.9]"; "" for None."""
    if one is None:
        return ""
    value = number(one["value"])
    return value if one["low"] is None else f"{value} [{number(one['low'])}, {number(one['high'])}]"


def line(result: Result) -> str:
    """The first numbers of a result, for the log."""
    first = [f"{name} {estimate(vars(one))}" for name, one in list(result.estimates.items())[:SHOWN]]
    return ", ".join(first) or "; ".join(result.notes) or "done"


Table = tuple[Sequence[str], list[tuple[str, ...]]]  # header and rows


def markdown(report: Mapping) -> str:
    """Content of `results.json` as a table for each task, paired differences, notes, models and versions."""
    parts = ["# Evaluation", "95 % intervals in brackets."]
    for task in dict.fromkeys(row["task"] for row in report["results"]):
        rows = [row for row in report["results"] if row["task"] == task]
        parts += [f"## {task}", table(*task_table(rows))]
        if notes := dict.fromkeys(note for row in rows for note in row["notes"]):
            parts.append("\n".join(f"- {note}" for note in notes))
    if report["differences"]:
        parts += ["## Paired differences", "On the same draws.", table(*differences(report))]
    header, rows = models(report)
    escaped = [(name, path.replace("|", r"\|"), *more) for name, path, *more in rows]
    parts += ["## Models", table(header, escaped), "## Versions", table(*versions(report))]
    return "\n\n".join(parts) + "\n"


def task_table(rows: Sequence[Mapping]) -> Table:
    """A row for each model and budget, a column for each number (empty where a model lacks it)."""
    units = {name: one["unit"] for row in reversed(rows) for name, one in row["estimates"].items()}
    names = list(dict.fromkeys(name for row in rows for name in row["estimates"]))
    costs = list(dict.fromkeys(name for row in rows for name in row["cost"]))
    keys = ["model", "budget"] if len({row["budget"] for row in rows}) > 1 else ["model"]
    header = [*keys, *(f"{name}, {units[name]}" if units[name] else name for name in names), *costs]
    return header, [
        (*(row[key] for key in keys), *(estimate(row["estimates"].get(name)) for name in names),
         *(number(row["cost"].get(name)) for name in costs))
        for row in rows
    ]  # fmt: skip


def differences(report: Mapping) -> Table:
    return ("task", "budget", "models", "what", "difference", "in favour of"), [
        (one["task"], one["budget"], f"{one['model']} - {one['baseline']}", one["name"], estimate(one), favoured(one))
        for one in report["differences"]
    ]


def models(report: Mapping) -> Table:
    rows = [(name, one["path"], f"{one['step']:,}", one["soft_masking"]) for name, one in report["models"].items()]
    return ("model", "folder", "step", "soft-masking"), rows


def versions(report: Mapping) -> Table:
    return ("what", "version"), [(name, str(value)) for name, value in report["versions"].items() if value is not None]


def favoured(one: Mapping) -> str:
    """The model that a difference favours, if its interval excludes 0; else "neither"."""
    if one["low"] is None or not one["better"] or one["low"] <= 0 <= one["high"]:
        return "neither"
    return one["model"] if (one["high"] < 0) == (one["better"] == "lower") else one["baseline"]
