"""Plots of quality against cost over several budgets of steps, as PNG and SVG."""
import io
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from softmask_jax.io.files import write_atomically

COSTS = {"calls": "network calls a text", "seconds": "seconds a text"}
SIZE, DPI = (9.0, 4.0), 150


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


def write(report: Mapping, folder: Path) -> list[Path]:
    """Draw each of `curves` into `folder`/<task>_<number>.png and .svg; the same points are the same bytes."""
    import matplotlib

    units = {(row["task"], name): one["unit"] for row in report["results"] for name, one in row["estimates"].items()}
    written = []
    for (task, name), models in curves(report).items():
        folder.mkdir(parents=True, exist_ok=True)
        unit = units[task, name]
        # Keep text as text; deterministic ids.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "softmask_jax"}):
            figure = draw(f"{task}: {name}", f"{name}, {unit}" if unit else name, models)
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                content, path = io.BytesIO(), folder / f"{task}_{name.replace('/', '_')}.{kind}"
                figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
                write_atomically(path, [content.getvalue()], elsewhere="give another --out")
                written.append(path)
    return written


def draw(title: str, label: str, models: Mapping[str, list[dict]]):
    """A `matplotlib.figure.Figure`: a panel for each of `COSTS`, a line with intervals for each model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(SIZE, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for panel, (cost, axis) in zip(panels, COSTS.items()):
        for model, points in models.items():
            x, y = ([point[key] for point in points] for key in (cost, "value"))
            spread = [
                [0.0 if point[end] is None else abs(point[end] - point["value"]) for point in points]
                for end in ("low", "high")
            ]
            panel.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2, label=model)
        panel.set_xscale("log", base=2)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
