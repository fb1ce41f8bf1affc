"""The study on one page: verdicts, plots, tables, versions."""
from collections.abc import Mapping, Sequence

from softmask_jax.report import page
from softmask_jax.report.charts import Series, line_chart
from softmask_jax.reproduce.study import BASE, BINARY, SOFT
from softmask_jax.reproduce.verdicts import headlines, shown, WORDS

NOTE = (
    "Intervals are of 95 %. Those over seeds are by Student's t from the seeds' values; those over windows, samples "
    "and puzzles say nothing of another training seed. A recipe with one seed has the latter alone. Samples in few "
    "steps can lower their surprise by repeating themselves: read it with the entropy. A step of a sampler without "
    "feedback that changes no token needs no network call: compare samples by calls, too."
)


def build(report: Mapping) -> str:
    """The page as HTML; report: of `tables.report`."""
    seeds = ", ".join(map(str, report["seeds"]))
    return page.document(
        "Soft-masking, reproduced small",
        "<header><h1>Soft-masking, reproduced small</h1>\n",
        page.verdict(headlines(report), NOTE),
        f'<p class="pale">Masked diffusion models of sudoku puzzles and of Python text; seeds {page.text(seeds)}.</p>'
        "</header>\n",
        page.section("Puzzles: answers in few steps", page.figures(*_charts(report["answers"], ("right",))),
                     _decoded_table(report["answers"]), _clues_table(report["answers"])),
        page.section("Text: samples in few steps",
                     page.figures(*_charts(report["samples"], ("nats", "parses", "entropy"))),
                     f"<p>{page.text(_real(report))}</p>\n", _decoded_table(report["samples"])),
        page.section("Text: NELBO after continued training", _nelbo_table(report)),
        page.section("Every comparison",
                     "<ul>", *(f"<li>{page.text(one)}</li>" for one in report["verdicts"]), "</ul>\n"),
        page.section("Training", _training_table(report)),
        page.section("Sizes", page.table(("setting", "value"), list(report["sizes"].items()))),
        page.section("Versions and machine", *(page.table(("what", "version"), list(one.items()))
                                               for one in report["versions"])),
    )  # fmt: skip


def _nelbo_table(report: Mapping) -> str:
    header = ("recipe", "seeds", "updates", "FLOPs / binary", "NELBO (windows)", "less binary (seeds)",
              "less binary (windows)", "two passes less one (windows)")  # fmt: skip
    rows = [
        (row["title"], row["seeds"], f"{row['updates']:,}", f"{row['flops_ratio']:.3f}", shown(row["value"]),
         *("" if row["recipe"] == BINARY else shown(row["difference"][over], form="+.4f")
           for over in ("over_seeds", "over_windows")),
         shown(row["second_pass"]["over_windows"], form="+.4f") if "second_pass" in row else "")
        for row in report["nelbo"]
    ]  # fmt: skip
    return page.table(header, rows)


def named(row: Mapping) -> str:
    """Of a model and its way of decoding."""
    if row["recipe"] in (BASE.name, BINARY):
        return row["title"]
    return f"{row['title']}, feedback {'on' if row['feedback'] else 'off'}"


def _charts(rows: Sequence[Mapping], numbers: Sequence[str]) -> list[str]:
    charts = []
    for number in numbers:
        curves, (words, unit, factor) = {}, WORDS[number]
        for row in sorted(rows, key=lambda row: row["calls"]):
            if row["recipe"] in (BINARY, SOFT):
                curves.setdefault(named(row), []).append((row["calls"], *_ends(row[number], factor)))
        series = [Series(name, *zip(*points)) for name, points in sorted(curves.items())]
        unit = "%" if unit == "points" else unit
        charts.append(line_chart(f"{words[0].upper()}{words[1:]}", series, x_label="network calls", y_label=unit))
    return charts


def _ends(estimate: Mapping, factor: float) -> tuple[float, float, float]:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return factor * value, factor * (value if low is None else low), factor * (value if high is None else high)


def _decoded_table(rows: Sequence[Mapping]) -> str:
    numbers = [name for name in WORDS if rows and name in rows[0]]
    header = ("model", "steps", "network calls", "seeds", *(WORDS[name][0] for name in numbers))
    return page.table(header, [
        (named(row), row["steps"], f"{row['calls']:.1f}", row["seeds"],
         *(shown(row[name], WORDS[name][2], ".3f" if WORDS[name][2] == 1 else ".1f") for name in numbers))
        for row in rows
    ])  # fmt: skip


def _clues_table(rows: Sequence[Mapping]) -> str:
    """Puzzles solved by their number of clues."""
    header = ("model", "steps", *("{} to {} clues, %".format(*one["clues"]) for one in rows[0]["by_clues"]))
    return page.table(header, [
        (named(row), row["steps"], *(shown(one["right"], 100.0, ".1f") for one in row["by_clues"])) for row in rows
    ])  # fmt: skip


def _real(report: Mapping) -> str:
    parts = [f"{WORDS[name][0]}: {shown(one, WORDS[name][2], '.3f')}" for name, one in report["real_text"].items()]
    return f"Of real validation text ({'; '.join(parts)})."


def _training_table(report: Mapping) -> str:
    keys = list(dict.fromkeys(key for row in report["training"] for key in row))
    rows = [[_cell(row.get(key, "")) for key in keys] for row in report["training"]]
    return page.table(keys, rows)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
