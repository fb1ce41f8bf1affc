"""The tasks of code: numbers from two files alone, nothing run without leave, kills that change nothing."""
import dataclasses
import json
import os
import signal

import pytest

from softmask_jax.data.chat.template import ChatTemplate
from softmask_jax.evaluate.code import problems, sandbox
from softmask_jax.evaluate.code.task import CodeTask
from softmask_jax.evaluate.settings import Code, Settings
from softmask_jax.evaluate.task import Stopped
from softmask_jax.samplers import Options
from tests.helpers.sandbox_works import HUMANEVAL_ROW, MBPP_ROW, PLUS_ROW, Writer, work, write_rows

RIGHT, WRONG = "    return 2 * x\n", "    return x\n"

needs_sandbox = pytest.mark.skipif(bool(sandbox.available()), reason=f"no sandbox here: {sandbox.available()}")


def humaneval(tmp_path, count=4):
    rows = [HUMANEVAL_ROW | {"task_id": f"Test/{number}"} for number in range(count)]
    return {"problems": write_rows(tmp_path / "problems.jsonl", rows), "max_new_tokens": 64, "batch_size": 2}


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@needs_sandbox
def test_pass_at_1_and_how_programs_ended(tmp_path):
    model = Writer([RIGHT, WRONG, "    return 1 +\n", RIGHT + "\ndef more():\n    broken("])
    with work(tmp_path / "w", model, **humaneval(tmp_path)) as unit:
        result = CodeTask("humaneval").run(unit)
    found = result.estimates["pass@1"]
    assert (found.value, found.count) == (50.0, 4) and found.low < 50 < found.high and result.complete
    assert result.details["correct"] == {"Test/0": 1, "Test/1": 0, "Test/2": 0, "Test/3": 1}
    assert result.details["verdicts"] == {"passed": 2, "failed": 2}
    assert result.cost["calls"] == 4 and result.cost["seconds"] >= 0
    details = {row["detail"].split(":")[0] for row in rows_of(tmp_path / "w", "verdicts")}
    assert details == {"", "AssertionError", "SyntaxError"}


@needs_sandbox
def test_without_leave_nothing_is_run_and_with_it_the_same_answers_are(tmp_path, monkeypatch):
    given = humaneval(tmp_path)
    with monkeypatch.context() as patch, work(tmp_path / "w", Writer([RIGHT]), allow_code=False, **given) as unit:
        patch.setattr(sandbox, "run", lambda *_, **__: pytest.fail("a program was run"))
        result = CodeTask("humaneval").run(unit)
    assert result.estimates == {} and not result.complete and "--allow_code" in " ".join(result.notes)
    assert not (tmp_path / "w" / "verdicts.jsonl").exists()
    with work(tmp_path / "w", None, **given) as unit:
        assert CodeTask("humaneval").run(unit).estimates["pass@1"].value == 100.0


@needs_sandbox
def test_several_samples_give_pass_at_k_by_the_unbiased_estimator(tmp_path):
    given = humaneval(tmp_path, 2) | {"samples": 3, "k": "1; 2", "batch_size": 6}
    with work(tmp_path / "w", Writer([RIGHT, WRONG, WRONG, WRONG, WRONG, WRONG]), **given) as unit:
        result = CodeTask("humaneval").run(unit)
    assert list(result.estimates) == ["pass@1", "pass@2"]
    assert result.estimates["pass@1"].value == pytest.approx(100 / 6)
    assert result.estimates["pass@2"].value == pytest.approx(100 * (2 / 3) / 2)
    keys = {(row["index"], row["sample"]) for row in rows_of(tmp_path / "w", "verdicts")}
    assert keys == {(index, sample) for index in (0, 1) for sample in (0, 1, 2)}


