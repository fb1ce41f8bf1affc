"""Self-contained HTML report of one training run: figures, curves, samples, settings; it needs no network."""
import math
import os
from collections.abc import Callable
from pathlib import Path

from softmask_jax.config import Config, flatten
from softmask_jax.io.files import one_line, write_atomically
from softmask_jax.io.run_log import RunLog, number as number_of, read
from softmask_jax.report import curves, page
from softmask_jax.report.chart_axes import number
from softmask_jax.report.charts import bar_chart, line_chart, optional_chart

FILE = "report.html"
# Limits that keep the page small enough to mail.
MOST_SAMPLES, MOST_CHARACTERS = 16, 8000


def write(folder: str | Path, out: str | Path | None = None, summary: dict | None = None) -> Path:
    """Write the page of the run in `folder`, by default into it; return its path.
    summary: if summary.json does not exist yet. FileNotFoundError without a run, OSError if writing fails."""
    path = Path(os.path.expanduser(out or Path(folder, FILE)))
    write_atomically(path, build(read(folder, summary)), elsewhere="give another --out")
    return path


def write_at_end(folder: Path, summary: dict) -> None:
    """Write the report of a finished run. A failed report only warns; summary.json is still written."""
    try:
        write(folder, summary=summary)
    except Exception as error:
        again = f"python -m softmask_jax.report {folder} tries again."
        print(f"Warning: no {FILE} was written ({one_line(error)}); {again}", flush=True)


def build(run: RunLog) -> str:
    """The page as HTML."""
    of = f" of {run.planned:,}" if run.planned else ""
    state = f"Finished: {run.step:,} steps" if run.finished else f"Not finished: step {run.step:,}{of}"
    return page.document(
        f"{run.name}: {state}",
        f"<header><h1>{page.text(run.name)}</h1>\n<p class=\"pale\">{page.text(_described(run))}</p>\n"
        f"<p><strong>{page.text(state)}</strong></p></header>\n",
        page.warnings([*run.notes, *_missing(run)]),
        page.cards(_headline(run)),
        page.section("Training and validation", page.figures(*_learning(run))),
        page.section("Soft-masking", page.figures(*_soft_masking(run))),
        page.section("Speed and step size", page.figures(*_speed_and_step_size(run))),
        page.section("Samples", _samples(run)),
        page.section("Settings", _settings(run)),
        page.section("Data", _facts((run.summary or {}).get("data"), "value")),
        page.section("Versions and device", _facts(run.versions, "version")),
    )


def _described(run: RunLog) -> str:
    """One line about the run, from its config."""
    if not run.config:
        return "softmask_jax run"
    setting, variant = run.setting, str(run.setting("soft_mask.variant"))
    masks = {"none": "binary masks", "topk": f"soft masks, top {setting('soft_mask.k')}"}
    if setting("data.source") == "chat":
        adapter = "all of it trained" if setting("model.adapter") == "none" else f"{setting('model.adapter')} adapter"
        network, texts = f"from {setting('model.base')}, {adapter}", f"chats of {setting('data.paths')}"
    else:
        network = f"of {setting('model.num_blocks')} blocks, {setting('model.hidden_size')} wide"
        texts = f"{setting('data.source')} as {setting('data.tokenizer')}, {setting('data.seq_len')} tokens a window"
    masks = masks.get(variant, f"soft masks, {variant}")
    return f"softmask_jax run, {masks}, {setting('model.kind')} {network}, {texts}"


def _missing(run: RunLog) -> list[str]:
    lines = {
        "No training row is there yet.": "train" not in run.last and run.last,
        "metrics.jsonl is empty: nothing was logged yet.": not run.last and not run.notes,
        "The run has not been validated yet.": not _scores(run)[0],
    }
    return [line for line, missing in lines.items() if missing]


def _scores(run: RunLog) -> tuple[dict, str]:
    """Newest validation scores and their name; ({}, "") if there are none."""
    if run.finished and isinstance(run.summary.get("validation"), dict):
        return run.summary["validation"], "final validation"
    rows = [run.last[kind] for kind in ("final", "validation") if kind in run.last]
    if not rows:
        return {}, ""
    row = max(rows, key=lambda row: row["step"])
    return row, f"{'final validation' if row['kind'] == 'final' else 'validation'} at step {row['step']:,}"


