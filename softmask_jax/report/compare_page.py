"""Page that compares runs: measurements, curves in common charts, config differences."""
from collections.abc import Mapping, Sequence

from softmask_jax.config import Config, flatten
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import curves, page
from softmask_jax.report.charts import Series, optional_chart

ABSENT = "(absent)"
# Keys without effect on results.
NAMES = ("train.compilation_cache", "train.wandb", "data.cache_dir")


def build(runs: Mapping[str, RunLog], measured: Sequence = ()) -> str:
    """The page as HTML. runs: by displayed name, baseline first. measured: lines of text and tables (header, rows)."""
    measurements = [page.table(*one) if isinstance(one, tuple) else f"<p>{page.text(one)}</p>\n" for one in measured]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    title = " / ".join(runs)
    subtitle = f"{len(runs)} runs: {', '.join(f'{name} at step {run.step:,}' for name, run in runs.items())}"
    losses, perplexities = {}, {}
    for colour, (name, run) in enumerate(runs.items()):
        losses[name] = curves.trained(run, "loss", name, mean=True, colour=colour)
        both = any(column.startswith("two_pass/") for _, column in run.columns)
        estimate, label = ("two_pass", f"{name}, two passes") if both else ("one_pass", name)
        perplexities[name] = curves.perplexity(run, estimate, label, colour=colour)
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<p class="pale">{page.text(subtitle)}</p></header>\n',
        page.warnings(notes),
        page.section("On the same masks", *measurements),
        _over("Training loss", runs, losses, "running mean, nats per token"),
        _over("Validation perplexity", runs, perplexities, "perplexity per token", log=True),
        page.section("Soft-masking", page.figures(*_soft_masking(runs))),
        page.section("Speed and step size", _speed(runs)),
        page.section("Differences of config", _differences(runs)),
    )


def _over(title: str, runs: Mapping[str, RunLog], drawn: Mapping[str, Series], y_label: str, log: bool = False) -> str:
    """Section of the same curves against steps, tokens and FLOPs, with a note naming runs that lack an axis."""
    charts = []
    for axis in (curves.STEPS, curves.TOKENS, curves.FLOPS):
        moved = {name: curves.against(run, drawn[name], axis) for name, run in runs.items()}
        unknown = ", ".join(name for name, series in moved.items() if series is None)
        charts.append(optional_chart(
            f"{title} by {axis.split()[-1]}", [series for series in moved.values() if series is not None], x_label=axis,
            y_label=y_label, note=f"Not known of {unknown}." if unknown else "", log=log,
        ))  # fmt: skip
    return page.section(title, page.figures(*charts))


def _common(runs: Mapping[str, RunLog], column: str, title: str, y_label: str, mean: bool = False) -> str:
    """One chart of a column (or its running mean) of all runs; "" if none has it."""
    series = [curves.trained(run, column, name, mean=mean, colour=i) for i, (name, run) in enumerate(runs.items())]
    return optional_chart(title, series, y_label=y_label)


def _soft_masking(runs: Mapping[str, RunLog]) -> list[str]:
    titles = {name: title for run in runs.values() for name, title in curves.scalars(run).items()}
    return [
        _common(runs, "lambda_mean", "Mean lambda", "running mean", mean=True),
        _common(runs, "top_k_hit_rate", "Top-k hit rate", "running mean", mean=True),
        *(_common(runs, f"soft_mask/{name}", title, name) for name, title in titles.items()),
    ]


def _speed(runs: Mapping[str, RunLog]) -> str:
    charts = page.figures(
        _common(runs, "tokens_per_second", "Throughput", "tokens/s"),
        _common(runs, "grad_norm", "Gradient norm, before clipping", "running mean", mean=True),
        _common(runs, "learning_rate", "Learning rate", "of the network"),
    )
    speeds = {name: speed for name, run in runs.items() if (speed := curves.throughput(run))}
    return charts + "".join(f'<p class="pale">{page.text(f"{name}: {speed}")}</p>\n' for name, speed in speeds.items())


def _differences(runs: Mapping[str, RunLog]) -> str:
    # Keys that older versions lack count as their defaults.
    defaults = flatten(Config().to_dict())
    configs = {name: defaults | flatten(run.config) for name, run in runs.items() if run.config}
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NAMES)
    rows = [(key, *(str(config.get(key, ABSENT)) or '""' for config in configs.values())) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return page.table(("key", *configs), rows) if rows else "<p>None.</p>\n"
