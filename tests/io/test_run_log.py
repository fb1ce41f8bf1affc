"""Folders of runs as they are found: whole, still going on, damaged, or no runs at all."""
import json
import math

import numpy as np
import pytest

from softmask_jax.io import run_log
from tests.helpers import crafted_run


def test_rows_become_columns_by_kind(tmp_path):
    run = run_log.read(crafted_run.write(tmp_path / "run"))
    steps, loss = run.column("train", "loss")
    assert steps.tolist() == list(range(10, 101, 10)) and loss[0] == crafted_run.train_row(10, True)["loss"]
    assert run.column("validation", "two_pass/nelbo")[0].tolist() == [50, 100]
    assert run.column("train", "absent")[0].shape == (0,)
    assert run.name == "run" and run.step == 100 and run.planned == 100 and run.finished and run.soft_masked
    assert run.histogram["step"] == 100 and [row["step"] for row in run.samples] == [50, 100] and not run.notes


def test_tokens_and_flops_count_what_was_trained(tmp_path):
    for soft, passes in ((True, 3.8), (False, 3.0)):
        run = run_log.read(crafted_run.write(tmp_path / str(soft), soft=soft))
        assert run.tokens([10, 20]).tolist() == [1280, 2560]
        np.testing.assert_allclose(run.flops([0, 50, 100]), np.array([0, 50, 100]) * 128 * passes * 7.0)


def test_a_run_without_speeds_does_not_tell_its_flops(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    (path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0, "two_pass_share": 0.5}\n')
    assert run_log.read(path).flops([1]) is None


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    run = run_log.read(crafted_run.write(tmp_path / "run", finished=False, train__steps=400))
    assert not run.finished and run.step == 100 and run.planned == 400 and run.summary is None


def test_a_finished_run_that_goes_on_is_not_finished(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(crafted_run.train_row(110, True)) + "\n")
    run = run_log.read(path)
    assert not run.finished and run.step == 110


@pytest.mark.parametrize(
    "value, wanted",
    [(1, 1.0), ("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf), (1e200, math.inf), (10**400, math.inf),
     (-1e200, -math.inf), (True, None), ("3.5", None), (None, None), ([1], None)],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(value, wanted):
    found = run_log.number(value)
    assert found is None if wanted is None else np.array_equal(found, wanted, equal_nan=True)


def test_damaged_lines_are_left_out_and_named(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    steps = '{"kind": "train"}', '{"step": "3", "kind": "train"}', '{"step": -1, "kind": "train"}'
    lines = ["{", "[1]", *steps, "[" * 9999, '\udcff', "", '{"step": 120, "kind": "train", "loss": 1.0}', '{"step": 1']
    with open(path / "metrics.jsonl", "ab") as file:
        file.write("\n".join(lines).encode(errors="surrogateescape"))
    run = run_log.read(path)
    assert run.column("train", "loss")[0][-1] == 120
    assert run.notes == ["8 lines of metrics.jsonl (16, 17, 18, 19, 20, ...) can't be read and are left out."]


def test_values_that_are_not_finite_are_counted(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "kind": "train", "loss": "nan", "grad_norm": "inf"}\n')
    assert run_log.read(path).notes == ["2 values are not finite, the first one loss at step 110."]


def test_what_is_missing_is_said(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    for name in ("config.json", "summary.json"):
        (path / name).write_text("{")
    (path / "versions.json").unlink()
    run = run_log.read(path)
    assert run.notes == [
        "config.json is damaged: the settings are unknown.",
        "There is no versions.json: versions and device are unknown.",
        "summary.json is damaged and left out.",
    ]
    assert run.config == {} and run.planned is None and run.tokens([1]) is None and not run.soft_masked
    (path / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl, so there are no curves." in run_log.read(path).notes


def test_a_config_of_another_version_still_tells_its_steps(tmp_path):
    path = crafted_run.write(tmp_path / "run")
    (path / "config.json").write_text(json.dumps({"train": {"steps": 70, "nonsense": 1}, "extra": 3}))
    assert run_log.read(path).planned == 70


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="No run in .*neither config.json nor metrics.jsonl.*--workdir"):
            run_log.read(path)
