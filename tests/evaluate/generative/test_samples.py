"""Samples: a row's tokens are its own, whatever the batch, the number of rows, and however often it was stopped."""
import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from softmask_jax.convert.converted import Ids
from softmask_jax.evaluate.generative.samples import budgeted, check_model, entropies, write
from softmask_jax.evaluate.task import Stopped
from softmask_jax.samplers import Options
from tests.helpers import generated
from tests.helpers.fake_model import FakeModel
from tests.helpers.generated import work



@pytest.fixture(scope="module")
def model():
    return generated.home()[1]["soft"]


def made(folder, model, **given):
    return write(work(folder, generated.home()[0] / "soft", model, folder / "none", **given))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(where, samples)"""
    folder = tmp_path_factory.mktemp("whole")
    return folder, made(folder, model)


def test_rows_are_full_of_text_and_say_what_they_cost(model, whole):
    folder, found = whole
    assert found.tokens.shape == (12, 16) and not (found.tokens == model.mask_token_id).any()
    assert found.texts == [model.tokenizer.decode(row) for row in found.tokens]
    assert (found.filled == 16).all() and (found.calls >= 1).all() and (found.calls <= 5).all()
    assert len(np.unique(found.tokens, axis=0)) == 12
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(12)) and rows[3]["tokens"] == found.tokens[3].tolist()


def test_neither_the_batch_nor_the_number_of_rows_changes_a_row(model, whole, tmp_path):
    found = made(tmp_path, model, samples={"count": 7, "batch_size": 5})
    np.testing.assert_array_equal(found.tokens, whole[1].tokens[:7])


def test_a_stopped_writer_goes_on_with_the_same_rows(model, whole, tmp_path):
    with pytest.raises(Stopped):
        made(tmp_path, model, stop_after=1)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    # As a kill leaves it: the last rows of the batch are missing, one is half written.
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    found = made(tmp_path, model)
    np.testing.assert_array_equal(found.tokens, whole[1].tokens)
    np.testing.assert_array_equal(found.calls, whole[1].calls)


def test_logits_that_are_not_finite_are_an_error(model, tmp_path):
    params = model.params | {"backbone": model.params["backbone"] | {"head": {
        name: x * np.float32(np.nan) for name, x in model.params["backbone"]["head"].items()
    }}}  # fmt: skip
    with pytest.raises(ValueError, match="logits of sample 0 are NaN .* give another --config.models.step"):
        made(tmp_path, dataclasses.replace(model, params=params))


def test_rows_that_are_there_are_not_written_again(tmp_path):
    fake = FakeModel()
    first = made(tmp_path, fake)
    assert len(fake.seen) == 2 and fake.seen[0][0] == (8, 256)
    again = made(tmp_path, fake)
    assert len(fake.seen) == 2
    np.testing.assert_array_equal(again.tokens, first.tokens)


def test_rows_of_other_settings_are_refused(tmp_path):
    made(tmp_path, FakeModel())
    with pytest.raises(ValueError, match="made with other settings.*sampler.steps: 4 -> 2"):
        made(tmp_path, FakeModel(), sampler=Options(steps=2))
    with pytest.raises(ValueError, match="made with other settings.*seed: 11 -> 12"):
        made(tmp_path, FakeModel(), seed=12)


def test_another_seed_writes_other_rows(tmp_path):
    one, other = (made(tmp_path / str(seed), FakeModel(), seed=seed) for seed in (11, 12))
    assert (one.tokens != other.tokens).any(1).mean() > 0.5


def test_half_the_budget_takes_half_the_steps(tmp_path):
    fake = FakeModel()
    made(tmp_path, fake, budget=Fraction(1, 2), sampler=Options(steps=8))
    assert {options.steps for options in fake.options} == {4}


def test_texts_are_as_long_as_they_should_be(tmp_path):
    assert made(tmp_path / "short", FakeModel(), samples={"length": 9}).tokens.shape == (12, 9)
    assert made(tmp_path / "own", FakeModel(), samples={"count": 3}).tokens.shape == (3, 256)
    with pytest.raises(ValueError, match="config.samples.length is 257; .* takes 256"):
        made(tmp_path / "long", FakeModel(), samples={"length": 257})


def test_the_last_batch_is_as_large_as_the_others(tmp_path):
    fake = FakeModel()
    assert made(tmp_path, fake, samples={"count": 9}).tokens.shape == (9, 256)
    assert [shape for shape, *_ in fake.seen] == [(8, 256), (8, 256)]


@pytest.mark.parametrize("options, budget, steps", [
    (Options(), Fraction(1), None), (Options(), Fraction(1, 4), 32), (Options(steps=10), Fraction(1, 4), 2),
    (Options(steps=1), Fraction(1, 8), 1), (Options(alg="remdm_cap"), Fraction(1, 2), 64),
    (Options(alg="entropy"), Fraction(1, 2), 20),
])  # fmt: skip
def test_budgets_are_shares_of_the_samplers_own_steps(options, budget, steps):
    assert budgeted(options, 40, budget) == dataclasses.replace(options, steps=steps)


@pytest.mark.parametrize("options", [Options(alg="confidence_threshold"), Options(alg="entropy", tokens_per_step=2)])
def test_samplers_that_count_no_steps_have_no_budgets(options):
    assert budgeted(options, 40, Fraction(1)) == options
    with pytest.raises(ValueError, match="leave config.run.budgets at 1"):
        budgeted(options, 40, Fraction(1, 2))


def test_entropy_is_that_of_a_rows_own_tokens_in_nats():
    rows = np.array([[1, 2, 3, 4], [5, 5, 5, 5], [1, 1, 2, 2], [7, 7, 7, 1]])
    expected = [math.log(4), 0.0, math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    np.testing.assert_allclose(entropies(rows), expected, atol=1e-15)


def test_models_whose_ids_are_no_text_are_refused(model):
    check_model(model)
    with pytest.raises(ValueError, match="without a tokenizer"):
        check_model(dataclasses.replace(model, tokenizer=Ids(258, 257)))
