"""An evaluation's pieces, whatever they measure: resumed, compared, tabulated, drawn."""
import dataclasses
import json
import os
import signal
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.evaluate import models, plots, tables
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
def place(tmp_path):
    for name in ("binary", "soft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    loaded.clear()
    return tmp_path


def settings(place, *, names="binary; soft", count=6, **more) -> Settings:
    paths = "; ".join(str(place / name) for name in names.split("; "))
    values = {"models": {"checkpoints": paths}, "samples": {"count": count}, "mesh": {"data": 1, "fsdp": -1}} | more
    return config.complete(values, Settings)


def evaluate(place, task, **more):
    return Evaluation(settings(place, **more), place / "out", [task], load)()


def numbers(found: dict) -> list:
    return [(row["model"], row["budget"], row["estimates"]) for row in found["results"]] + found["differences"]


def test_every_model_and_budget_is_measured_and_models_are_loaded_once(place):
    found = evaluate(place, Counting(), run={"budgets": "1/4; 1"})
    assert [(row["model"], row["budget"]) for row in found["results"]] == [
        ("binary", "1"), ("binary", "1/4"), ("soft", "1"), ("soft", "1/4")]  # fmt: skip
    assert loaded == ["binary", "soft"]
    assert json.loads((place / "out/results.json").read_text()) == found
    assert found["settings"]["samples"]["count"] == 6 and found["versions"]["jax"] and found["models"]["soft"]["step"] == 7
    assert (place / "out/soft/count/1-4/result.json").is_file()


def test_what_does_not_depend_on_the_budget_is_measured_once(place):
    found = evaluate(place, Counting(sweeps=False), run={"budgets": "1; 1/2"})
    assert [row["budget"] for row in found["results"]] == ["1", "1"]


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_numbers(place, tmp_path):
    whole = evaluate(place, Counting())
    os.rename(place / "out", place / "whole")
    with pytest.raises(Stopped):
        evaluate(place, Counting(stop_at=4))
    assert not (place / "out/results.json").exists()
    again = Counting()
    assert numbers(evaluate(place, again)) == numbers(whole) and again.made == 12 - 4
    nothing = Counting()
    loaded.clear()
    assert numbers(evaluate(place, nothing)) == numbers(whole)
    assert nothing.made == 0 and not loaded


def test_an_incomplete_result_is_taken_up_again(place):
    evaluate(place, Counting(complete=False))
    task = Counting()
    assert all(row["complete"] for row in evaluate(place, task)["results"]) and task.made == 0


def test_differences_are_paired_and_favour_someone_only_where_zero_is_left_out(place):
    found = evaluate(place, Counting(), count=400)
    one = found["differences"][0]
    assert (one["model"], one["baseline"], one["name"], one["count"]) == ("soft", "binary", "mean", 400)
    values = [row["details"]["values"] for row in found["results"]]
    assert one["value"] == pytest.approx(np.mean(np.subtract(values[1], values[0])))
    assert tables._verdict({"value": -2, "low": -3, "high": -1, "better": "lower", "model": "a", "baseline": "b"}) == "a"
    assert tables._verdict({"value": -2, "low": -3, "high": -1, "better": "higher", "model": "a", "baseline": "b"}) == "b"
    assert tables._verdict({"value": -2, "low": -3, "high": 1, "better": "lower", "model": "a", "baseline": "b"}) == "neither"


def test_tables_show_numbers_with_intervals_units_costs_and_notes(place):
    text = tables.markdown(evaluate(place, Counting(), run={"budgets": "1; 1/2"}))
    row = next(line for line in text.splitlines() if line.startswith("| soft") and "1/2" in line)
    assert "mean, nats" in text and "[" in row and "| 32 " in row and "- A note." in text
    assert "| 1      | soft - binary |" in text


@pytest.mark.parametrize("change, said", [
    ({"count": 8}, "samples.count: 6 -> 8"), ({"run": {"seed": 1}}, "seed: 40000 -> 1"),
    ({"models": {"step": 3}}, "step: 7 -> 3"), ({"models": {"weights": "raw"}}, 'weights: "ema" -> "raw"'),
])  # fmt: skip
def test_numbers_of_other_settings_are_not_mixed(place, change, said):
    evaluate(place, Counting())
    if "models" in change:
        change = {"models": dataclasses.asdict(settings(place).models) | change["models"]}
    with pytest.raises(ValueError, match=f"{said}.*give another --out"):
        evaluate(place, Counting(), **change)


def test_a_run_that_trains_on_is_measured_where_the_evaluation_began(place):
    save(place / "soft", 10, "a")
    with pytest.raises(Stopped):
        evaluate(place, Counting(stop_at=2), names="soft")
    save(place / "soft", 20, "b")
    found = evaluate(place, Counting(), names="soft", run={"budgets": "1; 1/2"})
    assert found["models"]["soft"]["step"] == 10
    stored = [json.loads(path.read_text())["step"] for path in place.glob("out/soft/count/*/result.json")]
    assert stored == [10, 10]
    # Its files may be gone by the end.
    os.rename(place / "soft/checkpoints/10", place / "gone")
    assert numbers(evaluate(place, Counting(), names="soft", run={"budgets": "1; 1/2"})) == numbers(found)


def test_other_weights_at_the_same_step_are_not_mixed(place):
    save(place / "soft", 10, "a")
    evaluate(place, Counting(), names="soft")
    save(place / "soft", 10, "b")
    with pytest.raises(ValueError, match="other weights than .*soft has at step 10 now: give another --out"):
        evaluate(place, Counting(), names="soft")


def test_a_step_that_one_model_does_not_have_hinders_no_second_command(place):
    # A converted model has weights of one step, whichever is asked for.
    def converted(path, **given):
        return load(path, **given | {"step": 5})

    given = settings(place, names="soft", models={"checkpoints": str(place / "soft"), "step": 3})
    for _ in range(2):
        assert Evaluation(given, place / "out", [Counting()], converted)()["models"]["soft"]["step"] == 5


def test_what_is_wrong_is_known_before_a_model_is_loaded(place):
    with pytest.raises(ValueError, match="13 is no good number"):
        evaluate(place, Counting(), count=13)
    with pytest.raises(FileNotFoundError, match="no folder .*absent"):
        evaluate(place, Counting(), names="absent")
    (place / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' has no config.json"):
        evaluate(place, Counting(), names="soft; empty")
    with pytest.raises(ValueError, match="Two checkpoints are called 'soft'"):
        evaluate(place, Counting(), names="soft; soft")
    with pytest.raises(ValueError, match="give --checkpoint"):
        evaluate(place, Counting(), models={"checkpoints": " ; "})
    assert not loaded and not (place / "out").exists()


def test_a_folder_in_use_and_a_damaged_result_are_said(place):
    evaluate(place, Counting())
    (place / "out/soft/count/1/result.json").write_text("{")
    with pytest.raises(ValueError, match="is no result of this command; remove it"):
        evaluate(place, Counting())


def test_checkpoints_have_names_and_soft_masking_can_be_turned_off(place):
    found = models.checkpoints(settings(place, models={"checkpoints": f"a={place}/soft; {place}/soft#none"}).models)
    assert [(one.name, one.plain) for one in found] == [("a", False), ("soft-plain", True)]
    with pytest.raises(ValueError, match="trained without"):
        models.without_soft_masking(load(place / "binary", weights="", step=None, base="", mesh=None))


@pytest.mark.parametrize(
    "listed, found",
    [
        ("a=b/run; c;d", [("run", "a=b/run", False), ("c_d", "c;d", False)]),
        ("e#none;e#none#none", [("e_none", "e#none", False), ("e_none-plain", "e#none", True)]),
        ("x=c;d#none;~y", [("x", "c;d", True), ("_y", "~y", False)]),
    ],
)
def test_a_folder_that_exists_under_its_name_is_no_list_and_no_flag(tmp_path, monkeypatch, listed, found):
    for name in ("a=b/run", "c;d", "c", "e#none", "~y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    read = models.checkpoints(Models(checkpoints=listed))
    assert [(one.name, str(one.path), one.plain) for one in read] == found


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


def test_plots_show_every_model_against_calls_and_seconds(place):
    found = evaluate(place, Counting(), run={"budgets": "1; 1/2; 1/4"})
    points = plots.curves(found)["count", "mean"]["soft"]
    assert [point["calls"] for point in points] == [16, 32, 64] and points[0]["low"] < points[0]["value"]
    written = plots.write(found, place / "plots")
    assert [path.name for path in written] == ["count_mean.png", "count_mean.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    svg = written[1].read_text()
    assert all(word in svg for word in ("binary", "soft", "mean, nats", "network calls a text", "seconds a text"))
    before = [path.read_bytes() for path in written]
    time.sleep(1.1)  # a date would differ
    assert [path.read_bytes() for path in plots.write(found, place / "plots")] == before


def test_one_budget_is_no_plot(place):
    assert plots.write(evaluate(place, Counting()), place / "plots") == [] and not (place / "plots").exists()
