"""The command at toy size: every job, its page and its figures; stopped, it goes on and repeats nothing."""
import functools
import html
import json
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from softmask_jax.distributed import sharding
from softmask_jax.models import families
from softmask_jax.reproduce import __main__ as reproduce, jobs, study, work
from softmask_jax.reproduce.jobs import Results


def shared(function):
    """The function with its results kept, by its arguments as text."""
    results = {}

    @functools.wraps(function)
    def call(*args, **named):
        key = repr((args, sorted(named.items())))
        return results[key] if key in results else results.setdefault(key, function(*args, **named))

    return call


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out, cache = tmp_path_factory.mktemp("study") / "out", jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    kept, make = [], work.loop.train_step.make
    with pytest.MonkeyPatch.context() as patch:
        # Runs of equal settings share what they compile, as in `tiny_run.home`.
        for owner, name in (
            (families.denoiser, "build"), (families.dream_denoiser, "build"), (work.loop.optimizer, "make"),
        ):  # fmt: skip
            patch.setattr(owner, name, shared(getattr(owner, name)))
        patch.setattr(work.loop.train_step, "make", lambda *args: kept.append(make(*args)) or kept[-1])
        patch.setattr(jobs.jax, "clear_caches", lambda: None)
        patch.setattr(work.loop, "peak_flops", lambda device: 1e11)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        patch.setattr(work.loop.sharding, "make_mesh", lambda **_: mesh)
        assert reproduce.main([f"--out={out}", "--smoke"]) == 0
        yield out
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()


def test_every_figure_is_in_results_json_and_every_verdict_on_the_page(studied):
    report = json.loads((studied / "results.json").read_text())
    text = html.unescape((studied / "index.html").read_text())
    assert [row["recipe"] for row in report["nelbo"]] == ["base", "binary", "soft", "binary_updates", "paper_start"]
    soft = report["nelbo"][2]
    assert len(soft["difference"]["by_seed"]) == 2 and soft["difference"]["over_seeds"]["low"] is not None
    assert report["nelbo"][1]["difference"]["over_windows"]["value"] == 0
    for rows, more in ((report["samples"], []), (report["answers"], [("base", False)])):
        ways = {(row["recipe"], row["feedback"], row["steps"]) for row in rows}
        names = [*more, ("binary", False), ("soft", True), ("soft", False)]
        assert ways == {(*name, number) for name in names for number in (16, 4)}
        assert all(0 < row["calls"] <= row["steps"] + 1 for row in rows)
    assert len(report["training"]) == (1 + 2 * 3 + 1) + (1 + 2 * 2)
    tables = (studied / "tables.md").read_text()
    assert tables.count("| ---") > 10 and all(row["title"] in tables for row in report["nelbo"])
    assert report["verdicts"] and all(sentence in text for sentence in report["verdicts"])
    first = " ".join(re.findall('<p class="verdict">(.*?)</p>', text))
    assert "in 16 steps" in first and "in 4 steps" in first and "perplexity than binary on the same masks" in first


def test_a_second_call_makes_only_what_is_missing(studied, monkeypatch):
    ran, trained = [], work.trained
    monkeypatch.setattr(work, "trained", lambda run, folder: ran.append(run.name) or trained(run, folder))
    before = json.loads((studied / "results.json").read_text())
    results = Results(studied / "results")
    results.path("text-soft-2-feedback-4").unlink()
    results.path("train-puzzle-soft-1").unlink()
    assert reproduce.main([f"--out={studied}", "--smoke"]) == 0
    after = json.loads((studied / "results.json").read_text())
    assert ran == ["puzzle-soft-1"]
    assert {name: after[name] for name in ("nelbo", "samples", "answers")} == {
        name: before[name] for name in ("nelbo", "samples", "answers")
    }


def test_a_stopped_training_run_ends_the_study(studied, monkeypatch, capsys):
    Results(studied / "results").path("train-puzzle-soft-1").unlink()
    monkeypatch.setattr(work.loop, "train", lambda *_, **__: {"finished": False, "step": 1})
    assert reproduce.main([f"--out={studied}", "--smoke"]) == 130
    assert "Interrupted. The same command continues." in capsys.readouterr().err


def test_a_study_of_other_sizes_and_a_damaged_result_are_one_line(studied, capsys):
    assert reproduce.main([f"--out={studied}"]) == 1
    assert "a study of other sizes (" in capsys.readouterr().err
    path = Results(studied / "results").path("scores")
    content = path.read_text()
    path.write_text("{")
    assert reproduce.main([f"--out={studied}", "--smoke"]) == 1
    path.write_text(content)
    assert "scores.json is damaged" in capsys.readouterr().err


def test_sizes_name_recipes_that_there_are():
    names = {recipe.name for recipe in study.RECIPES}
    assert all(set(sizes.recipes) <= names for sizes in study.SIZES.values())
