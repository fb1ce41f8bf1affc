"""Self-contained HTML report of one training run: figures, curves, samples, settings; it needs no network."""
import math
import os
from pathlib import Path

from softmask_jax.config import Config, flatten
from softmask_jax.io.files import write_atomically
from softmask_jax.io.run_log import RunLog, number as number_of, read
from softmask_jax.report import curves, page
from softmask_jax.report.chart_axes import number
from softmask_jax.report.charts import bar_chart, line_chart

FILE = "report.html"
# Texts beyond are cut or left out, so that the page can be mailed.
MOST_SAMPLES, MOST_CHARACTERS = 16, 8000


def write(folder: str | Path, out: str | Path | None = None, summary: dict | None = None) -> Path:
    """Write the page of the run in `folder`, by default into it; returns where it is.

    summary: what summary.json is about to say, if it isn't there yet.

    Raises:
      FileNotFoundError: the folder holds no run. OSError: the page cannot be written.
    """
    path = Path(os.path.expanduser(out)) if out else Path(os.path.expanduser(folder)) / FILE
    write_atomically(path, build(read(folder, summary)), elsewhere="give another --out")
    return path


def write_at_end(folder: Path, summary: dict) -> None:
    """`write`, of a run that is about to be finished: no mishap with the page may cost the run its summary."""
    try:
        write(folder, summary=summary)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"Warning: no {FILE} was written ({reason}); python -m softmask_jax.report {folder} tries again.",
            flush=True,
        )


def build(run: RunLog) -> str:
    """The page as HTML."""
    state = _state(run)
    return page.document(
        f"{run.name}: {state}",
        f"<header><h1>{page.text(run.name)}</h1>\n<p class=\"pale\">{page.text(_what(run))}</p>\n"
        f"<p><strong>{page.text(state)}</strong></p></header>\n",
        page.warnings([*run.notes, *_missing(run)]),
        page.cards(_headline(run)),
        page.section("Training and validation", page.figures(*_learning(run))),
        page.section("Soft-masking", page.figures(*_soft_masking(run))),
        page.section("Speed and step size", page.figures(*_machinery(run))),
        page.section("Samples", _samples(run)),
        page.section("Settings", _settings(run)),
        page.section("Data", _data(run)),
        page.section("Versions and device", _versions(run)),
    )


def _state(run: RunLog) -> str:
    if run.finished:
        return f"Finished: {run.step:,} steps"
    return f"Not finished: step {run.step:,}" + (f" of {run.planned:,}" if run.planned else "")


def _what(run: RunLog) -> str:
    """The run in a line, as far as its config tells."""
    setting, said = run.setting, ["softmask_jax run"]
    if run.config:
        variant = setting("soft_mask.variant")
        mask = {"none": "binary masks", "topk": f"soft masks, top {setting('soft_mask.k')}"}
        said.append(mask.get(str(variant), f"soft masks, {variant}"))
        if setting("model.kind") == "dream":
            adapter = "all of it trained" if setting("model.adapter") == "none" else f"{setting('model.adapter')} adapter"
            return ", ".join([*said, f"dream from {setting('model.base')}", adapter, f"chats of {setting('data.paths')}"])
        blocks, width, length = (setting(key) for key in ("model.num_blocks", "model.hidden_size", "data.seq_len"))
        said.append(f"{setting('model.kind')} of {blocks} blocks, {width} wide")
        said.append(f"{setting('data.source')} as {setting('data.tokenizer')}, {length} tokens a window")
    return ", ".join(said)


def _missing(run: RunLog) -> list[str]:
    said = []
    if "train" not in run.last and run.last:
        said.append("No training row is there yet.")
    if not run.last and not run.notes:
        said.append("metrics.jsonl is empty: nothing was logged yet.")
    if not _scores(run)[0]:
        said.append("The run has not been validated yet.")
    return said


