"""An evaluation's pieces, whatever they measure: resumed, compared, tabulated, drawn."""
import dataclasses
import json
import os
import re
import signal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.evaluate import models, results_page, tables
from softmask_jax.evaluate.runner import Evaluation
from softmask_jax.evaluate.settings import Models, Settings, budgets
from softmask_jax.evaluate.task import Estimate, Result, Stopped
from softmask_jax.samplers import SoftMask


@dataclasses.dataclass(eq=False)
class Counting:
    """A task whose rows are numbers drawn for the model; stops by a signal before row `stop_at`."""

    name: str = "count"
    sections: tuple = ("samples",)
    sweeps: bool = True
    stop_at: int | None = None
    complete: bool = True
    made: int = 0

    def check(self, settings, *, allow_code, allow_unsafe_code):
        if settings.samples.count == 13:
            raise ValueError("13 is no good number")

    def run(self, work):
        total = work.settings.samples.count
        with work.records("rows", {"model": work.model.name}, total) as file:
            for index in range(total):
                if (index, 0) in file.rows:
                    continue
                if index == self.stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                work.check_stop()
                self.made += 1
                seed = [work.settings.run.seed, index, len(work.name)]
                file.add([{"index": index, "value": float(np.random.default_rng(seed).normal())}])
            values = [row["value"] for row in file.rows.values()]
        cost = {"calls": float(64 * work.budget), "seconds": 0.5 * float(work.budget)}
        estimate = Estimate.of_mean(values, unit="nats", better="lower")
        return Result({"mean": estimate}, cost, {"values": values}, ("A note.",), self.complete)

    def compare(self, baseline, other):
        ours, theirs = (
            np.asarray(json.loads((work.folder / "result.json").read_text())["result"]["details"]["values"])
            for work in (other, baseline)
        )
        return {"mean": Estimate.of_mean(ours - theirs, better="lower")}


def load(path, *, weights, step, base, mesh):
    loaded.append(path.name)
    step = newest(path) if step is None else step
    soft = SimpleNamespace(on=path.name != "binary")
    return SimpleNamespace(name=path.name, step=step, soft_mask=soft)


def newest(path) -> int:
    return max((int(folder.name) for folder in path.glob("checkpoints/*")), default=7)


