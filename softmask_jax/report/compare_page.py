"""Page that compares runs: measurements, curves in common charts, config differences."""
from collections.abc import Mapping, Sequence

from softmask_jax.config import Config, flatten
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import curves, page, spent_time
from softmask_jax.report.charts import Series, line_chart
from softmask_jax.report.scored import taken_on
from softmask_jax.report.verdict import BRACKETS

ABSENT = "(absent)"
# Keys without effect on results.
NAMES = ("train.compilation_cache", "train.wandb", "data.cache_dir")


def build(runs: Mapping[str, RunLog], measured: Sequence = (), verdicts: Sequence[str] = ()) -> str:
    """The page as HTML. runs: by displayed name, baseline first. measured: lines of text and tables (header, rows).
    verdicts: sentences on the paired differences, the first thing that the page says."""
    measurements = [page.table(*one) if isinstance(one, tuple) else f"<p>{page.text(one)}</p>\n" for one in measured]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    title = " / ".join(runs)
    subtitle = f"{len(runs)} runs: {', '.join(f'{name} at step {run.step:,}' for name, run in runs.items())}"
    basis = f"{BRACKETS} over windows, each compared with itself." if verdicts else ""
    if not verdicts:
        verdicts = ["Not measured on the same masks: these are the curves alone."]
    return page.document(
        title,
        f"<header><h1>{page.text(title)}</h1>\n",
        page.verdict(verdicts, basis),
        f'<p class="pale">{page.text(subtitle)}</p></header>\n',
        page.warnings(notes),
        page.section("On the same masks", *measurements),
        page.section("Training and validation", _learning(runs)),
        page.section("Soft-masking", page.figures(*_soft_masking(runs))),
        page.section("Speed and step size", _speed(runs)),
        page.section("Wall time", spent_time.of_runs(runs)),
        page.section("Differences of config", _differences(runs)),
    )


def _learning(runs: Mapping[str, RunLog]) -> str:
    """Losses and perplexities, against one of the axes that the reader chooses."""
    losses, perplexities = {}, {}
    for colour, (name, run) in enumerate(runs.items()):
        losses[name] = curves.trained(run, "loss", name, mean=True, colour=colour)
        both = any(column.startswith("two_pass/") for _, column in run.columns)
        estimate, label = ("two_pass", f"{name}, two passes") if both else ("one_pass", name)
        perplexities[name] = curves.perplexity(run, estimate, label, colour=colour)
    taken = {name: taken_on(row) for name, run in runs.items() if (row := run.last.get("validation"))}
    basis = "; ".join(f"{name}: {words}" for name, words in taken.items() if words)
    if len(set(taken.values())) == 1:
        basis = next(iter(taken.values()))
    scored = f"{f'On {basis}. ' if basis else ''}Lower is better. Bars or bands: 95 % intervals."
    options = {}
    for axis in (curves.STEPS, curves.TOKENS, curves.FLOPS):
        name = axis.split()[-1]
        loss = _against(f"Training loss by {name}", runs, losses, axis, y_label="nats per token",
                        note="Running mean; lower is better.")  # fmt: skip
        score = _against(f"Validation perplexity by {name}", runs, perplexities, axis, y_label="perplexity per token",
                         note=scored, log=True)  # fmt: skip
        if drawn := page.figures(loss, score):
            options["steps" if axis == curves.STEPS else name] = drawn
    return page.choice("Against", options) if options else ""


def _against(title: str, runs: Mapping[str, RunLog], drawn: Mapping[str, Series], axis: str, **options) -> str:
    """A chart of the curves against an axis; its note names the runs that lack the axis or any value."""
    moved = {name: curves.against(run, drawn[name], axis) for name, run in runs.items()}
    return _named(title, moved, x_label=axis, **options)


def _named(title: str, drawn: Mapping[str, Series | None], *, note: str, **options) -> str:
    """A chart that names every run: in its legend, or in its note where it has nothing to draw; "" if none has."""
    shown = [one for one in drawn.values() if one is not None and len(one.x)]
    absent = [name for name, one in drawn.items() if one is None or not len(one.x)]
    more = f" No values: {', '.join(absent)}." if absent else ""
    return line_chart(title, shown, note=note + more, named=True, **options) if shown else ""


def _common(runs: Mapping[str, RunLog], column: str, title: str, y_label: str, note: str, mean: bool = False) -> str:
    """One chart of a column (or its running mean) of all runs; "" if none has it."""
    drawn = {name: curves.trained(run, column, name, mean=mean, colour=i) for i, (name, run) in enumerate(runs.items())}
    return _named(title, drawn, y_label=y_label, note=note)


def _soft_masking(runs: Mapping[str, RunLog]) -> list[str]:
    titles = {name: title for run in runs.values() for name, title in curves.scalars(run).items()}
    return [
        _common(runs, "lambda_mean", "Mean lambda", "running mean of λ",
                "λ is the share of the predictions in a mask: 0 is a plain mask.", mean=True),
        _common(runs, "top_k_hit_rate", "Top-k hit rate", "running mean",
                "How often the true token is among those fed back. Higher is better.", mean=True),
        *(_common(runs, f"soft_mask/{name}", title, name, curves.MEANINGS[name]) for name, title in titles.items()),
    ]  # fmt: skip


def _speed(runs: Mapping[str, RunLog]) -> str:
    charts = page.figures(
        _common(runs, "tokens_per_second", "Throughput", "tokens/s", "Training tokens a second. Higher is better."),
        _common(runs, "grad_norm", "Gradient norm, before clipping", "running mean", "Length of the gradient.",
                mean=True),
        _common(runs, "learning_rate", "Learning rate", "of the network", "Size of the optimiser’s steps."),
    )  # fmt: skip
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