def _headline(run: RunLog) -> list[tuple[str, str, str]]:
    """Cards (title, value, explanation): newest scores, cost, speed."""
    entries, source = _scores(run)
    scores = {name: value for name, entry in entries.items() if (value := number_of(entry)) is not None}

    def estimate(key: str, low_key: str, high_key: str, show: Callable[[float], str]) -> tuple[str, str]:
        value, low, high = (show(scores.get(name, math.nan)) for name in (key, low_key, high_key))
        return value, "no interval" if "nan" in low + high else f"95 % interval {low} to {high}"

    cards = []
    for key, name in curves.ESTIMATES.items():
        if (nelbo := f"{key}/nelbo") in scores:
            value, interval = estimate(nelbo, f"{nelbo}_low", f"{nelbo}_high", lambda nats: number(_exp(nats)))
            cards.append((f"Perplexity, {name}", value, f"{interval}; {scores[nelbo]:.4f} nats per token ({source})"))
    for prefix, name in (("", "by the recipe"), *((f"{key}/", name) for key, name in curves.ESTIMATES.items())):
        if (loss := f"{prefix}loss") in scores:
            value, interval = estimate(loss, f"{loss}_low", f"{loss}_high", "{:.4f}".format)
            cards.append((f"Validation loss, {name}", value, f"{interval} ({source})"))
    if "gain/nelbo" in scores:
        gain, interval = estimate("gain/nelbo", "gain/low", "gain/high", "{:+.4f}".format)
        cards.append(("Gain of the second pass", gain, f"nats per token, {interval}, on the same masks"))
    if (tokens := run.tokens(run.step)) is not None:
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
    bound = "" if run.setting("data.source") == "chat" else " (NELBO)"
    scored = [curves.perplexity(run, key, name, colour=i) for i, (key, name) in enumerate(curves.ESTIMATES.items())]
    nats, by_t = "nats per token", ""
    if bins := curves.cross_entropy_by_t(run):
        title = f"Cross-entropy by t, training, step {run.last['train']['step']:,}"
        by_t = bar_chart(title, bins, x_label="t, from", y_label=nats)
    return [
        optional_chart(f"Training loss{bound}", curves.trained_both(run, "loss"), y_label=nats),
        optional_chart("Validation perplexity", scored, y_label="perplexity per token",
                       note="With 95 % intervals over the windows.", log=True),
        optional_chart("Validation loss", [curves.validated(run, "loss", "by the recipe")],
                       y_label="weighted nats per token", note="With 95 % intervals over the examples."),
        by_t,
    ]  # fmt: skip


def _soft_masking(run: RunLog) -> list[str]:
    charts = [
        optional_chart("Mean lambda", curves.trained_both(run, "lambda_mean"), y_label="mean over fed-back masks"),
        optional_chart("Top-k hit rate", curves.trained_both(run, "top_k_hit_rate"), y_label="share of fed-back masks"),
    ]
    for name, title in curves.scalars(run).items():
        charts.append(line_chart(title, [curves.trained(run, f"soft_mask/{name}", name)], y_label=name))
    if bins := curves.lambda_histogram(run):
        title, share = f"Histogram of lambda, step {run.histogram['step']:,}", "share of fed-back masks"
        charts.append(bar_chart(title, bins, x_label="lambda, from", y_label=share))
    return charts


def _speed_and_step_size(run: RunLog) -> list[str]:
    rates = {"learning_rate": "network", "sm_learning_rate": "soft-masking scalars"}
    tokens = curves.trained(run, "tokens_per_second", "tokens/s")
    return [
        optional_chart("Learning rate", [curves.trained(run, *one) for one in rates.items()], y_label="learning rate"),
        optional_chart("Gradient norm, before clipping", curves.trained_both(run, "grad_norm"), y_label="norm"),
        optional_chart("Throughput", [tokens], y_label="tokens/s", note=curves.throughput(run)),
        optional_chart("Share of peak FLOPs", [curves.trained(run, "model_flops_share", "share")], y_label="share"),
    ]


def _samples(run: RunLog) -> str:
    rows = [(row["step"], row.get("texts")) for row in run.samples]
    if not rows and run.summary:
        rows = [(run.summary["step"], run.summary.get("samples"))]
    rows = [(step, texts) for step, texts in reversed(rows) if isinstance(texts, list) and texts]
    newest, *earlier = [f"<h3>Step {step:,}</h3>\n{_texts(texts)}" for step, texts in rows] or [""]
    more = f"<details><summary>Earlier samples</summary>\n{''.join(earlier)}</details>\n" if earlier else ""
    return newest + more


def _texts(texts: list) -> str:
    blocks = "".join(
        f"<pre>\n{page.text(text[:MOST_CHARACTERS])}{' ... (cut)' if len(text) > MOST_CHARACTERS else ''}</pre>\n"
        for text in map(str, texts[:MOST_SAMPLES])
    )
    more = len(texts) - MOST_SAMPLES
    return blocks + (f'<p class="pale">and {more:,} more in metrics.jsonl</p>\n' if more > 0 else "")


def _settings(run: RunLog) -> str:
    if not run.config:
        return ""
    defaults, values = flatten(Config().to_dict()), flatten(run.config)
    rest = {name: _shown(value) for name, value in values.items() if name in defaults and value == defaults[name]}
    changed = [
        (name, _shown(value), _shown(defaults[name]) if name in defaults else "(not in this version)")
        for name, value in values.items() if name not in rest
    ]  # fmt: skip
    table = page.table(("key", "value", "default"), changed)
    differing = f"<p>What differs from the defaults of the schema:</p>\n{table}"
    head = differing if changed else "<p>All as the schema has it.</p>\n"
    summary = f"<summary>The other {len(rest)} settings, as the schema has them</summary>"
    return f"{head}<details>{summary}\n{page.table(('key', 'value'), list(rest.items()))}</details>\n"


def _facts(values, header: str) -> str:
    """Table of a dict; "" for anything else."""
    if not isinstance(values, dict) or not values:
        return ""
    rows = [(name.replace("_", " "), _shown(value)) for name, value in flatten(values).items()]
    return page.table(("what", header), rows)


def _shown(value) -> str:
    if isinstance(value, bool) or value is None or value == "":
        return {None: "(unknown)", "": '""'}.get(value, str(value))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
