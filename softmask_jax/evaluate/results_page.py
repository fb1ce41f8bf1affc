"""An evaluation as a self-contained HTML page: a verdict, a section for each task, quality against cost."""
from collections.abc import Mapping, Sequence
from fractions import Fraction

from softmask_jax.evaluate import tables
from softmask_jax.report import page, verdict
from softmask_jax.report.charts import Series, line_chart

FILE = "results.html"
COSTS = {"calls": "network calls a text", "seconds": "seconds a text"}


def build(report: Mapping) -> str:
    """The page as HTML. report: content of `results.json`."""
    drawn = curves(report)
    return page.document(
        "Evaluation",
        "<header><h1>Evaluation</h1>\n",
        page.verdict(verdicts(report), f"{verdict.BRACKETS}."),
        f'<p class="pale">{page.text("; ".join(_described(report)))}</p></header>\n',
        *(_section(report, task, drawn) for task in _tasks(report)),
        page.section("Paired differences", "<p>On the same draws.</p>\n", page.table(*tables.differences(report)))
        if report["differences"] else "",
        page.section("Models", page.table(*tables.models(report))),
        page.section("Versions", page.table(*tables.versions(report))),
    )  # fmt: skip


def verdicts(report: Mapping) -> list[str]:
    """A sentence for each task and model at its largest budget: the first paired difference, or without a baseline the
    first number."""
    sentences = []
    for task in _tasks(report):
        rows = [one for one in report["differences"] if one["task"] == task] or [
            {"model": row["model"], "budget": row["budget"], "name": name, **one}
            for row in report["results"] if row["task"] == task for name, one in row["estimates"].items()
        ]  # fmt: skip
        most = max((Fraction(row["budget"]) for row in rows), default=None)
        first = {row["model"]: row for row in reversed(rows) if Fraction(row["budget"]) == most}
        sentences += [_sentence(task, row) for row in reversed(first.values())]
    return sentences


def curves(report: Mapping) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """Points {"value", "low", "high", "calls", "seconds"} of each model by (task, number), budgets ascending; report:
    content of `results.json`. Numbers without two budgets are left out."""
    by_number: dict = {}
    for row in sorted(report["results"], key=lambda row: Fraction(row["budget"])):
        for name, one in row["estimates"].items():
            if isinstance(one["value"], str) or not set(COSTS) <= set(row["cost"]):
                continue
            point = {key: one[key] for key in ("value", "low", "high")} | {key: row["cost"][key] for key in COSTS}
            by_number.setdefault((row["task"], name), {}).setdefault(row["model"], []).append(point)
    return {key: models for key, models in by_number.items() if any(len(points) > 1 for points in models.values())}


def _tasks(report: Mapping) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in report["results"]))


def _described(report: Mapping) -> list[str]:
    return [f"{name}: {one['path']} at step {one['step']:,}" for name, one in report["models"].items()]


def _sentence(task: str, row: Mapping) -> str:
    better, name = f", {row['better']} is better" if row["better"] else "", _words(row["name"])
    unit = f" {row['unit']}" if row["unit"] else ""
    if "baseline" not in row:
        return f"{row['model']}, {task}: {name} {tables.estimate(row)}{unit}{better}."
    if row["unit"] == "nats/token" and not isinstance(row["value"], str):
        nats = [row[key] for key in ("value", "low", "high")]
        return f"{row['model']}, {task}: {verdict.relative(nats, ' than ' + row['baseline'])}."
    if (favoured := tables.favoured(row)) == "neither":
        return (f"{task}: no measurable difference between {row['model']} and {row['baseline']} in {name}: "
                f"{tables.estimate(row)}{unit}.")  # fmt: skip
    other = row["baseline"] if favoured == row["model"] else row["model"]
    return (f"{task}: {favoured} is better than {other} in {name}: {row['model']} - {row['baseline']} = "
            f"{tables.estimate(row)}{unit}{better}.")  # fmt: skip


def _section(report: Mapping, task: str, drawn: Mapping) -> str:
    rows = [row for row in report["results"] if row["task"] == task]
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    listed = "".join(f"<li>{page.text(note)}</li>" for note in notes)
    charts = {
        cost: page.figures(*(
            _chart(task, name, models, cost, label, _details(rows, name))
            for (owner, name), models in drawn.items() if owner == task
        ))
        for cost, label in COSTS.items()
    }  # fmt: skip
    against = page.choice(f"{task} against", charts) if any(charts.values()) else ""
    return page.section(task, page.table(*tables.task_table(rows)), f"<ul>{listed}</ul>\n" if listed else "", against)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _details(rows: Sequence[Mapping], name: str) -> Mapping:
    return next(row["estimates"][name] for row in rows if name in row["estimates"])


def _chart(task: str, name: str, models: Mapping, cost: str, label: str, one: Mapping) -> str:
    """Quality of every model at every budget against a cost."""
    series = []
    for colour, (model, points) in enumerate(models.items()):
        points = sorted(points, key=lambda point: point[cost])
        columns = [[point[key] for point in points] for key in (cost, "value", "low", "high")]
        ends = columns[2:] if not any(None in column for column in columns[2:]) else (None, None)
        series.append(Series(model, *columns[:2], *ends, colour=colour))
    direction = f"{one['better'].capitalize()} is better. " if one["better"] else ""
    title = f"{task}: {_words(name)} against {cost}"
    return line_chart(title, series, x_label=label, y_label=one["unit"] or _words(name), named=True,
                      note=f"{direction}A point for each budget of steps; bars: 95 % intervals.")  # fmt: skip
