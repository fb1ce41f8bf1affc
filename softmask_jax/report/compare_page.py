"""The page of several runs: what was measured of them, their curves in common charts, and how their configs differ."""
from collections.abc import Mapping, Sequence

from softmask_jax.config import Config, flatten
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import curves, page
from softmask_jax.report.charts import Series, line_chart

ABSENT = "(absent)"
# Everything else that differs changes what is computed.
NAMES = ("train.compilation_cache", "train.wandb", "data.cache_dir")


def build(runs: Mapping[str, RunLog], measured: Sequence = ()) -> str:
    """The page as HTML.

    Args:
      runs: by the names they are shown under, the baseline first.
      measured: lines of text and tables (header, rows), in their order.
    """
    said = [page.table(*one) if isinstance(one, tuple) else f"<p>{page.text(one)}</p>\n" for one in measured]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    title = " / ".join(runs)
    what = f"{len(runs)} runs: {', '.join(f'{name} at step {run.step:,}' for name, run in runs.items())}"
    loss = _over(runs, "Training loss", _loss, "running mean, nats per token")
    perplexity = _over(runs, "Validation perplexity", _perplexity, "perplexity per token", log=True)
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<p class="pale">{page.text(what)}</p></header>\n',
        page.warnings(notes),
        page.section("On the same masks", *said),
        page.section("Training loss", page.figures(*loss)),
        page.section("Validation perplexity", page.figures(*perplexity)),
        page.section("Soft-masking", page.figures(*_soft_masking(runs))),
        page.section("Speed and step size", _speed(runs)),
        page.section("Differences of config", _differences(runs)),
    )


def _loss(name: str, run: RunLog, colour: int) -> list[Series]:
    return [curves.trained_smoothed(run, "loss", name, colour=colour)]


def _perplexity(name: str, run: RunLog, colour: int) -> list[Series]:
    best = curves.best_estimate(run)
    return [curves.perplexity(run, best, f"{name}, two passes" if best == "two_pass" else name, colour=colour)]


def _over(runs: Mapping[str, RunLog], title: str, make, y_label: str, log: bool = False) -> list[str]:
    """The same curves against steps, tokens and FLOPs; a run that doesn't tell its FLOPs is named beside that chart."""
    charts = []
    for axis in (curves.STEPS, curves.TOKENS, curves.FLOPS):
        found, untold = [], []
        for colour, (name, run) in enumerate(runs.items()):
            for one in make(name, run, colour):
                moved = curves.against(run, one, axis) if len(one.x) else one
                (untold if moved is None else found).append(name if moved is None else moved)
        if any(len(one.x) for one in found):
            note = f"Not known of {', '.join(untold)}." if untold else ""
            charts.append(
                line_chart(f"{title} by {axis.split()[-1]}", found, x_label=axis, y_label=y_label, note=note, log=log)
            )
    return charts


def _common(runs: Mapping[str, RunLog], column: str, title: str, y_label: str, *, smooth: bool) -> list[str]:
    draw = curves.trained_smoothed if smooth else curves.trained
    found = [draw(run, column, name, colour=i) for i, (name, run) in enumerate(runs.items())]
    found = [one for one in found if len(one.x)]
    return [line_chart(title, found, y_label=y_label)] if found else []


def _soft_masking(runs: Mapping[str, RunLog]) -> list[str]:
    charts = _common(runs, "lambda_mean", "Mean lambda", "running mean", smooth=True)
    charts += _common(runs, "top_k_hit_rate", "Top-k hit rate", "running mean", smooth=True)
    titles = {name: title for run in runs.values() for name, title in curves.scalars(run).items()}
    for name, title in titles.items():
        charts += _common(runs, f"soft_mask/{name}", title, name, smooth=False)
    return charts


def _speed(runs: Mapping[str, RunLog]) -> str:
    speeds = {name: said for name, run in runs.items() if (said := curves.throughput(run))}
    charts = _common(runs, "tokens_per_second", "Throughput", "tokens/s", smooth=False)
    charts += _common(runs, "grad_norm", "Gradient norm, before clipping", "running mean", smooth=True)
    charts += _common(runs, "learning_rate", "Learning rate", "of the network", smooth=False)
    lines = (f'<p class="pale">{page.text(f"{name}: {said}")}</p>\n' for name, said in speeds.items())
    return page.figures(*charts) + "".join(lines)


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
