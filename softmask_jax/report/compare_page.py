"""Page that compares runs: measurements, curves in common charts, differences of config."""
from collections.abc import Mapping, Sequence

from softmask_jax.config import Config, flatten
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import curves, page
from softmask_jax.report.charts import Series, optional_chart

ABSENT = "(absent)"
# Keys that change nothing that is computed.
NAMES = ("train.compilation_cache", "train.wandb", "data.cache_dir")


def build(runs: Mapping[str, RunLog], measured: Sequence = ()) -> str:
    """The page as HTML.

    Args:
      runs: by the names they are shown under, the baseline first.
      measured: lines of text and tables (header, rows), in their order.
    """
    measurements = [page.table(*one) if isinstance(one, tuple) else f"<p>{page.text(one)}</p>\n" for one in measured]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    title = " / ".join(runs)
    subtitle = f"{len(runs)} runs: {', '.join(f'{name} at step {run.step:,}' for name, run in runs.items())}"
    loss = _over(runs, "Training loss", _loss, "running mean, nats per token")
    perplexity = _over(runs, "Validation perplexity", _perplexity, "perplexity per token", log=True)
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<p class="pale">{page.text(subtitle)}</p></header>\n',
        page.warnings(notes),
        page.section("On the same masks", *measurements),
        page.section("Training loss", page.figures(*loss)),
        page.section("Validation perplexity", page.figures(*perplexity)),
        page.section("Soft-masking", page.figures(*_soft_masking(runs))),
        page.section("Speed and step size", _speed(runs)),
        page.section("Differences of config", _differences(runs)),
    )


def _loss(name: str, run: RunLog, colour: int) -> Series:
    return curves.trained_smoothed(run, "loss", name, colour=colour)


def _perplexity(name: str, run: RunLog, colour: int) -> Series:
    best = curves.best_estimate(run)
    return curves.perplexity(run, best, f"{name}, two passes" if best == "two_pass" else name, colour=colour)


def _over(runs: Mapping[str, RunLog], title: str, make, y_label: str, log: bool = False) -> list[str]:
    """The same curves against steps, tokens and FLOPs; a note names the runs that do not log theirs."""
    charts = []
    for axis in (curves.STEPS, curves.TOKENS, curves.FLOPS):
        series, unknown = [], []
        for colour, (name, run) in enumerate(runs.items()):
            one = make(name, run, colour)
            moved = curves.against(run, one, axis) if len(one.x) else one
            (unknown if moved is None else series).append(name if moved is None else moved)
        note = f"Not known of {', '.join(unknown)}." if unknown else ""
        title_by = f"{title} by {axis.split()[-1]}"
        charts.append(optional_chart(title_by, series, x_label=axis, y_label=y_label, note=note, log=log))
    return charts


def _common(runs: Mapping[str, RunLog], column: str, title: str, y_label: str, draw=curves.trained_smoothed) -> str:
    """One chart of a column of all runs; "" where none has it."""
    series = [draw(run, column, name, colour=i) for i, (name, run) in enumerate(runs.items())]
    return optional_chart(title, series, y_label=y_label)


def _soft_masking(runs: Mapping[str, RunLog]) -> list[str]:
    titles = {name: title for run in runs.values() for name, title in curves.scalars(run).items()}
    return [
        _common(runs, "lambda_mean", "Mean lambda", "running mean"),
        _common(runs, "top_k_hit_rate", "Top-k hit rate", "running mean"),
        *(_common(runs, f"soft_mask/{name}", title, name, curves.trained) for name, title in titles.items()),
    ]


def _speed(runs: Mapping[str, RunLog]) -> str:
    charts = page.figures(
        _common(runs, "tokens_per_second", "Throughput", "tokens/s", curves.trained),
        _common(runs, "grad_norm", "Gradient norm, before clipping", "running mean"),
        _common(runs, "learning_rate", "Learning rate", "of the network", curves.trained),
    )
    speeds = {name: speed for name, run in runs.items() if (speed := curves.throughput(run))}
    return charts + "".join(f'<p class="pale">{page.text(f"{name}: {speed}")}</p>\n' for name, speed in speeds.items())


def _differences(runs: Mapping[str, RunLog]) -> str:
    # A key that an older version did not know had the effect of today's default.
    defaults = flatten(Config().to_dict())
    configs = {name: defaults | flatten(run.config) for name, run in runs.items() if run.config}
    keys = [key for key in dict.fromkeys(key for one in configs.values() for key in one) if key not in NAMES]
    rows = [
        (key, *values) for key in keys
        if len(set(values := [str(one.get(key, ABSENT)) or '""' for one in configs.values()])) > 1
    ]  # fmt: skip
    return page.table(("key", *configs), rows) if rows else "<p>None.</p>\n"
