"""How t is stratified, and what becomes of rows: every draw uniform, all together even, ratios and intervals right."""
import numpy as np
import pytest

from softmask_jax.evaluate.perplexity.estimates import cross_entropy_by_t, differences, estimates
from softmask_jax.evaluate.perplexity.mask_draws import of_the_reference, stratified
from softmask_jax.evaluate.perplexity.records import Columns, columns
from softmask_jax.evaluate.task import Estimate, pieces


def test_all_draws_together_take_every_stratum_once_and_each_window_one_of_every_part():
    strata = stratified(50, 4, seed=0)
    np.testing.assert_array_equal(np.sort(strata.stratum.ravel()), np.arange(200))
    np.testing.assert_array_equal(np.sort(strata.stratum // 50, 1), np.tile(np.arange(4), (50, 1)))
    assert (strata.count == 200).all()


def test_the_first_draw_of_the_first_window_may_be_anywhere():
    places = [stratified(10, 3, seed).stratum[0, 0] for seed in range(3000)]
    counts = np.bincount(places, minlength=30)
    assert len(counts) == 30 and ((counts - 100) ** 2 / 100).sum() < 60  # chi squared of 29 degrees, p = 0.0006


def test_other_seeds_draw_otherwise_and_the_same_seed_alike():
    first, again, other = (stratified(20, 2, seed).stratum for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_joint_strata_make_the_mean_of_a_curve_of_t_more_exact_than_strata_of_each_window():
    """Of 1/t-like curves times how hard a window is."""
    random, hard = np.random.default_rng(0), np.random.default_rng(1).uniform(0.6, 1.4, 40)
    curve = lambda t: hard[:, None] / (0.05 + t)  # noqa: E731
    exact = hard.mean() * np.log(1.05 / 0.05)
    joint, alone = [], []
    for seed in range(200):
        r = random.random((40, 4))
        strata = stratified(40, 4, seed)
        joint.append(curve((strata.stratum + r) / strata.count).mean())
        alone.append(curve((np.arange(4) + r) / 4).mean())
    assert np.std(joint) < 0.6 * np.std(alone)
    assert abs(np.mean(joint) - exact) < 3 * np.std(joint) / np.sqrt(200)


def test_the_references_strata_are_those_of_a_batch_and_the_last_one_has_fewer():
    strata = of_the_reference(10, 4)
    assert strata.stratum[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert strata.count[:, 0].tolist() == [4] * 8 + [2] * 2
    assert of_the_reference(3, 4).count[:, 0].tolist() == [3] * 3 and of_the_reference(4, 4).count[-1, 0] == 4


def test_pieces_are_every_window_under_every_draw_once():
    keys = [key for piece in pieces(np.array([0, 3, 6, 9, 12]), 3, 2) for key in piece.keys]
    assert sorted(keys) == [(number, draw) for number in (0, 3, 6, 9, 12) for draw in range(3)]
    assert next(pieces(np.array([5, 7]), 1, 8)).filled(5).tolist() == [5, 7, 5, 7, 5]


def crafted(windows=6, draws=2, passes=("one_pass", "two_pass"), seed=0) -> Columns:
    random = np.random.default_rng(seed)
    values = {"t": random.uniform(0.01, 1, (windows, draws)), "masked": random.integers(1, 16, (windows, draws)) + 0.0}
    for name in passes:
        values[name] = random.normal(30, 3, (windows, draws))
        values[f"{name}_cross_entropy"] = random.normal(20, 3, (windows, draws))
    return Columns(np.arange(windows), values)


def test_rows_come_back_as_columns_in_whatever_order_they_were_written():
    rows = [{"index": i, "sample": s, "t": i + s / 10} for s in (1, 0) for i in (4, 0, 2)]
    found = columns(rows, 2)
    assert found.numbers.tolist() == [0, 2, 4] and found.values["t"].tolist() == [[0.0, 0.1], [2.0, 2.1], [4.0, 4.1]]


def test_a_window_counts_once_however_many_draws_it_has():
    found = crafted()
    means = found.values["two_pass"].mean(1) / 16
    assert estimates(found, "nelbo", 16, "nats")["nelbo"] == Estimate.of_mean(means, unit="nats", better="lower")
    assert estimates(found, "nelbo", 16, "nats")["nelbo"].count == 6


def test_a_coin_between_the_passes_comes_first_where_there_is_one():
    found = crafted()
    found.values["mixed"] = np.where(np.arange(6)[:, None] % 2, found.values["two_pass"], found.values["one_pass"])
    made = estimates(found, "loss", 1, "nats")
    assert list(made) == ["loss", "one_pass/loss", "two_pass/loss", "gain/loss"]
    assert made["loss"].value == pytest.approx(found.values["mixed"].mean())
    assert made["two_pass/loss"].value == pytest.approx(found.values["two_pass"].mean())


def test_cross_entropy_by_t_is_nats_over_masked_tokens_of_each_part():
    found = crafted()
    t, masked = found.values["t"], found.values["masked"]
    made = cross_entropy_by_t(found, 3)
    np.testing.assert_allclose([row["t"] for row in made], [[0, 1 / 3], [1 / 3, 2 / 3], [2 / 3, 1]])
    assert sum(row["rows"] for row in made) == 12 and sum(row["masked"] for row in made) == masked.sum()
    for row in made:
        here = (row["t"][0] <= t) & (t < row["t"][1])
        for name in ("one_pass", "two_pass"):
            nats = found.values[f"{name}_cross_entropy"][here].sum()
            assert row[name]["value"] == pytest.approx(nats / masked[here].sum())
            assert row[name]["low"] < row[name]["value"] < row[name]["high"]


def test_parts_of_t_without_a_mask_are_left_out_and_one_window_has_no_interval():
    values = {"t": 1.0, "one_pass": 1.0, "one_pass_cross_entropy": 1.0, "masked": 4.0}
    values = {name: np.array([[value]]) for name, value in values.items()}
    (row,) = cross_entropy_by_t(Columns(np.array([0]), values), 5)
    assert row == {"t": [0.8, 1.0], "rows": 1, "masked": 4, "one_pass": {"value": 0.25, "low": None, "high": None}}


def test_intervals_of_the_cross_entropy_by_t_cover_at_their_rate():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        masked = random.integers(1, 200, (60, 1)) + 0.0
        # A window's difficulty is shared by all of its tokens.
        nats = masked * random.normal(2.0, 0.5, (60, 1))
        values = {"t": np.full((60, 1), 0.5), "masked": masked, "one_pass": nats, "one_pass_cross_entropy": nats}
        (row,) = cross_entropy_by_t(Columns(np.arange(60), values), 1)
        covered += row["one_pass"]["low"] <= 2.0 <= row["one_pass"]["high"]
    assert 0.91 < covered / 400 < 0.98


def test_differences_need_the_same_windows_and_masks():
    a, b = crafted(), crafted()
    b.values["two_pass"] = a.values["two_pass"] - 16.0
    made = differences(a, b, "nelbo", 16, "nats")
    assert made["nelbo"].value == pytest.approx(-1.0) and made["nelbo"].high == pytest.approx(-1.0)
    assert made["one_pass/nelbo"].value == 0.0 and made["gain/nelbo"].value == pytest.approx(1.0)
    b.values["masked"] = a.values["masked"] + 1
    assert differences(a, b, "nelbo", 16, "nats") == {}
    assert differences(a, crafted(seed=1), "nelbo", 16, "nats") == {}
    assert differences(a, Columns(a.numbers + 1, a.values), "nelbo", 16, "nats") == {}
