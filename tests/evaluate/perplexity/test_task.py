"""The task "perplexity": exact for models with a known answer, the same whatever is killed, batched or sharded."""
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import data
from softmask_jax.diffusion import noise, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.evaluate.perplexity.task import Validation
from softmask_jax.evaluate.settings import Perplexity, Settings
from softmask_jax.evaluate.task import Stopped
from tests.diffusion.test_nelbo import CASES, golden_model, noisy_batch, recorded
from tests.evaluate.test_compare import write_run
from tests.helpers import tiny_run, validated
from tests.helpers.validated import columns, predicting, work

T_EPS = NOISE_EPS = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on the same text, soft-masked and binary."""
    at = tmp_path_factory.mktemp("validation")
    tiny_run.write_texts(at / "texts")
    write_run(at / "soft", at, 6, seed=1)
    write_run(at / "binary", at, 6, seed=0, soft_mask__variant="none")
    return at


@pytest.fixture(scope="module")
def models(folder):
    return {name: softmask_jax.load(folder / name) for name in ("soft", "binary")}


@pytest.fixture(scope="module")
def windows(models):
    """int32 [W L] of the validation split."""
    split = data.build(models["soft"].config.data).validation
    return split.gather(np.arange(len(split)))


@pytest.fixture(scope="module")
def soft(folder, models):
    """The soft-masked run measured as a whole: (work, result)."""
    made = work(folder / "whole", folder / "soft", models["soft"])
    return made, Validation().run(made)


def test_a_model_that_predicts_all_tokens_alike_has_its_exact_bound(folder, models):
    made = work(folder / "uniform", folder / "soft", predicting(models["soft"], np.zeros(258)), draws=8)
    estimates = Validation().run(made).estimates
    found = columns(made)
    # Bytes, BOS and EOS: 257 tokens beside the mask, each 1/t times as heavy as it is.
    np.testing.assert_allclose(found.one_pass, found.masked * np.log(257) / found.t, rtol=1e-5)
    np.testing.assert_allclose(found.two_pass_cross_entropy, found.masked * np.log(257), rtol=1e-5)
    exact = (1 - NOISE_EPS) * np.log(257)
    assert estimates["nelbo"].low < exact < estimates["nelbo"].high < estimates["nelbo"].low + 1.0
    assert estimates["perplexity"].low == pytest.approx(np.exp(estimates["nelbo"].low))
    assert abs(estimates["gain/nelbo"].value) < 1e-5


class Letters(data.ByteTokenizer):
    kind = "text8"


def test_bits_per_character_are_of_the_text_alone_and_with_compat_of_bos_and_eos_too(folder, models, windows):
    model = dataclasses.replace(models["soft"], tokenizer=Letters())
    for compat in (False, True):
        made = work(folder / f"bits_{compat}", folder / "soft", model, compat=compat, max_windows=5)
        estimates, found = Validation().run(made).estimates, columns(made)
        of_text = windows[found.numbers] < 256
        count = windows[found.numbers].size if compat else of_text.sum()
        assert 0 < of_text.sum() <= 5 * (windows.shape[1] - 2) < windows[found.numbers].size
        for name, sums in (("", found.two_pass), ("one_pass/", found.one_pass)):
            bits = estimates[f"{name}bits_per_character"]
            assert bits.value == pytest.approx(sums.mean(1).sum() / np.log(2) / count)
            assert bits.low < bits.value < bits.high and bits.unit == "bits" and bits.count == 5


def test_a_unigram_models_bound_is_the_cross_entropy_of_its_unigrams(folder, models, windows):
    log_p = np.random.default_rng(0).normal(0, 2, 257)
    log_p -= np.log(np.exp(log_p).sum())
    made = work(folder / "unigram", folder / "binary", predicting(models["binary"], log_p), draws=32)
    estimate = Validation().run(made).estimates["nelbo"]
    exact = -(1 - NOISE_EPS) * log_p[windows].mean()
    assert estimate.low < exact < estimate.high
    # Strata make the mean over draws closer than windows taken one by one would.
    assert abs(estimate.value - exact) < 0.02 * exact


def test_soft_masked_models_have_two_passes_and_what_they_gain(soft, folder, models):
    estimates = soft[1].estimates
    assert list(estimates) == ["perplexity", "nelbo", "one_pass/perplexity", "one_pass/nelbo", "gain/nelbo"]
    gain = estimates["one_pass/nelbo"].value - estimates["nelbo"].value
    assert estimates["gain/nelbo"].value == pytest.approx(gain) and gain != 0
    assert estimates["gain/nelbo"].high - estimates["gain/nelbo"].low < estimates["nelbo"].high - estimates["nelbo"].low
    assert soft[1].cost == {"calls": 4}
    binary = Validation().run(work(folder / "binary-alone", folder / "binary", models["binary"]))
    assert list(binary.estimates) == ["perplexity", "nelbo"] and binary.cost == {"calls": 2}


def test_the_bound_is_that_of_the_objective_on_the_same_masks(soft, models, windows):
    """Two windows, recomputed by the objective's own function of two passes from the recorded t."""
    found, model, key = columns(soft[0]), models["soft"], jax.random.key(validated.SEED)

    @jax.jit
    def nelbo(xt, t):
        noisy = model.objective.noisy(windows[:2], xt, t, model.mask_token_id)
        feedback = two_pass.pass_1(model.denoiser, model.soft_mask, model.params, xt)
        return {
            name: (two_pass.token_nll(model.denoiser, model.soft_mask, model.params, noisy, given) * noisy.weights).sum(-1) * 16
            for name, given in (("one_pass", None), ("two_pass", feedback))
        }

    for draw in range(2):
        of_draw = jax.random.fold_in(jax.random.fold_in(key, noise.Stream.MASK), draw)
        u = np.stack([jax.random.uniform(jax.random.fold_in(of_draw, row), (16,)) for row in range(2)])
        t = found.t[:2, draw].astype(np.float32)
        masked = u < (1 - NOISE_EPS) * t[:, None]
        np.testing.assert_array_equal(masked.sum(1), found.masked[:2, draw])
        for name, nats in nelbo(np.where(masked, model.mask_token_id, windows[:2]).astype(np.int32), t).items():
            np.testing.assert_allclose(nats, getattr(found, name)[:2, draw], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_rows_are_the_references_recorded_likelihoods(case):
    variant, k = CASES[case]
    model, noisy = golden_model.model(variant), noisy_batch()
    scores = jax.jit(lambda p: two_pass.row_scores(model, SoftMask(variant, k), p, noisy))(golden_model.params())
    name = "one_pass" if variant == "none" else "two_pass"
    np.testing.assert_allclose(np.asarray(scores.loss[name]) * noisy.x0.shape[1], recorded()[f"{case}/nll_per_token"].sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(scores.masked, (recorded()["xt"] == golden_model.MASK).sum(-1))


def test_a_stopped_evaluation_goes_on_to_the_same_numbers_to_the_bit(soft, folder, models):
    for times in (3, 2):
        with pytest.raises(Stopped):
            Validation().run(work(folder / "stopped", folder / "soft", models["soft"], stop_after=times))
    path = folder / "stopped" / "validation.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5 * 8
    # A kill within a write leaves a part of a batch, and half of a line.
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    made = work(folder / "stopped", folder / "soft", models["soft"])
    assert Validation().run(made) == soft[1]
    both = [sorted((one.folder / "validation.jsonl").read_text().splitlines()) for one in (made, soft[0])]
    assert both[0] == both[1]


def test_a_finished_record_is_read_and_not_made_again(soft, folder, models):
    assert Validation().run(work(soft[0].folder, folder / "soft", models["soft"], stop_after=0)) == soft[1]


def test_batches_and_devices_change_no_draw_and_no_number(soft, folder, models):
    wanted = columns(soft[0])
    spread = softmask_jax.load(folder / "soft", mesh=validated.mesh(8))
    threes, eight = (models["soft"], {"batch_size": 3}), (spread, {"devices": 8, "batch_size": 9})
    for name, (model, more) in {"threes": threes, "eight": eight}.items():
        made = work(folder / name, folder / "soft", model, **more)
        Validation().run(made)
        found = columns(made)
        np.testing.assert_array_equal(found.masked, wanted.masked)
        for column in ("t", "one_pass", "two_pass"):
            np.testing.assert_allclose(getattr(found, column), getattr(wanted, column), rtol=1e-4)


def test_compat_is_the_references_protocol_recomputed_by_hand(folder, models, windows):
    log_p = np.random.default_rng(1).normal(0, 1, 257)
    log_p -= np.log(np.exp(log_p).sum())
    model = predicting(models["soft"], log_p)
    made = work(folder / "compat", folder / "soft", model, compat=True, batch_size=6)
    result = Validation().run(made)
    key, total = jax.random.key(validated.SEED), 0.0
    streams = [jax.random.fold_in(jax.random.fold_in(key, number), 0) for number in (0, 1)]
    for start in range(0, len(windows), 6):
        batch = windows[start : start + 6]
        for row, tokens in enumerate(batch):
            r = float(jax.random.uniform(jax.random.fold_in(streams[0], start + row)))
            t = (1 - T_EPS) * (r + row) / len(batch) + T_EPS
            u = jax.random.uniform(jax.random.fold_in(streams[1], start + row), (16,))
            masked = np.asarray(u) < (1 - NOISE_EPS) * t
            total -= log_p[tokens[masked]].sum() / t
    nelbo = total / windows.size
    assert result.estimates["nelbo"].value == pytest.approx(nelbo, rel=1e-4)
    assert result.estimates["perplexity"].value == pytest.approx(np.exp(nelbo), rel=1e-3)
    assert "reference" in result.notes[0] and columns(made).t.shape == (len(windows), 1)


def test_differences_are_paired_window_by_window(soft, folder, models):
    base = work(folder / "base", folder / "binary", models["binary"])
    mean = Validation().run(base).estimates["nelbo"]
    made = Validation().compare(base, soft[0])
    assert list(made) == ["nelbo", "one_pass/nelbo"]
    assert made["nelbo"].value == pytest.approx(soft[1].estimates["nelbo"].value - mean.value)
    assert made["one_pass/nelbo"].value == pytest.approx(soft[1].estimates["one_pass/nelbo"].value - mean.value)
    # What the masks make hard is hard for both models.
    assert made["nelbo"].high - made["nelbo"].low < 0.5 * (mean.high - mean.low)
    same = Validation().compare(soft[0], soft[0])
    assert {(one.value, one.low, one.high) for one in same.values()} == {(0.0, 0.0, 0.0)} and "gain/nelbo" in same


def test_records_of_other_draws_or_unfinished_ones_are_not_compared(soft, folder, models):
    other = work(folder / "seeded", folder / "soft", models["soft"], seed=8)
    Validation().run(other)
    assert Validation().compare(other, soft[0]) == {}
    begun = work(folder / "begun", folder / "soft", models["soft"], stop_after=2)
    with pytest.raises(Stopped):
        Validation().run(begun)
    assert Validation().compare(begun, soft[0]) == {}
    assert Validation().compare(work(folder / "nothing", folder / "soft", models["soft"]), soft[0]) == {}


def test_a_record_that_was_damaged_later_is_not_compared_and_is_named(soft, folder, models, caplog):
    made = work(folder / "damaged", folder / "soft", models["soft"])
    shutil.copytree(soft[0].folder, made.folder, dirs_exist_ok=True)
    record = made.folder / "validation.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    for damage, said in ((lines[:-1], "rows not there: 1"), (["garbage\n", *lines[1:]], "Expecting value")):
        record.write_text("".join(damage))
        assert Validation().compare(made, soft[0]) == {}
        assert f"{record} is damaged ({said}" in caplog.text


def test_other_settings_do_not_continue_a_record(soft, folder, models):
    with pytest.raises(ValueError, match="other settings.*draws: 2 -> 3"):
        Validation().run(work(soft[0].folder, folder / "soft", models["soft"], draws=3))


def test_a_model_that_is_not_finite_is_an_error_and_no_number(folder, models):
    broken = predicting(models["soft"], np.full(258, np.nan))
    with pytest.raises(ValueError, match="not finite at step 6"):
        Validation().run(work(folder / "broken", folder / "soft", broken))


def test_few_windows_are_spread_over_the_split(folder, models, windows):
    made = work(folder / "few", folder / "soft", models["soft"], max_windows=9)
    assert Validation().run(made).estimates["nelbo"].count == 9
    np.testing.assert_array_equal(columns(made).numbers, np.arange(9) * len(windows) // 9)


@pytest.mark.parametrize("wrong", [
    ({"draws": 0}, "draws is 0"), ({"bins": 0}, "bins is 0"), ({"max_windows": -1}, "max_windows is -1"),
    ({"own": False}, "leaves no text"), ({"texts": "ptb.jsonl"}, "'ptb.jsonl' is not of the form"),
    ({"texts": "a=files:nowhere/*.txt"}, "a: .*nowhere"), ({"texts": "a=tape:x"}, "'tape' is unknown"),
    ({"texts": "gain=stdlib:"}, "'gain' is taken"), ({"texts": "a=stdlib:; a=stdlib:"}, "'a' is there twice"),
    ({"texts": "a=stdlib:|column=b"}, "not of the form"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_a_model_is_loaded(wrong):
    given, message = wrong
    with pytest.raises(ValueError, match=message):
        settings = dataclasses.replace(Settings(), perplexity=Perplexity(**given))
        Validation().check(settings, allow_code=False, allow_unsafe_code=False)


def test_rows_hold_floats_that_are_read_back_as_they_were(soft):
    for line in (soft[0].folder / "validation.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        assert all(np.float32(row[name]) == row[name] for name in ("t", "one_pass", "two_pass"))
