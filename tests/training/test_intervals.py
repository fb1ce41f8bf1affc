"""Intervals: the quantiles of published tables, their rate where observations are few, none for a single one."""
import dataclasses
import json

import numpy as np
import pytest

from softmask_jax import main
from softmask_jax.evaluate import comparison
from softmask_jax.evaluate.task import Estimate
from softmask_jax.training import intervals, tracking
from softmask_jax.training.perplexity import Nats


# Quantiles .975 of Student's t: Fisher and Yates, table III.
@pytest.mark.parametrize("count, quantile", [(2, 12.706), (3, 4.303), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)])
def test_the_width_is_students(count, quantile):
    assert intervals.student(1.0, 2.0, count) == pytest.approx((1 - 2 * quantile, 1 + 2 * quantile), abs=2e-3)


def test_with_many_observations_it_is_the_normal_one():
    assert intervals.student(0.0, 1.0, 1_000_000) == pytest.approx((-1.95996, 1.95996), abs=1e-5)


def _of_mean(values):
    found = Estimate.of_mean(values)
    return found.low, found.high


def _of_ratio(values):
    found = Estimate.of_ratio(values, np.ones(len(values)))
    return found.low, found.high


WAYS = {
    "mean": _of_mean, "ratio": _of_ratio, "windows": lambda values: Nats(values, 1).interval(),
    "paired": lambda values: Nats(values + 7.0, 1).interval(Nats(np.full(len(values), 7.0), 1)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_95_percent_of_intervals_hold_the_truth_however_few_observations_there_are(way, count):
    random, total = np.random.default_rng(count), 1_500
    found = np.array([WAYS[way](random.normal(3.0, 2.0, count)) for _ in range(total)])
    # Of 1,500 with a chance of .95 between 93.3 and 96.7 %, but for one time in 400.
    assert 0.933 < ((found[:, 0] <= 3.0) & (found[:, 1] >= 3.0)).mean() < 0.967


@pytest.mark.parametrize("way", WAYS)
def test_a_single_observation_has_no_interval(way):
    assert WAYS[way](np.array([3.0])) == (None, None)


def test_a_single_validation_window_leaves_the_ends_out_of_rows_and_of_what_is_printed(tmp_path):
    one, two = Nats(np.array([32.0]), 16), Nats(np.array([24.0]), 16)
    row = tracking.scores({"one_pass": one, "two_pass": two})
    assert json.dumps(row, allow_nan=False) and not any("low" in name or "high" in name for name in row)
    counted = row | {"windows": 1, "windows_in_split": 20}
    said = main.report({"step": 3, "validation": counted, "samples": []}, str(tmp_path))
    assert "\n  taken on 1 of 20 windows, each masked once\n" in said
    assert "NELBO 2.0000 nats" in said and "same masks: +0.5000 nats" in said
    estimates = {"one_pass": comparison._estimate(one), "two_pass": comparison._estimate(two)}
    run = {"nelbo": estimates, "path": "a", "step": 1, "planned_steps": 1, "forwards_per_step": 3.0, "flops": 1.0}
    (_, rows), (_, differences) = comparison.tables({"runs": {"a": run}, "differences": {"d": comparison._estimate(two, one)}})
    assert rows[0][-2:] == ("2.0000", "1.5000") and differences == [("d", "-0.5000", "no interval")]


def test_an_interval_of_an_estimate_is_mapped_with_it():
    found = Estimate.of_mean([1.0, 2.0, 3.0]).mapped(lambda x: 2 * x)
    assert dataclasses.astuple(found)[:3] == pytest.approx((4.0, 4 - 2 * 4.3027 / 3**0.5, 4 + 2 * 4.3027 / 3**0.5), abs=1e-3)
