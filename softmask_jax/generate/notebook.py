"""For notebooks: commands in the kernel's process, pages in the output, live curves of a run, answers side by side.

    from softmask_jax.generate import notebook
    with notebook.watch("runs/stdlib"):
        notebook.run("main", "--config=configs/stdlib.py", "--workdir=runs/stdlib")
    notebook.read_page("runs/stdlib/report.html")"""
import contextlib
import dataclasses
import functools
import gc
import importlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from softmask_jax.config import progress
from softmask_jax.data.prompts import Row
from softmask_jax.generate.batches import Generator, plan, shape_of
from softmask_jax.generate.model import Model
from softmask_jax.io import run_log
from softmask_jax.io.answers import summarize
from softmask_jax.io.paths import to_path
from softmask_jax.report import curves, page
from softmask_jax.report.charts import Series, line_chart
from softmask_jax.report.patterns import Encoder
from softmask_jax.samplers import Options
from softmask_jax.samplers.dream_generate import soft_mask_from


def run(command: str, *words: str) -> None:
    """`python -m softmask_jax.COMMAND WORDS` in this process, which keeps the TPU. RuntimeError if it fails."""
    module = importlib.import_module(f"softmask_jax.{command}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"softmask_jax.{command}.__main__")
    try:
        status = module.main(list(words))
    except SystemExit as end:
        status = end.code
    finally:
        # Free the accelerator's memory that reference cycles hold.
        gc.collect()
    if status:
        raise RuntimeError(f"python -m softmask_jax.{command} ended with status {status}; its message is above.")


def remove(folder: str | os.PathLike, mark: str) -> None:
    """Remove a folder if it holds the file `mark`, as one that an earlier run of the same cell wrote."""
    folder = Path(folder)
    if (folder / mark).is_file():
        # Renamed first: a kill leaves no partial folder under its name.
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)


