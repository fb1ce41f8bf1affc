"""The tables that matter most in Markdown, for the pages of the project."""
from collections.abc import Mapping, Sequence

from softmask_jax.report.markdown import table
from softmask_jax.reproduce.page import named
from softmask_jax.reproduce.study import BASE, BINARY
from softmask_jax.reproduce.verdicts import WORDS, shown


def tables(report: Mapping) -> dict[str, str]:
    """By name: "nelbo", "nats" and "parses" of samples, "right" of puzzles."""
    parts = {"nats": report["samples"], "parses": report["samples"], "right": report["answers"]}
    return {"nelbo": _nelbo(report["nelbo"])} | {name: _few_steps(rows, name) for name, rows in parts.items()}


def _nelbo(rows: Sequence[Mapping]) -> str:
    cells = []
    for row in rows:
        difference = row["difference"]
        seeds, windows = (shown(difference[name], form="+.4f") for name in ("over_seeds", "over_windows"))
        cells.append((row["title"], str(row["seeds"]), f"{row['updates']:,}", f"{row['value']['value']:.4f}",
                      *(("", "") if row["recipe"] == BINARY else (seeds if row["seeds"] > 1 else "", windows))))
    return table(("run", "seeds", "updates", "NELBO", "less binary [over seeds]", "[over windows]"), cells)


def _few_steps(rows: Sequence[Mapping], number: str) -> str:
    """A line a model and way of decoding, a column a number of steps."""
    _, unit, factor = WORDS[number]
    by_model = {}
    for row in rows:
        if row["recipe"] != BASE.name:
            by_model.setdefault((named(row), row["seeds"]), {})[row["steps"]] = shown(
                row[number], factor, ".3f" if factor == 1 else ".1f")
    steps = sorted({row["steps"] for row in rows}, reverse=True)
    unit = "%" if unit == "points" else unit
    header = ("model", "seeds", *(f"{count} steps, {unit}" for count in steps))
    lines = [(name, str(seeds), *(one[count] for count in steps)) for (name, seeds), one in by_model.items()]
    return table(header, lines)
