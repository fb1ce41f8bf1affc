"""Self-contained HTML report of one training run: figures, curves, samples, settings; it needs no network."""
import math
from collections.abc import Callable
from pathlib import Path

from softmask_jax.config import Config, flatten
from softmask_jax.io.files import one_line, write_atomically
from softmask_jax.io.paths import to_path
from softmask_jax.io.run_log import RunLog, number as number_of, read
from softmask_jax.report import before_after, curves, page, spent_time, verdict
from softmask_jax.report.chart_axes import number
from softmask_jax.report.charts import bar_chart, line_chart, optional_chart
from softmask_jax.report.scored import taken_on

FILE, TRAJECTORY = "report.html", "trajectory.html"
# Limits that keep the page small enough to mail.
MOST_SAMPLES, MOST_CHARACTERS = 16, 8000


def write(folder: str | Path, out: str | Path | None = None, summary: dict | None = None) -> Path:
    """Write the page of the run in `folder`, by default into it; return its path.
    summary: if summary.json does not exist yet. FileNotFoundError without a run, OSError if writing fails."""
    path, trajectory = to_path(out or to_path(folder) / FILE), to_path(folder) / TRAJECTORY
    shown = trajectory.read_text("utf-8") if trajectory.is_file() else ""
    write_atomically(path, build(read(folder, summary), shown), elsewhere="give another --out")
    return path


def write_at_end(folder: Path, summary: dict) -> None:
    """Write the report of a finished run. A failed report only warns; summary.json is still written."""
    try:
        write(folder, summary=summary)
    except Exception as error:
        again = f"python -m softmask_jax.report {folder} tries again."
        print(f"Warning: no {FILE} was written ({one_line(error)}); {again}", flush=True)


def build(run: RunLog, trajectory: str = "") -> str:
    """The page as HTML; trajectory: a page of `viewer` to show inside it."""
    of = f" of {run.planned:,}" if run.planned else ""
    state = f"Finished: {run.step:,} steps" if run.finished else f"Not finished: step {run.step:,}{of}"
    return page.document(
        f"{run.name}: {state}",
        f"<header><h1>{page.text(run.name)}</h1>\n",
        page.verdict(*_verdict(run)),
        f'<p class="pale"><strong>{page.text(state)}</strong>. {page.text(_described(run))}.</p></header>\n',
        page.warnings([*run.notes, *_missing(run)]),
        page.cards(_headline(run)),
        page.section("Training and validation", page.figures(*_learning(run))),
        page.section("Before and after", before_after.of_run(run)),
        page.section("A text, step by step", trajectory and page.frame("A text, step by step", trajectory, 1200)),
        page.section("Soft-masking", _formula(run), page.figures(*_soft_masking(run))),
        page.section("Speed and step size", page.figures(*_speed_and_step_size(run))),
        page.section("Wall time", spent_time.of_run(run)),
        page.section("Samples", _samples(run)),
        page.section("Settings", _settings(run)),
        page.section("Data", _facts((run.summary or {}).get("data"), "value")),
        page.section("Versions and device", _facts(run.versions, "version")),
        framed=trajectory,
    )


def _verdict(run: RunLog) -> tuple[list[str], str]:
    """The first sentence of the page, and what it rests on."""
    row, source = _scores(run)
    sentence, basis = verdict.of_run(run, row)
    early = f"{source[0].upper()}{source[1:]}: " if sentence and not run.finished else ""
    return [early + sentence] if sentence else [], basis


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
        row = run.summary["validation"]
        return row, ", ".join(filter(None, ("final validation", taken_on(row))))
    rows = [run.last[kind] for kind in ("final", "validation") if kind in run.last]
    if not rows:
        return {}, ""
    row = max(rows, key=lambda row: row["step"])
    name = "final validation" if row["kind"] == "final" else "validation"
    return row, ", ".join(filter(None, (f"{name} at step {row['step']:,}", taken_on(row))))


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
    if run.account:
        cards.append(("Goodput", f"{run.account.goodput:.1%}", "of the wall time: training steps that count"))
    return cards


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 340 else math.inf if nats == nats else nats


