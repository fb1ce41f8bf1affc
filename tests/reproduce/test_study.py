"""The study's parts: its runs, puzzles, n-gram model and measure of Python, against plain computations."""
import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from softmask_jax.reproduce import puzzles, study, summary
from softmask_jax.reproduce.ngram import NGrams
from softmask_jax.reproduce.texts import parses
from tests.helpers.commands import command_module

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", params=["default", "gpu"])
def runs(request, tmp_path_factory):
    return study.runs(study.SIZES[request.param], tmp_path_factory.mktemp("study"))


def test_runs_come_after_what_they_start_from_and_cost_what_they_claim(runs):
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert all(names.index(f"{run.part}-base") <= names.index(run.name) for run in runs)
    by_name = {run.name: run for run in runs}
    for run in (run for run in runs if run.recipe != study.BASE):
        binary, soft = (by_name[f"{run.part}-{name}-{run.seed}"] for name in ("binary", "soft"))
        if run.recipe.equal_updates:
            assert run.config.updates == soft.config.updates < binary.config.updates
        else:
            assert run.flops == pytest.approx(binary.flops, rel=2e-3)


def test_every_recipe_differs_from_soft_masking_by_what_its_name_says(runs):
    soft = next(run for run in runs if run.name == "text-soft-1").config.soft_mask
    soft_masked = (run for run in runs if run.part == "text" and run.soft and run.seed == 1)
    changed = {run.recipe.name: run.config.soft_mask for run in soft_masked}
    assert changed["k_1"].k == 1 and changed["p_sm_1"].p_sm == 1 and changed["paper_start"].init_scale == 0
    assert [name for name, one in changed.items() if one == soft] == ["soft"]


def test_there_are_288_grids_and_no_wrong_answer_is_right():
    grids = puzzles.grids()
    assert len(set(grids)) == len(grids) == 288
    for puzzle, answer in puzzles.draw(1, 40, (3, 12)):
        assert 3 <= sum(cell != "." for cell in puzzle) <= 12 and puzzles.is_right(puzzle, answer)
        fitting = [grid for grid in grids if all(a in (".", b) for a, b in zip(puzzle, grid))]
        assert all(puzzles.is_right(puzzle, grid) for grid in fitting)
        assert not any(puzzles.is_right(puzzle, grid) for grid in grids if grid not in fitting)
        i, j = (index for index, cell in itertools.islice(((i, c) for i, c in enumerate(puzzle) if c == "."), 2))
        swapped = list(answer)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        assert puzzles.is_right(puzzle, "".join(swapped)) == ("".join(swapped) in grids)
    assert not any(puzzles.is_right("." * 16, wrong) for wrong in ("", "1" * 16, "1234" * 4, grids[0][:15], "x" * 16))


def test_the_n_gram_model_is_that_of_witten_and_bell():
    random, size = np.random.default_rng(0), 5
    windows, asked = random.integers(0, size - 1, (20, 9)), random.integers(0, size, (4, 7))
    after = {(): Counter(range(size))}  # token 4 is in no window
    for row in windows.tolist():
        for i, n in itertools.product(range(len(row)), range(3)):
            if i >= n:
                after.setdefault(tuple(row[i - n : i]), Counter())[row[i]] += 1

    def p(token, context):
        counts = after.get(context, Counter())
        total, kinds = sum(counts.values()), len(counts)
        if not context:
            return counts[token] / total
        lower = p(token, context[1:])
        return (counts[token] + kinds * lower) / (total + kinds) if total else lower

    plain = [[-np.log(p(row[i], tuple(row[max(0, i - 2) : i]))) for i in range(1, 7)] for row in asked.tolist()]
    np.testing.assert_allclose(NGrams(windows, size, order=3)(asked), plain, rtol=1e-12)


@pytest.mark.parametrize("text, share", [
    ("a = 1\nb = 2", 1.0), ("    x = 1\n    return x\n", 1.0), ("if a:", 1.0),
    ("ef f(x):\n    y = x\n    z = y", 2 / 3), ("a b c\nd e f", 0.0), ("", 0.0), ("x = (\n1 +\ny = 2", 1 / 3),
])  # fmt: skip
def test_the_longest_run_of_lines_that_parses_is_counted(text, share):
    assert parses(text) == pytest.approx(share)


def test_the_page_of_the_configs_shows_the_stored_results():
    report = json.loads((ROOT / "configs" / "reproduction" / "results.json").read_text("utf-8"))
    page = (ROOT / "configs" / "README.md").read_text("utf-8")
    assert all(table in page for table in summary.tables(report).values())
    # The first page shows three lines of the puzzles.
    first_page = (ROOT / "README.md").read_text("utf-8")
    for recipe, feedback in (("binary", False), ("soft", True)):
        rows = [row for row in report["answers"] if (row["recipe"], row["feedback"]) == (recipe, feedback)]
        assert " | ".join(f"{100 * row['right']['value']:.1f}" for row in rows) in first_page
    for row in report["answer_differences"]:
        if (row["recipe"], row["feedback"]) == ("soft", True) and row["steps"]:
            value, low, high = (f"{100 * row['over_seeds'][name]:+.1f}" for name in ("value", "low", "high"))
            assert f"**{value}** [{low}, {high}]" in first_page
    assert report["sizes"] == json.loads(json.dumps(dataclasses.asdict(study.SIZES["default"])))


def test_a_folder_that_cannot_be_made_is_one_line(capsys):
    assert command_module("softmask_jax.reproduce").main(["--out=/proc/x", "--smoke"]) == 1
    error = capsys.readouterr().err
    assert error.endswith("while writing /proc/x. Give another --out.\n") and error.count("\n") == 1