@needs_sandbox
def test_an_evaluation_that_is_stopped_anywhere_ends_with_the_same_numbers(tmp_path):
    given = humaneval(tmp_path, 6) | {"workers": 1}
    texts = [RIGHT, WRONG, WRONG, RIGHT, RIGHT, WRONG]
    with work(tmp_path / "whole", Writer(texts), **given) as unit:
        whole = CodeTask("humaneval").run(unit)
    stops = 0
    while True:
        done = len(rows_of(tmp_path / "w", "answers")) if (tmp_path / "w" / "answers.jsonl").exists() else 0
        with work(tmp_path / "w", Writer(texts[done:]) if done < 6 else None, **given) as unit, unit.stop.postponed():
            unit.stop._note(signal.SIGTERM, None)
            try:
                result = CodeTask("humaneval").run(unit)
                break
            except Stopped:
                stops += 1
    # Three batches of answers, six programs.
    assert stops == 9
    assert (result.estimates, result.details["correct"]) == (whole.estimates, whole.details["correct"])


@needs_sandbox
def test_mbpp_and_its_plus_version_in_a_chat(tmp_path):
    right = "import math\ndef double(x):\n    return 2 * x\n```\nThis doubles."
    # Right for the three assertions that are shown, wrong for arrays.
    narrow = "def double(x):\n    return {0: 0, 1: 2, 2: 4}[x]\n"
    rows = [PLUS_ROW, PLUS_ROW | {"task_id": 3}]
    for task, own, compat, value in (("mbpp", [MBPP_ROW, MBPP_ROW | {"task_id": 12}], False, 100.0),
                                     ("mbpp_plus", rows, False, 50.0), ("mbpp_plus", rows, True, 100.0)):  # fmt: skip
        model = Writer([right, narrow], padding="left")
        model.template = ChatTemplate()
        folder = tmp_path / f"{task}{compat}"
        folder.mkdir()
        path = write_rows(folder / "p.jsonl", own)
        with work(folder, model, problems=f"{task}={path}", max_new_tokens=128, compat=compat) as unit:
            result = CodeTask(task).run(unit)
        assert result.estimates["pass@1"].value == value
        assert "messages" in rows_of(folder, "answers")[0]


@needs_sandbox
def test_the_canonical_solutions_of_humaneval_score_100_percent(tmp_path):
    given = problems.load("humaneval")
    # Answers in a chat: the body of the function that the prompt begins, and the end of its block.
    answers = {
        (index, 0): {"messages": [], "text": problem.solution.removeprefix(problem.prompt) + "```\nThat is all."}
        for index, problem in enumerate(given)
    }
    with work(tmp_path) as unit:
        verdicts = CodeTask("humaneval")._verdicts(unit, given, answers)
    assert len(verdicts) == 164
    assert [given[index].id for (index, _), row in verdicts.items() if row["kind"] != "passed"] == []