def _learning(run: RunLog) -> list[str]:
    chat = run.setting("data.source") == "chat"
    scored = [curves.perplexity(run, key, name, colour=i) for i, (key, name) in enumerate(curves.ESTIMATES.items())]
    nats, by_t = "nats per token", ""
    if bins := curves.cross_entropy_by_t(run):
        title = f"Cross-entropy by t, training, step {run.last['train']['step']:,}"
        by_t = bar_chart(title, bins, x_label="t, from", y_label=nats,
                         note="t is the share of the text that is masked: the more, the harder is a token to tell.")
    basis = taken_on(run.last.get("validation", {}))
    basis = f"On {basis} at every step, the same ones with the same masks. " if basis else ""
    loss = "Weighted nats of responses" if chat else "Upper bound on the nats that a token costs"
    return [
        optional_chart(f"Training loss{'' if chat else ' (NELBO)'}", curves.trained_both(run, "loss"), y_label=nats,
                       note=f"{loss}; lower is better."),
        optional_chart("Validation perplexity", scored, y_label="perplexity per token", log=True, named=True,
                       note=f"{basis}Lower is better. Bars or bands: 95 % intervals over the windows."),
        optional_chart("Validation loss", [curves.validated(run, "loss", "by the recipe")], named=True,
                       y_label="weighted nats per token",
                       note=f"{basis}Lower is better. Bars or bands: 95 % intervals over the examples."),
        by_t,
    ]  # fmt: skip


def _formula(run: RunLog) -> str:
    """What the symbols of the charts below mean together; "" for a run without soft-masking."""
    if not run.soft_masked:
        return ""
    return (
        "<p>A mask enters the next pass as (1 − λ) of the mask’s own embedding and λ of the tokens predicted for it. "
        "λ = ω<sub>s</sub> · sigmoid(ω<sub>a</sub> (−H − ω<sub>b</sub>)), where H is the entropy of the prediction: "
        "the surer it is, the larger λ. The three ω are learned.</p>\n"
    )


def _soft_masking(run: RunLog) -> list[str]:
    k = run.setting("soft_mask.k")
    charts = [
        optional_chart("Mean lambda", curves.trained_both(run, "lambda_mean"), y_label="λ, mean over fed-back masks",
                       note="λ is the share of the predictions in a mask: 0 is a plain mask."),
        optional_chart("Top-k hit rate", curves.trained_both(run, "top_k_hit_rate"), y_label="share of fed-back masks",
                       note=f"How often the true token is among the {k} likeliest, those fed back. Higher is better."),
    ]  # fmt: skip
    for name, title in curves.scalars(run).items():
        charts.append(line_chart(title, [curves.trained(run, f"soft_mask/{name}", name)], y_label=name,
                                 note=curves.MEANINGS[name]))  # fmt: skip
    if bins := curves.lambda_histogram(run):
        title, share = f"Histogram of lambda, step {run.histogram['step']:,}", "share of fed-back masks"
        charts.append(bar_chart(title, bins, x_label="λ, from", y_label=share,
                                note="How many masks carry how much of a prediction."))  # fmt: skip
    return charts


def _speed_and_step_size(run: RunLog) -> list[str]:
    rates = {"learning_rate": "network", "sm_learning_rate": "soft-masking scalars"}
    tokens = curves.trained(run, "tokens_per_second", "tokens/s")
    return [
        optional_chart("Learning rate", [curves.trained(run, *one) for one in rates.items()], y_label="learning rate",
                       note="Size of the optimiser’s steps: warm-up first."),
        optional_chart("Gradient norm, before clipping", curves.trained_both(run, "grad_norm"), y_label="norm",
                       note="Length of the gradient; sudden peaks are a sign of an unstable run."),
        optional_chart("Throughput", [tokens], y_label="tokens/s", note=curves.throughput(run)),
        optional_chart("Share of peak FLOPs", [curves.trained(run, "model_flops_share", "share")], y_label="share",
                       note="Useful arithmetic over the most that the device could do. Higher is better."),
    ]  # fmt: skip


def _samples(run: RunLog) -> str:
    rows = [(row["step"], row.get("texts")) for row in run.samples]
    if not rows and run.summary:
        rows = [(run.summary["step"], run.summary.get("samples"))]
    rows = [(step, texts) for step, texts in reversed(rows) if isinstance(texts, list) and texts]
    newest, *earlier = [f"<h3>Step {step:,}</h3>\n{_texts(texts)}" for step, texts in rows] or [""]
    more = f"<details><summary>Earlier samples</summary>\n{''.join(earlier)}</details>\n" if earlier else ""
    return newest + more


def _texts(texts: list) -> str:
    blocks = "".join(page.block(str(text), MOST_CHARACTERS) for text in texts[:MOST_SAMPLES])
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