def save(path, step: int, content: str):
    (path / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    (path / "checkpoints" / str(step) / "checksums.json").write_text(content)


loaded: list[str] = []


@pytest.fixture
def runs(tmp_path):
    for name in ("binary", "soft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    loaded.clear()
    return tmp_path


def settings(runs, *, names="binary; soft", count=6, **more) -> Settings:
    paths = "; ".join(str(runs / name) for name in names.split("; "))
    values = {"models": {"checkpoints": paths}, "samples": {"count": count}, "mesh": {"data": 1, "fsdp": -1}} | more
    return config.complete(values, Settings)


def evaluate(runs, task, **more):
    return Evaluation(settings(runs, **more), runs / "out", [task], load)()


def numbers(results: dict) -> list:
    return [(row["model"], row["budget"], row["estimates"]) for row in results["results"]] + results["differences"]


def test_every_model_and_budget_is_measured_and_models_are_loaded_once(runs):
    results = evaluate(runs, Counting(), run={"budgets": "1/4; 1"})
    assert [(row["model"], row["budget"]) for row in results["results"]] == [
        ("binary", "1"), ("binary", "1/4"), ("soft", "1"), ("soft", "1/4")]  # fmt: skip
    assert loaded == ["binary", "soft"]
    assert json.loads((runs / "out/results.json").read_text()) == results
    assert results["settings"]["samples"]["count"] == 6 and results["versions"]["jax"] and results["models"]["soft"]["step"] == 7
    assert (runs / "out/soft/count/1-4/result.json").is_file()


def test_what_does_not_depend_on_the_budget_is_measured_once(runs):
    results = evaluate(runs, Counting(sweeps=False), run={"budgets": "1; 1/2"})
    assert [row["budget"] for row in results["results"]] == ["1", "1"]


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_numbers(runs, tmp_path):
    whole = evaluate(runs, Counting())
    os.rename(runs / "out", runs / "whole")
    with pytest.raises(Stopped):
        evaluate(runs, Counting(stop_at=4))
    assert not (runs / "out/results.json").exists()
    again = Counting()
    assert numbers(evaluate(runs, again)) == numbers(whole) and again.made == 12 - 4
    nothing = Counting()
    loaded.clear()
    assert numbers(evaluate(runs, nothing)) == numbers(whole)
    assert nothing.made == 0 and not loaded


def test_an_incomplete_result_is_taken_up_again(runs):
    evaluate(runs, Counting(complete=False))
    task = Counting()
    assert all(row["complete"] for row in evaluate(runs, task)["results"]) and task.made == 0


def test_differences_are_paired_and_favour_someone_only_where_zero_is_left_out(runs):
    results = evaluate(runs, Counting(), count=400)
    one = results["differences"][0]
    assert (one["model"], one["baseline"], one["name"], one["count"]) == ("soft", "binary", "mean", 400)
    values = [row["details"]["values"] for row in results["results"]]
    assert one["value"] == pytest.approx(np.mean(np.subtract(values[1], values[0])))
    assert tables.favoured({"value": -2, "low": -3, "high": -1, "better": "lower", "model": "a", "baseline": "b"}) == "a"
    assert tables.favoured({"value": -2, "low": -3, "high": -1, "better": "higher", "model": "a", "baseline": "b"}) == "b"
    assert tables.favoured({"value": -2, "low": -3, "high": 1, "better": "lower", "model": "a", "baseline": "b"}) == "neither"


def test_tables_show_numbers_with_intervals_units_costs_and_notes(runs):
    text = tables.markdown(evaluate(runs, Counting(), run={"budgets": "1; 1/2"}))
    row = next(line for line in text.splitlines() if line.startswith("| soft") and "1/2" in line)
    assert "mean, nats" in text and "[" in row and "| 32 " in row and "- A note." in text
    assert "| 1      | soft - binary |" in text


@pytest.mark.parametrize("change, said", [
    ({"count": 8}, "samples.count: 6 -> 8"), ({"run": {"seed": 1}}, "seed: 40000 -> 1"),
    ({"models": {"step": 3}}, "step: 7 -> 3"), ({"models": {"weights": "raw"}}, 'weights: "ema" -> "raw"'),
])  # fmt: skip
def test_numbers_of_other_settings_are_not_mixed(runs, change, said):
    evaluate(runs, Counting())
    if "models" in change:
        change = {"models": dataclasses.asdict(settings(runs).models) | change["models"]}
    with pytest.raises(ValueError, match=f"{said}.*give another --out"):
        evaluate(runs, Counting(), **change)


def test_a_run_that_trains_on_is_measured_where_the_evaluation_began(runs):
    save(runs / "soft", 10, "a")
    with pytest.raises(Stopped):
        evaluate(runs, Counting(stop_at=2), names="soft")
    save(runs / "soft", 20, "b")
    results = evaluate(runs, Counting(), names="soft", run={"budgets": "1; 1/2"})
    assert results["models"]["soft"]["step"] == 10
    stored = [json.loads(path.read_text())["step"] for path in runs.glob("out/soft/count/*/result.json")]
    assert stored == [10, 10]
    # Its files may be gone by the end.
    os.rename(runs / "soft/checkpoints/10", runs / "gone")
    assert numbers(evaluate(runs, Counting(), names="soft", run={"budgets": "1; 1/2"})) == numbers(results)


def test_other_weights_at_the_same_step_are_not_mixed(runs):
    save(runs / "soft", 10, "a")
    evaluate(runs, Counting(), names="soft")
    save(runs / "soft", 10, "b")
    with pytest.raises(ValueError, match="other weights than .*soft has at step 10 now: give another --out"):
        evaluate(runs, Counting(), names="soft")


def test_an_adapter_in_pefts_format_is_a_model_whose_weights_are_its_file(runs):
    (runs / "peft").mkdir()
    (runs / "peft/adapter_config.json").write_text("{}")
    (runs / "peft/adapter_model.safetensors").write_bytes(b"one")
    assert evaluate(runs, Counting(), names="peft")["models"]["peft"]["step"] == 7
    (runs / "peft/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="other weights than .*peft has at step 7 now: give another --out"):
        evaluate(runs, Counting(), names="peft")


def test_a_step_that_one_model_does_not_have_hinders_no_second_command(runs):
    # A converted model has weights of one step, whichever is asked for.
    def converted(path, **given):
        return load(path, **given | {"step": 5})

    given = settings(runs, names="soft", models={"checkpoints": str(runs / "soft"), "step": 3})
    for _ in range(2):
        assert Evaluation(given, runs / "out", [Counting()], converted)()["models"]["soft"]["step"] == 5


def test_what_is_wrong_is_known_before_a_model_is_loaded(runs):
    with pytest.raises(ValueError, match="13 is no good number"):
        evaluate(runs, Counting(), count=13)
    with pytest.raises(FileNotFoundError, match="no folder .*absent"):
        evaluate(runs, Counting(), names="absent")
    (runs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' has neither config.json nor adapter_config.json"):
        evaluate(runs, Counting(), names="soft; empty")
    with pytest.raises(ValueError, match="Two checkpoints are called 'soft'"):
        evaluate(runs, Counting(), names="soft; soft")
    with pytest.raises(ValueError, match="give --checkpoint"):
        evaluate(runs, Counting(), models={"checkpoints": " ; "})
    assert not loaded and not (runs / "out").exists()


def test_a_folder_in_use_and_a_damaged_result_are_said(runs):
    evaluate(runs, Counting())
    (runs / "out/soft/count/1/result.json").write_text("{")
    with pytest.raises(ValueError, match="is no result of this command; remove it"):
        evaluate(runs, Counting())


def test_checkpoints_have_names_and_soft_masking_can_be_turned_off(runs):
    results = models.checkpoints(settings(runs, models={"checkpoints": f"a={runs}/soft; {runs}/soft#none"}).models)
    assert [(one.name, one.plain) for one in results] == [("a", False), ("soft-plain", True)]
    with pytest.raises(ValueError, match="trained without"):
        models.without_soft_masking(load(runs / "binary", weights="", step=None, base="", mesh=None))


@pytest.mark.parametrize(
    "listed, results",
    [
        ("a=b/run; c;d", [("run", "a=b/run", False), ("c_d", "c;d", False)]),
        ("e#none;e#none#none", [("e_none", "e#none", False), ("e_none-plain", "e#none", True)]),
        ("x=c;d#none;~y", [("x", "c;d", True), ("_y", "~y", False)]),
    ],
)
def test_a_folder_that_exists_under_its_name_is_no_list_and_no_flag(tmp_path, monkeypatch, listed, results):
    for name in ("a=b/run", "c;d", "c", "e#none", "~y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    read = models.checkpoints(Models(checkpoints=listed))
    assert [(one.name, str(one.path), one.plain) for one in read] == results


@dataclasses.dataclass(frozen=True)
class Model:
    soft_mask: SoftMask = SoftMask("topk", 3)


def test_a_plain_model_has_the_same_weights_without_feedback():
    assert models.without_soft_masking(Model()).soft_mask == SoftMask("none", 3)


@pytest.mark.parametrize("text, said", [("", "give fractions"), ("2", "up to 1"), ("1/0", "give fractions"), ("a", "give")])
def test_budgets_are_fractions(text, said):
    assert budgets("1/4; 1; 0.5; 1/4") == [Fraction(1), Fraction(1, 2), Fraction(1, 4)]
    with pytest.raises(ValueError, match=said):
        budgets(text)


def test_the_page_shows_every_model_against_calls_and_seconds(runs):
    results = evaluate(runs, Counting(), run={"budgets": "1; 1/2; 1/4"})
    points = results_page.curves(results)["count", "mean"]["soft"]
    assert [point["calls"] for point in points] == [16, 32, 64] and points[0]["low"] < points[0]["value"]
    written = (runs / "out/results.html").read_text(encoding="utf-8")
    for cost, axis in (("calls", "network calls a text"), ("seconds", "seconds a text")):
        figure = re.search(f"<figure[^>]*><figcaption>count: mean against {cost}<.*?</figure>", written, re.DOTALL)[0]
        assert axis in figure and figure.count("</svg>binary</li>") == figure.count("</svg>soft</li>") == 1
        assert "is better" in figure and 'class="whisker' in figure
    assert written.index('class="verdict"') < written.index("<h2>count</h2>") < written.index("<h2>Models</h2>")


def test_one_budget_is_no_curve(runs):
    assert results_page.curves(evaluate(runs, Counting())) == {}
    assert "<figure" not in (runs / "out/results.html").read_text(encoding="utf-8")
