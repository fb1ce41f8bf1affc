"""The report of a run: everything on one page that loads nothing, of whole runs, young ones and damaged ones."""
import html.parser
import json
import re
import subprocess
import sys
from unittest import mock

import pytest

from softmask_jax import config
from softmask_jax.evaluate import compare
from softmask_jax.io import goodput, run_log
from softmask_jax.io.files import plain, write_json
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.report import page, run_page
from softmask_jax.report.__main__ import main
from softmask_jax.training import loop
from tests.helpers import crafted_run

VOID = {"meta", "input", "br", "img"}


class Tree(html.parser.HTMLParser):
    """Elements, their attributes and text; every tag must be closed where it belongs."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def made(path) -> tuple[str, Tree]:
    source = run_page.write(path).read_text(encoding="utf-8")
    return source, Tree(source)


def titles(tree: Tree) -> list[str]:
    return tree.all("figcaption")


SOFT = ["Mean lambda", "Top-k hit rate", "Scale ω_s", "Centre ω_b (nats)", "Steepness ω_a",
        "Histogram of lambda, step 100"]  # fmt: skip
COMMON = ["Training loss (NELBO)", "Validation perplexity", "Cross-entropy by t, training, step 100", "Learning rate",
          "Gradient norm, before clipping", "Throughput", "Share of peak FLOPs"]  # fmt: skip


def test_a_finished_soft_masked_run_shows_everything(tmp_path):
    source, tree = made(crafted_run.write(tmp_path / "my run", texts=["first text", "second"]))
    assert tree.all("h1") == ["my run"] and "Finished: 100 steps" in tree.all("strong")
    assert set(titles(tree)) == {*SOFT, *COMMON} and "Temperature" not in source
    assert tree.all("span")[::3] == [
        "Perplexity, one pass, plain masks", "Perplexity, two passes, soft masks", "Gain of the second pass", "Training tokens", "Throughput"
    ]  # fmt: skip
    assert tree.all("p")[0] == "With soft-masking 4.9 % lower perplexity on the same masks [3.9, 5.8]."
    for said in ("12.18", "95 % interval 11.02 to 13.46; 2.5000 nats per token (final validation, 16 of 32 windows)",
                 "On 8 of 32 windows at every step", "11.59", "+0.0500",
                 "+0.0400 to +0.0600", "12,800", "1,055 tokens/s",
                 "quartiles 1,032 to 1,078; 25.0% of the peak FLOPs"):  # fmt: skip
        assert said in source, said
    assert [text.strip() for text in tree.all("pre")] == ["first text", "second"] * 2
    assert "3.11.7" in source and "1 x cpu (cpu)" in source and "123,456" in source


def test_the_shares_of_the_wall_time_are_drawn_and_explained(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    account = crafted_run.write_account(path, steps=150.0, compiling=30.0, down=20.0)
    source, tree = made(path)
    assert "Shares of the wall time" in titles(tree) and "3 min 20 s since 1970-01-01 00:00 UTC, starts: 3." in source
    described = next(text for text in tree.all("desc") if text.startswith("Training steps: 75.0%"))
    for name, kind in goodput.KINDS.items():
        assert f"{kind.label}: {account.shares[name]:.1%}" in described and page.text(kind.meaning) in source
    assert tree.all("span")[-3:] == ["Goodput", "75.0%", "of the wall time: training steps that count"]
    (path / goodput.FILE).write_text('{"since": 3}')
    source, tree = made(path)
    assert "Wall time" not in tree.all("h2") and "goodput.json is damaged and left out." in source


def test_a_binary_run_shows_no_soft_masking(tmp_path):
    source, tree = made(crafted_run.write(tmp_path / "run", soft=False))
    assert set(titles(tree)) == set(COMMON) and "Gain" not in source and "binary masks" in source
    assert tree.all("p")[0] == "Perplexity per token 12.18 [11.02, 13.46] with plain masks." and "\u03bb" not in source


def test_a_run_that_goes_on_says_of_which_step_its_verdict_is_and_one_not_validated_has_none(tmp_path):
    _, tree = made(crafted_run.write(tmp_path / "run", finished=False, train__steps=200))
    assert tree.all("p")[0].startswith("Validation at step 100, 8 of 32 windows: With soft-masking")
    source, tree = made(crafted_run.write(tmp_path / "begun", finished=False, steps=20, train__steps=90))
    assert 'class="verdict"' not in source and "has not been validated" in source


def test_every_chart_says_what_it_shows(tmp_path):
    source, _ = made(crafted_run.write(tmp_path / "run", steps=50))
    figures = re.findall("<figure.*?</figure>", source, re.DOTALL)
    assert len(figures) == 13 and all('<p class="note">' in figure for figure in figures)


def test_settings_that_differ_come_first(tmp_path):
    source, _ = made(crafted_run.write(tmp_path / "run", model__hidden_size=96))
    first, rest = source.split("<details><summary>The other")
    assert "<td>model.hidden_size</td><td>96</td><td>768</td>" in first and "model.hidden_size" not in rest
    assert "model.dropout" not in first and "<td>model.dropout</td>" in rest


def test_the_page_asks_nothing_of_any_network(tmp_path):
    source, tree = made(crafted_run.write(tmp_path / "run"))
    assert not set(tree.tags) & {"img", "link", "iframe", "object", "embed", "base", "form"}
    names = {name for _, name, _ in tree.attributes}
    assert not names & {"src", "href", "action", "style"} and not [name for name in names if name.startswith("on")]
    assert "url(" not in page.STYLE and "@import" not in page.STYLE and "http" not in page.SCRIPT
    policy = next(value for tag, name, value in tree.attributes if (tag, name) == ("meta", "content"))
    assert policy.startswith("default-src 'none'") and "unsafe-inline'; script-src 'sha256-" in policy


def test_hostile_texts_are_only_text(tmp_path):
    path = crafted_run.write(tmp_path / "<script>run", data__paths="<img src=x onerror=alert(1)>")
    write_json(path / "versions.json", {"<script>": "</table><script>"})
    source, tree = made(path)
    assert tree.tags.count("script") == 1 and "img" not in tree.tags
    assert any("<img src=x onerror=" in text for text in tree.all("pre")) and tree.all("h1") == ["<script>run"]
    assert "\x00" not in source and "\ufffd" in source


def test_ids_are_unique_and_every_chart_is_named(tmp_path):
    _, tree = made(crafted_run.write(tmp_path / "run"))
    ids = [value for _, name, value in tree.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and ids
    labels = [value.split() for tag, name, value in tree.attributes if name == "aria-labelledby"]
    assert labels and all(set(names) <= set(ids) for names in labels)


@pytest.mark.parametrize(
    "lines, said, charts",
    [
        ("", ["metrics.jsonl is empty", "not been validated"], set()),
        (json.dumps(crafted_run.train_row(1, True)), ["step 1 of 100", "not been validated"], {"Mean lambda"}),
        ('{"step": 5, "kind": "validation", "one_pass/nelbo": 2.0}\n', ["No training row", "7.389"],
         {"Validation perplexity"}),
        ('{"step": 5, "kind": "train", "loss": "nan"}\n{"st', ["1 value is not finite: loss at step 5.", "1 line of"],
         {"Training loss (NELBO)"}),
        ('{"step": 5, "kind": "samples", "texts": 7}\n', ["step 5 of 100"], set()),
        ('{"step": 5, "kind": "train", "lambda_histogram": ["x"], "loss": []}\n', ["step 5 of 100"], set()),
    ],
)  # fmt: skip
def test_a_run_that_has_hardly_begun_has_a_page_too(tmp_path, lines, said, charts):
    path = crafted_run.write(tmp_path / "run", finished=False)
    (path / "metrics.jsonl").write_text(lines)
    source, tree = made(path)
    assert charts <= set(titles(tree)) and (charts or not titles(tree))
    for part in said:
        assert part in source, part


def test_a_folder_of_which_little_is_left_says_what_is_missing(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    for name in ("config.json", "versions.json", "summary.json"):
        (path / name).unlink()
    source, tree = made(path)
    assert "There is no config.json" in source and "There is no versions.json" in source
    assert "Not finished: step 100" in source and "final validation at step 100" in source
    assert {"Training loss (NELBO)", "Mean lambda"} <= set(titles(tree))
    (path / "metrics.jsonl").unlink()
    write_json(path / "config.json", {})
    assert "no metrics.jsonl" in run_page.write(path).read_text()


def test_nan_in_the_final_validation_is_shown_as_such(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    final = {f"one_pass/{name}": "nan" for name in ("nelbo", "perplexity", "nelbo_low", "nelbo_high")}
    write_json(path / "summary.json", {"finished": True, "step": 100, "validation": final, "samples": []})
    assert '<span class="value">nan</span>' in made(path)[0]


def test_many_and_long_samples_are_cut_and_counted(tmp_path):
    texts = ["x" * 20_000] * 40
    source, tree = made(crafted_run.write(tmp_path / "run", texts=texts, steps=50))
    assert len(tree.all("pre")) == run_page.MOST_SAMPLES and "and 24 more in metrics.jsonl" in source
    assert "(cut)" in source and len(source) < 400_000


@pytest.mark.full
def test_a_run_of_200_000_rows_is_a_small_page(tmp_path):
    path = crafted_run.write(tmp_path / "run", finished=False, train__steps=4_000_000)
    row, lines = crafted_run.train_row(1, True), []
    for step in range(20, 4_000_001, 20):
        row |= {"step": step, "loss": 2 + 1000 / step + 0.1 * (step % 7)}
        lines.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(lines))
    assert run_page.write(path).stat().st_size < 2e6


def test_the_end_of_a_run_is_told_by_its_coming_summary(tmp_path):
    path = crafted_run.write(tmp_path / "run", finished=False)
    summary = {"finished": True, "step": 100, "validation": crafted_run.scores(1.0, None), "samples": []}
    run_page.write_at_end(path, summary)
    source = (path / "report.html").read_text()
    assert "Finished: 100 steps" in source and "2.718" in source


def test_a_run_killed_before_its_summary_is_written_has_its_page_and_ends_again(tmp_path, monkeypatch):
    path = crafted_run.write(tmp_path / "run", finished=False)
    with RunFolder(path) as folder:
        trainer = object.__new__(loop.Trainer)
        trainer.config, trainer.folder, trainer.tracker = config.from_dict(folder.read_config()), folder, mock.Mock()
        trainer.task, trainer.heart = mock.Mock(info={"train_tokens": 77_777}), mock.Mock()
        trainer.times = mock.MagicMock()
        trainer.times.account.goodput = 0.5
        trainer.task.validate.return_value = crafted_run.scores(1.0, 0.1)
        monkeypatch.setattr(loop.trajectory, "write", mock.Mock())
        monkeypatch.setattr(trainer, "_sample", lambda *_: ["a sample"], raising=False)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "write_json", mock.Mock(side_effect=KeyboardInterrupt))
            trainer._finish(mock.Mock(step=100))
        assert "Finished: 100 steps" in (path / "report.html").read_text() and folder.read_summary() is None
        (path / "report.html").unlink()
        assert trainer._finish(mock.Mock(step=100)) == folder.read_summary()
    source = (path / "report.html").read_text()
    assert "77,777" in source and "2.718" in source


def test_a_page_that_fails_is_a_line_not_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_page, "build", lambda *_: 1 / 0)
    run_page.write_at_end(crafted_run.write(tmp_path / "run"), {"step": 100})
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no report.html was written (division by zero)" in said
    assert f"python -m softmask_jax.report {tmp_path / 'run'}" in said


def test_the_command_writes_into_the_run_or_elsewhere(tmp_path, capsys):
    path = crafted_run.write(tmp_path / "run")
    assert main([str(path)]) == 0 and capsys.readouterr().out == f"Report  {path / 'report.html'}\n"
    assert main([str(path), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text()[:15] == "<!DOCTYPE html>"


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: No run in") and error.count("\n") == 1
    assert main([str(crafted_run.write(tmp_path / "run")), "--out", str(tmp_path / "no" / "x.html")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"Error: .* while writing .*/no/x\.html\. Give another --out\.\n", error)
    assert main(["~nobody-of-that-name/run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_home_folder_is_understood_on_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    crafted_run.write(tmp_path / "run")
    assert main(["~/run", "--out=~/x.html"]) == 0 and (tmp_path / "x.html").exists()
    assert compare.parse(["a", "b", "--out=~/y.html"]).out == str(tmp_path / "y.html")


def test_a_config_edited_by_hand_makes_a_page_all_the_same(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    (path / "config.json").write_text('{"train": 5, "soft_mask": {"variant": []}, "data": {"seq_len": null}}')
    assert "soft masks" in run_page.write(path).read_text()


def test_the_report_does_not_wait_for_jax(tmp_path):
    code = "import sys, softmask_jax.report.run_page; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_script_is_the_one_that_the_policy_allows(tmp_path):
    source, _ = made(crafted_run.write(tmp_path / "run"))
    assert re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1] == page.SCRIPT
    assert run_log.read(tmp_path / "run").finished


def answered(step: int, answers: list, prompts=("Why?", crafted_run.HOSTILE)) -> str:
    row = {"prompts": list(prompts), "answers": answers, "references": ["Because.", crafted_run.HOSTILE]}
    return json.dumps(plain({"step": step, "kind": "samples", "texts": ["a text"], **row})) + "\n"


def test_answers_before_and_after_training_stand_beside_the_reference(tmp_path):
    path = crafted_run.write(tmp_path / "run", texts=["a text"])
    rows = (path / "metrics.jsonl").read_text()
    later = "".join(answered(step, [f"late {step}", "b"]) for step in (20, 40, 60, 80, 100))
    (path / "metrics.jsonl").write_text(answered(0, ["early", crafted_run.HOSTILE]) + rows + later)
    source, tree = made(path)
    wanted = ["Before training", "After 100 steps", "Reference answer"]
    assert [title for title in titles(tree) if title in wanted] == 2 * wanted
    shown = [text.strip() for text in tree.all("pre")]
    assert shown[:4] == ["Why?", "early", "late 100", "Because."] and "img" not in tree.tags
    assert "Before and after" in source


@pytest.mark.parametrize("first, last", [
    (answered(0, ["early", "b"]), answered(100, ["late", "b"], ("Another?", "c"))),  # of other conversations
    (answered(0, ["early", "b"]), ""), ("", answered(100, ["late", "b"])),
    ('{"step": 0, "kind": "samples", "prompts": 7, "answers": null, "references": ["a"]}\n', answered(100, ["late", "b"])),
])  # fmt: skip
def test_without_answers_to_the_same_prompts_there_is_no_comparison(tmp_path, first, last):
    path = crafted_run.write(tmp_path / "run")
    (path / "metrics.jsonl").write_text(first + (path / "metrics.jsonl").read_text() + last)
    assert "Before and after" not in made(path)[0]