def test_answers_that_could_not_be_made_count_as_failed(tmp_path):
    rows = [HUMANEVAL_ROW, HUMANEVAL_ROW | {"task_id": "Test/1", "prompt": "def double(x): # NaN\n"}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    with work(tmp_path / "w", Writer(["    return 0"]), problems=path, max_new_tokens=32, allow_code=False) as unit:
        result = CodeTask("humaneval").run(unit)
    assert "1 answer of 2 could not be made" in result.notes[0]


@needs_sandbox
def test_two_models_are_compared_problem_by_problem(tmp_path):
    given = humaneval(tmp_path)
    task = CodeTask("humaneval")
    for name, texts in (("a", [RIGHT, WRONG, WRONG, WRONG]), ("b", [RIGHT, RIGHT, WRONG, RIGHT])):
        with work(tmp_path / name, Writer(texts), **given) as unit:
            task.run(unit)
    with work(tmp_path / "a", **given) as baseline, work(tmp_path / "b", **given) as other:
        found = task.compare(baseline, other)["pass@1"]
        assert (found.value, found.count) == (50.0, 4) and found.low < 50 < found.high
    (tmp_path / "c").mkdir()
    with work(tmp_path / "a", **given) as baseline, work(tmp_path / "c", **given) as other:
        assert task.compare(baseline, other) == {}


def test_a_place_without_a_sandbox_is_refused_unless_that_is_accepted(tmp_path, monkeypatch):
    given, task = humaneval(tmp_path, 1), CodeTask("humaneval")
    monkeypatch.setattr(sandbox, "available", lambda: "unshare: Operation not permitted")
    settings = Settings(code=Code(**given))
    with pytest.raises(OSError, match="Operation not permitted.*--allow_unsafe_code") as caught:
        task.check(settings, allow_code=True, allow_unsafe_code=False)
    assert "\n" not in str(caught.value)
    task.check(settings, allow_code=True, allow_unsafe_code=True)
    with work(tmp_path / "w", Writer([RIGHT]), allow_unsafe_code=True, **given) as unit:
        result = task.run(unit)
    assert result.estimates["pass@1"].value == 100.0 and "without a sandbox" in " ".join(result.notes)
    with work(tmp_path / "x", Writer([RIGHT]), **given) as unit, pytest.raises(OSError, match="no sandbox"):
        task.run(unit)


@pytest.mark.parametrize(
    "code, message",
    [({"k": "1; 2"}, "samples=1"), ({"k": "x"}, "whole numbers"), ({"k": ""}, "whole numbers"),
     ({"timeout": 0.0}, "timeout"), ({"memory": 16}, "memory is 16; the least is 128"), ({"samples": 0}, "samples is 0"),
     ({"problems": "absent.jsonl"}, "absent")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_before_a_model_is_loaded(code, message):
    with pytest.raises((ValueError, OSError), match=message):
        CodeTask("humaneval").check(Settings(code=Code(**code)), allow_code=False, allow_unsafe_code=False)


def test_leave_to_run_unsafely_is_an_addition_to_leave_to_run(tmp_path):
    with pytest.raises(ValueError, match="--allow_code"):
        CodeTask("humaneval").check(Settings(code=Code(**humaneval(tmp_path))), allow_code=False, allow_unsafe_code=True)


def test_other_settings_do_not_go_on_from_the_answers_that_are_there(tmp_path):
    given = humaneval(tmp_path)
    with work(tmp_path / "w", Writer([RIGHT]), allow_code=False, **given) as unit:
        CodeTask("humaneval").run(unit)
    with work(tmp_path / "w", Writer([RIGHT]), allow_code=False, **given | {"steps": 3}) as unit:
        with pytest.raises(ValueError, match="other settings"):
            CodeTask("humaneval").run(unit)


def test_the_budget_is_a_share_of_the_steps(tmp_path):
    from fractions import Fraction

    given, steps = humaneval(tmp_path, 1) | {"max_new_tokens": 0}, []
    for share in ("1", "1/2", "1/4"):
        model = Writer([RIGHT])
        with work(tmp_path / share.replace("/", "_"), model, allow_code=False, **given) as unit:
            CodeTask("humaneval").run(dataclasses.replace(unit, budget=Fraction(share)))
        steps.append(model.options[0].steps)
    assert steps == [768, 384, 192]
    assert os.listdir(tmp_path / "1") and model.options[0].alg == "entropy"


@pytest.mark.parametrize("sampler", [Options(alg="confidence_threshold"), Options(alg="entropy", tokens_per_step=2)])
def test_a_sampler_that_counts_no_steps_is_told_none_and_has_no_budgets(tmp_path, sampler):
    model, task = Writer([RIGHT]), CodeTask("humaneval")
    with work(tmp_path / "w", model, allow_code=False, **humaneval(tmp_path)) as unit:
        unit = dataclasses.replace(unit, settings=dataclasses.replace(unit.settings, code_sampler=sampler))
        task.run(unit)
        assert model.options[0].steps is None
        run = dataclasses.replace(unit.settings.run, budgets="1; 1/2")
        with pytest.raises(ValueError, match="config.code_sampler.*leave config.run.budgets at 1"):
            task.check(dataclasses.replace(unit.settings, run=run), allow_code=False, allow_unsafe_code=False)


def test_a_model_without_a_template_cannot_be_made_to_chat(tmp_path):
    with work(tmp_path / "w", Writer([RIGHT]), allow_code=False, chat=True, **humaneval(tmp_path)) as unit:
        with pytest.raises(ValueError, match="chat template"):
            CodeTask("humaneval").run(unit)