def memory_gib() -> float:
    """Memory of the first accelerator, or else of the machine, in GiB."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30


@dataclasses.dataclass(frozen=True)
class Page:
    """A self-contained HTML page, shown in a notebook as a sandboxed frame; height in pixels."""

    source: str
    height: int = 640

    def _repr_html_(self) -> str:
        return page.frame("A page", self.source, self.height)

    def __repr__(self) -> str:
        return f"<a page of {len(self.source):,} characters>"


def read_page(path: str | os.PathLike, height: int = 640) -> Page:
    """A page that a command wrote: report, trajectory or comparison. OSError if there is none."""
    return Page(to_path(path).read_text("utf-8"), height)


def curves_page(workdir: str | os.PathLike, height: int = 400) -> Page:
    """Losses, validation and mean lambda of a run so far; an empty page before its first row."""
    try:
        log = run_log.read(workdir)
    except FileNotFoundError:
        return Page(page.document("Curves", "<p>Starting ...</p>"), height)
    charts, state = [], f"Step {log.step:,}" + (f" of {log.planned:,}" if log.planned else "")
    for name, title, label in (("loss", "Training loss", "nats"), ("lambda_mean", "Mean \u03bb", "\u03bb")):
        if len(log.column("train", name)[0]):
            charts.append(line_chart(title, curves.trained_both(log, name), y_label=label))
    scored = {
        "Validation perplexity": [curves.perplexity(log, key, name) for key, name in curves.ESTIMATES.items()],
        "Validation loss": [curves.validated(log, "loss", "by the recipe")],
    }
    for title, series in scored.items():
        if any(len(one.x) for one in series):
            charts.insert(1, line_chart(title, [Series(one.name, one.x, one.y) for one in series]))
    style = ".charts { grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }"
    return Page(page.document("Curves", f"<p>{state}</p>\n", page.figures(*charts), style=style), height)


@contextlib.contextmanager
def watch(workdir: str | os.PathLike, every: float = 10.0) -> Iterator[None]:
    """Show the curves of the run that trains in the `with` block, redrawn every so many seconds and at its end."""
    from IPython.display import display

    shown, over = display(curves_page(workdir), display_id=True), threading.Event()

    def follow():
        while not over.wait(every):
            shown.update(curves_page(workdir))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        with progress.silent():
            yield
    finally:
        over.set()
        follower.join()
        shown.update(curves_page(workdir))


def soft_masked(model: Model, config: Mapping) -> Model:
    """The model with the soft-masking of `transparency_config.json`. ValueError for missing or unknown entries."""
    settings, scalars = soft_mask_from(config)
    params = model.params if scalars is None else model.params | {"soft_mask": scalars}
    return dataclasses.replace(model, soft_mask=settings, params=params)


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """A table of answers by name of the options: a row of `Generator.batch` for each prompt."""

    prompts: tuple[str, ...]
    answers: dict[str, list[dict]]
    height: int = 640

    @functools.cached_property
    def page(self) -> Page:
        return Page(page.document("Side by side", self._table(), style="td pre { min-width: 12rem; }"), self.height)

    def _repr_html_(self) -> str:
        return self.page._repr_html_()

    def _table(self) -> str:
        columns, body = self.answers.values(), ""
        heads = (f"{page.text(name)}<br>{_cost(rows)}" for name, rows in self.answers.items())
        head = "".join(f'<th scope="col">{text}</th>' for text in heads)
        for i, prompt in enumerate(self.prompts):
            cells = "".join(f"<td><pre>\n{page.text(rows[i]['text'])}</pre></td>" for rows in columns)
            body += f'<tr><th colspan="{len(columns)}">{page.text(prompt)}</th></tr>\n<tr>{cells}</tr>\n'
        return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _cost(rows: Sequence[Mapping]) -> str:
    total = summarize(rows)
    calls = f"{total['calls']:.1f} calls, {total['tokens_per_call']:.2f} tokens a call"
    return f'<span class="pale">{calls}, {total["seconds"] / len(rows):.2f} s an answer</span>'


def side_by_side(model, prompts: Sequence[str], ways: Mapping[str, Options], *, max_new_tokens: int | None = None,
                 seed: int = 0) -> SideBySide:  # fmt: skip
    """Answer each prompt with each of the options `ways`, all run twice, so that times are without compilation.

    A model that chats takes prompts as a user's messages, another continues them. max_new_tokens: what fits by default.
    ValueError for prompts that are too long, invalid options, or nothing to do."""
    if not prompts or not ways:
        raise ValueError("side_by_side needs a prompt and a way to answer it at least.")
    rows, patterns, shapes = _encoded(model, prompts, max_new_tokens)
    batches, answers = plan(shapes, samples=1, batch_size=len(prompts)), {}
    for name, options in ways.items():
        generator = Generator(model, options, seed)
        for _ in range(2):
            made = [row for batch in batches for row in generator.batch(batch, rows, patterns)]
        answers[name] = sorted(made, key=lambda row: row["index"])
    return SideBySide(tuple(prompts), answers)


def trajectory(model, prompt: str, options: Options, *, max_new_tokens: int | None = None, seed: int = 0,
               height: int = 900) -> Page:  # fmt: skip
    """Page of the denoising of a prompt's answer, see `viewer.trajectory_page`; arguments as of `side_by_side`."""
    _, (pattern,), (shape,) = _encoded(model, [prompt], max_new_tokens)
    return Page(Generator(model, options, seed).trajectory(pattern, shape), height)


def _encoded(model, prompts: Sequence[str], max_new_tokens: int | None):
    """Rows, patterns and shapes of the prompts."""
    chats = model.template is not None
    encode = Encoder(model, model.max_length, max_new_tokens, chat=chats, bos=not chats)
    rows = [Row(f"prompt {i + 1}", "prompt", prompt) for i, prompt in enumerate(prompts)]
    patterns = [encode(row) for row in rows]
    return rows, patterns, [shape_of(pattern, model, model.max_length) for pattern in patterns]
