"""Problems: HumanEval from its package, every schema from files, and one clear line for a file that has none."""
import gzip
import json

import pytest

from softmask_jax.evaluate.code import problems
from tests.helpers.sandbox_works import HUMANEVAL_ROW, MBPP_ROW, PLUS_ROW, write_rows


def test_humaneval_comes_with_its_package():
    found = problems.load("humaneval")
    assert len(found) == 164 and found[0].id == "HumanEval/0" and found[0].entry_point == "has_close_elements"
    assert found[0].tests.endswith("\ncheck(has_close_elements)\n") and found[0].solution.startswith(found[0].prompt)
    assert [problem.id for problem in problems.load("humaneval", limit=3)] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]


def test_a_file_takes_its_place(tmp_path):
    rows = [HUMANEVAL_ROW, HUMANEVAL_ROW | {"task_id": "Test/1"}]
    plain = problems.load("humaneval", write_rows(tmp_path / "own.jsonl", rows))
    packed = tmp_path / "own.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "own.jsonl").read_bytes()))
    assert [problem.id for problem in plain] == ["Test/0", "Test/1"]
    assert problems.load("humaneval_plus", f"mbpp=other.jsonl; humaneval_plus={packed}") == plain
    assert problems.fingerprint(plain) != problems.fingerprint(plain[:1])


def test_parquet_is_read_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([PLUS_ROW, PLUS_ROW | {"task_id": 3}])
    pyarrow.parquet.write_table(table, tmp_path / "plus.parquet")
    assert [problem.id for problem in problems.load("mbpp_plus", str(tmp_path / "plus.parquet"))] == ["2", "3"]


def test_mbpp_has_its_set_up_before_its_assertions(tmp_path):
    (problem,) = problems.load("mbpp", write_rows(tmp_path / "mbpp.jsonl", [MBPP_ROW]))
    assert problem.tests.split("\n")[:2] == ["zero = 0", "assert double(1) == 2"] and problem.id == "11"
    assert problem.shown == tuple(MBPP_ROW["test_list"]) and problem.prompt == MBPP_ROW["text"]


def test_the_plus_version_has_its_own_tests_unless_they_are_the_references(tmp_path):
    path = write_rows(tmp_path / "plus.jsonl", [PLUS_ROW])
    (ours,), (theirs,) = problems.load("mbpp_plus", path), problems.load("mbpp_plus", path, compat=True)
    assert "numpy" in ours.tests and ours.tests.startswith("import math\n")
    assert "numpy" not in theirs.tests and "assert double(2) == 4" in theirs.tests


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("humaneval", {"task_id": "a", "prompt": "x"}, "entry_point is missing; there are task_id, prompt"),
        ("humaneval", HUMANEVAL_ROW | {"entry_point": "a b"}, "which is no function's name"),
        ("humaneval", HUMANEVAL_ROW | {"test": 3}, "test is 3, which is no text"),
        ("humaneval_plus", {key: HUMANEVAL_ROW[key] for key in ("task_id", "prompt", "entry_point")} | {"plus_input": []},
         "EvalPlus's own files have inputs instead"),
        ("mbpp", {"task_id": 1, "test_list": ["x"]}, "text or prompt is missing"),
        ("mbpp", MBPP_ROW | {"test_list": "assert 1"}, "no list of texts"),
        ("mbpp", MBPP_ROW | {"test_list": []}, "test_list is empty"),
        ("mbpp", MBPP_ROW | {"task_id": None}, "task_id is missing"),
        ("mbpp_plus", MBPP_ROW, "the field test is missing"),
        ("mbpp", [1], "an object with fields"),
        ("mbpp", MBPP_ROW, "there is a problem 11 already"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_the_field_and_the_line(tmp_path, task, row, message):
    good = HUMANEVAL_ROW if task.startswith("humaneval") else PLUS_ROW if task == "mbpp_plus" else MBPP_ROW
    with pytest.raises(ValueError) as caught:
        problems.load(task, write_rows(tmp_path / "bad.jsonl", [good, row]))
    assert message in str(caught.value) and f"{tmp_path / 'bad.jsonl'}:2: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_problems_is_said(tmp_path):
    (tmp_path / "half.jsonl").write_text(json.dumps(MBPP_ROW)[:40])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    for name, message in (("half.jsonl", ":1: not readable as JSON"), ("empty.jsonl", "holds no problem"),
                          ("no.jsonl.gz", "no gzip file"), ("absent.jsonl", "cannot be read")):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            problems.load("mbpp", str(tmp_path / name))


def test_a_task_without_problems_of_its_own_says_where_they_are():
    with pytest.raises(ValueError, match="mbpp_plus=hf:evalplus/mbppplus:test"):
        problems.load("mbpp_plus", "mbpp=x.jsonl")


@pytest.mark.parametrize("files", ["a.jsonl; b.jsonl", "a.jsonl; a.jsonl", "humaneval=c.jsonl; a.jsonl; a.jsonl"])
def test_two_files_without_tasks_are_one_error_even_if_they_are_the_same(files):
    with pytest.raises(ValueError, match="^config.code.problems has 2 files for every task; name their tasks: mbpp=a.jsonl.$"):
        problems.load("mbpp", files)
