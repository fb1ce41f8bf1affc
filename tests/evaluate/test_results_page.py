"""The first sentences of an evaluation's page."""
import pytest

from softmask_jax.evaluate import results_page

NATS = {"unit": "nats/token", "better": "lower", "name": "nelbo"}
SCORE = {"unit": "%", "better": "higher", "name": "pass@1"}


@pytest.mark.parametrize("row, said", [
    (NATS | {"value": -0.02, "low": -0.03, "high": -0.01}, "b, t: 2.0 % lower perplexity than a on the same masks [1.0, 3.0]."),
    (SCORE | {"value": -4.0, "low": -5.0, "high": -3.0},
     "t: a is better than b in pass@1: b - a = -4 [-5, -3] %, higher is better."),
    (SCORE | {"value": 1.0, "low": -1.0, "high": 3.0}, "t: no measurable difference between b and a in pass@1: 1 [-1, 3] %."),
])  # fmt: skip
def test_a_page_opens_with_what_the_intervals_bear(row, said):
    single = {"task": "t", "budget": "1", "model": "a", "estimates": {"pass@1": SCORE | {"value": 10.0, "low": 5.0, "high": 20.0}}}
    report = {"results": [single], "differences": []}
    assert results_page.verdicts(report) == ["a, t: pass@1 10 [5, 20] %, higher is better."]
    less, other = ({"task": "t", "baseline": "a", "model": "b", "budget": budget, **row} for budget in ("1/2", "1"))
    later = other | {"name": "second", "value": 9.0}
    assert results_page.verdicts(report | {"differences": [less | {"value": 7.0}, other, later]}) == [said]
