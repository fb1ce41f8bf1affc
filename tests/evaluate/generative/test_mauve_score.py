"""MAUVE is the library's, of features given, and silent."""
import importlib.util

import numpy as np
import pytest

from softmask_jax.evaluate.generative import mauve_score
from softmask_jax.evaluate.generative.mauve_score import mauve

pytest.importorskip("mauve")
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(60, 8)).astype(np.float32)


def test_it_is_what_the_library_says_of_the_same_features():
    from mauve import compute_mauve

    other = FEATURES + RANDOM.normal(0, 0.7, FEATURES.shape).astype(np.float32)
    direct = compute_mauve(p_features=FEATURES, q_features=other, verbose=False)
    found = mauve(FEATURES, other)
    assert (found.value, found.star, found.frontier_integral) == (direct.mauve, direct.mauve_star, direct.frontier_integral)
    assert found.buckets == direct.num_buckets == 6
    assert 0.05 < found.value < 1
    direct = compute_mauve(p_features=FEATURES, q_features=other, mauve_scaling_factor=2, seed=3, num_buckets=9)
    assert mauve(FEATURES, other, scaling=2, seed=3, buckets=9).value == direct.mauve


def test_equal_texts_have_one_and_disjoint_ones_next_to_nothing():
    assert mauve(FEATURES, FEATURES.copy()).value == pytest.approx(1.0)
    assert mauve(FEATURES, FEATURES - 50).value < 0.05


def test_two_clusters_have_the_value_that_their_shares_say():
    near, far = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])

    def side(first: int, second: int) -> np.ndarray:
        points = np.repeat(np.concatenate([near, far]), [first, second], axis=0)
        return (points + RANDOM.normal(0, 1e-3, points.shape)).astype(np.float32)

    p, q, scaling = np.array([0.75, 0.25]), np.array([0.4, 0.6]), 5.0
    weights = np.linspace(1e-6, 1 - 1e-6, 25)
    mixed = weights[:, None] * p + (1 - weights)[:, None] * q
    x, y = (np.exp(-scaling * (of * np.log(of / mixed)).sum(1)) for of in (q, p))
    x, y = np.array([1.0, *x, 0.0]), np.array([0.0, *y, 1.0])
    # The area below the curve, from its corner to the other, both ways round.
    area = 0.5 * (abs(np.trapezoid(y, x)) + abs(np.trapezoid(x, y)))
    found = mauve(side(15, 5), side(8, 12), buckets=2)
    assert found.value == pytest.approx(area, rel=1e-6)


def test_it_prints_nothing(capfd):
    mauve(FEATURES, FEATURES[::-1].copy())
    assert capfd.readouterr() == ("", "")


def test_more_clusters_than_texts_are_refused():
    with pytest.raises(ValueError, match="mauve_buckets is 9, more than the 4 \\+ 4 texts"):
        mauve(FEATURES[:4], FEATURES[4:8], buckets=9)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else object())
    with pytest.raises(ImportError, match=r"pip install 'softmask_jax\[eval\]'"):
        mauve_score.check_installed()