def _scores(run: RunLog) -> tuple[dict, str]:
    """The newest validation that is most complete, and what it is; ({}, "") where there is none."""
    if run.summary and isinstance(run.summary.get("validation"), dict) and run.finished:
        return run.summary["validation"], "final validation"
    rows = [run.last[kind] for kind in ("final", "validation") if kind in run.last]
    if not rows:
        return {}, ""
    row = max(rows, key=lambda row: row["step"])
    return row, f"{'final validation' if row['kind'] == 'final' else 'validation'} at step {row['step']:,}"


def _interval(low: str, high: str) -> str:
    return "no interval" if "nan" in low + high else f"95 % interval {low} to {high}"


def _headline(run: RunLog) -> list[tuple[str, str, str]]:
    scores, of = _scores(run)
    found = {name: value for name, entry in scores.items() if (value := number_of(entry)) is not None}
    cards = []
    for estimate, name in curves.ESTIMATES.items():
        if f"{estimate}/nelbo" in found:
            nats, low, high = (found.get(f"{estimate}/{key}", math.nan) for key in ("nelbo", "nelbo_low", "nelbo_high"))
            cards.append((
                f"Perplexity, {name}", number(_exp(nats)),
                f"{_interval(number(_exp(low)), number(_exp(high)))}; {nats:.4f} nats per token ({of})",
            ))  # fmt: skip
    for key, name in (("", "by the recipe"), ("one_pass/", "one pass"), ("two_pass/", "two passes")):
        if f"{key}loss" in found:
            low, high = (found.get(f"{key}loss_{end}", math.nan) for end in ("low", "high"))
            interval = f"{_interval(f'{low:.4f}', f'{high:.4f}')} ({of})"
            cards.append((f"Validation loss, {name}", f"{found[f'{key}loss']:.4f}", interval))
    if "gain/nelbo" in found:
        low, high = (found.get(f"gain/{key}", math.nan) for key in ("low", "high"))
        interval = f"nats per token, {_interval(f'{low:+.4f}', f'{high:+.4f}')}, on the same masks"
        cards.append(("Gain of the second pass", f"{found['gain/nelbo']:+.4f}", interval))
    tokens = run.tokens(run.step)
    if tokens is not None:
        flops = run.flops([run.step])
        more = f"{run.step:,} steps" + (f", {flops[0]:.3g} training FLOPs" if flops is not None else "")
        cards.append(("Training tokens", f"{float(tokens):,.0f}", more))
    if speed := curves.throughput(run):
        head, _, tail = speed.partition(", ")
        cards.append(("Throughput", head.removeprefix("Median "), f"median; {tail}"))
    return cards


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 340 else math.inf if nats == nats else nats


def _learning(run: RunLog) -> list[str]:
    charts, nats = [], "nats per token"
    if len(run.column("train", "loss")[0]):
        loss = [
            curves.trained(run, "loss", "each row", faint=True, colour=0),
            curves.trained_smoothed(run, "loss", "running mean", colour=0),
        ]
        bound = "" if run.setting("model.kind") == "dream" else " (NELBO)"
        charts.append(line_chart(f"Training loss{bound}", loss, y_label=nats))
    scored = [curves.perplexity(run, key, name, colour=i) for i, (key, name) in enumerate(curves.ESTIMATES.items())]
    if any(len(one.x) for one in scored):
        note = "With 95 % intervals over the windows."
        charts.append(line_chart("Validation perplexity", scored, y_label="perplexity per token", note=note, log=True))
    if len((losses := curves.validation_loss(run, "by the recipe")).x):
        note = "With 95 % intervals over the examples."
        charts.append(line_chart("Validation loss", [losses], y_label="weighted nats per token", note=note))
    bins, values = curves.cross_entropy_by_t(run)
    if bins:
        title = f"Cross-entropy by t, training, step {run.last['train']['step']:,}"
        charts.append(bar_chart(title, [name.split("-")[0] for name in bins], values, x_label="t, from", y_label=nats))
    return charts


def _soft_masking(run: RunLog) -> list[str]:
    charts = []
    for name, title, label in (
        ("lambda_mean", "Mean lambda", "mean over fed-back masks"),
        ("top_k_hit_rate", "Top-k hit rate", "share of fed-back masks"),
    ):
        if len(run.column("train", name)[0]):
            series = [
                curves.trained(run, name, "each row", faint=True, colour=0),
                curves.trained_smoothed(run, name, "running mean", colour=0),
            ]
            charts.append(line_chart(title, series, y_label=label))
    for name, title in curves.scalars(run).items():
        charts.append(line_chart(title, [curves.trained(run, f"soft_mask/{name}", name)], y_label=name))
    bins, shares, step = curves.lambda_histogram(run)
    if bins:
        title = f"Histogram of lambda, step {step:,}"
        charts.append(bar_chart(title, bins, shares, x_label="lambda, from", y_label="share of fed-back masks"))
    return charts


def _machinery(run: RunLog) -> list[str]:
    charts = []
    rates = [
        curves.trained(run, key, name)
        for key, name in (("learning_rate", "network"), ("sm_learning_rate", "soft-masking scalars"))
    ]
    if any(len(one.x) for one in rates):
        charts.append(line_chart("Learning rate", rates, y_label="learning rate"))
    if len(run.column("train", "grad_norm")[0]):
        norm = [
            curves.trained(run, "grad_norm", "each row", faint=True, colour=0),
            curves.trained_smoothed(run, "grad_norm", "running mean", colour=0),
        ]
        charts.append(line_chart("Gradient norm, before clipping", norm, y_label="norm"))
    for name, title, label in (
        ("tokens_per_second", "Throughput", "tokens/s"),
        ("model_flops_share", "Share of peak FLOPs", "share"),
    ):
        if len(run.column("train", name)[0]):
            note = curves.throughput(run) if name == "tokens_per_second" else ""
            charts.append(line_chart(title, [curves.trained(run, name, label)], y_label=label, note=note))
    return charts


def _samples(run: RunLog) -> str:
    rows = [(row["step"], row.get("texts")) for row in run.samples]
    if not rows and run.summary:
        rows = [(run.summary["step"], run.summary.get("samples"))]
    rows = [(step, texts) for step, texts in rows if isinstance(texts, list) and texts]
    if not rows:
        return ""
    blocks = [f"<h3>Step {step:,}</h3>\n{_texts(texts)}" for step, texts in reversed(rows)]
    earlier = "".join(blocks[1:])
    return blocks[0] + (f"<details><summary>Earlier samples</summary>\n{earlier}</details>\n" if earlier else "")


def _texts(texts: list) -> str:
    shown = [str(text) for text in texts[:MOST_SAMPLES]]
    found = "".join(
        f"<pre>\n{page.text(text[:MOST_CHARACTERS])}{' ... (cut)' if len(text) > MOST_CHARACTERS else ''}</pre>\n"
        for text in shown
    )
    more = len(texts) - len(shown)
    return found + (f'<p class="pale">and {more:,} more in metrics.jsonl</p>\n' if more else "")


def _settings(run: RunLog) -> str:
    if not run.config:
        return ""
    ours, defaults = flatten(run.config), flatten(Config().to_dict())
    differ = [
        (name, _shown(value), _shown(defaults[name]) if name in defaults else "(not in this version)")
        for name, value in ours.items() if name not in defaults or value != defaults[name]
    ]  # fmt: skip
    rest = [(name, _shown(value)) for name, value in ours.items() if name in defaults and value == defaults[name]]
    head = "<p>What differs from the defaults of the schema:</p>\n" if differ else "<p>All as the schema has it.</p>\n"
    return (
        head + (page.table(("key", "value", "default"), differ) if differ else "")
        + f"<details><summary>The other {len(rest)} settings, as the schema has them</summary>\n"
        + page.table(("key", "value"), rest) + "</details>\n"
    )  # fmt: skip


def _data(run: RunLog) -> str:
    info = run.summary.get("data") if run.summary else None
    return page.table(("what", "value"), _facts(info)) if isinstance(info, dict) and info else ""


def _versions(run: RunLog) -> str:
    return page.table(("what", "version"), _facts(run.versions)) if run.versions else ""


def _facts(values: dict) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(value)) for name, value in flatten(values).items()]


def _shown(value) -> str:
    if isinstance(value, bool) or value is None or value == "":
        return {None: "(unknown)", "": '""'}.get(value, str(value))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
