"""Whole runs: resumed, moved to another mesh, stopped, started from other runs; what they log, and what they refuse."""
import json
import os
import re
import signal

import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.config.jax_settings import root_key
from softmask_jax.convert import runs
from softmask_jax.io import tree_files
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training import loop
from tests.helpers import tiny_run
from tests.helpers.tiny_run import Crash, STEPS, arrays, assert_identical, assert_rows_are_unique, events, rows
from tests.helpers.tiny_run import home as home  # the fixture


@pytest.fixture(scope="module")
def undisturbed(home):
    return home.run("undisturbed")[0]


@pytest.fixture(scope="module")
def binary(home):
    return home.run("binary", soft_mask__variant="none", sample__count=0)[0]


def test_two_undisturbed_runs_are_identical_and_say_where_they_are(home, undisturbed, capsys):
    again, _ = home.run("again")
    out, err = capsys.readouterr()
    first, *_, last = err.splitlines()
    assert re.fullmatch(r"Step 1 of 8, loss \d\.\d+", first)
    assert re.fullmatch(r"Step 8 of 8, loss \d\.\d+, [\d,]+ tokens/s", last)
    assert re.search(r"^Step 8: validation perplexity on 8 of \d+ windows: one pass", out, re.MULTILINE)
    assert "\r" not in out + err and max(map(len, (out + err).splitlines())) < 500
    assert_identical(again, undisturbed, STEPS)
    assert rows(again) == rows(undisturbed)


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.full) for step in (1, 6, 7, 8))])
def test_a_run_stopped_at_any_step_continues_bit_identically(home, undisturbed, step, capsys):
    run, summary = home.run(f"stopped-{step}", stop_at=step)
    assert summary == {"finished": False, "step": step} and f"saved at step {step}" in capsys.readouterr().out
    if step == 4:  # what the stop left out is made up for once, also where that run crashes
        assert not rows(run, "validation")
        with pytest.raises(Crash):
            home.run(run.name, crash_at=6)
    run, summary = home.run(run.name)
    assert summary["finished"] and f"Continuing from step {step}." in capsys.readouterr().out
    assert_identical(run, undisturbed, STEPS)
    assert_rows_are_unique(run)
    for kind in ("validation", "final") if step % 2 else (None,):
        assert rows(run, kind) == rows(undisturbed, kind)


@pytest.mark.full
@pytest.mark.parametrize("steps", [[3], [5], [2, 6, 8]])
def test_a_run_that_crashed_logs_and_ends_as_if_undisturbed(home, undisturbed, steps):
    name = f"crashed-{len(steps)}-{steps[0]}"
    for step in steps:
        with pytest.raises(Crash):
            home.run(name, crash_at=step)
    run, _ = home.run(name)
    assert_identical(run, undisturbed, STEPS)
    assert rows(run) == rows(undisturbed)


def test_a_crash_while_the_run_is_finished_repeats_only_that(home, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop, "write_json", lambda *_: (_ for _ in ()).throw(Crash))
        home.run("unfinished")
    run, summary = home.run("unfinished")
    assert f"Continuing from step {STEPS}." in capsys.readouterr().out and summary["finished"]
    assert rows(run) == rows(undisturbed)
    before = tiny_run.summary(run)
    (run / "summary.json").write_text("")  # as damaged as absent
    assert home.run("unfinished")[1] == json.loads((run / "summary.json").read_text())
    assert tiny_run.summary(run) == before
    assert rows(run) == rows(undisturbed)


@pytest.mark.full
def test_a_run_continues_on_another_mesh_with_the_same_losses(home, undisturbed):
    """One device, then eight as 2 x 2 x 2, then one again."""
    home.run("moved", stop_at=4)
    home.run("moved", mesh=(2, 2, 2), stop_at=7)
    run, _ = home.run("moved")
    losses = {row["step"]: row["loss"] for row in rows(run, "train")}
    wanted = {row["step"]: row["loss"] for row in rows(undisturbed, "train")}
    assert losses[2] == wanted[2] and losses[4] == wanted[4]
    np.testing.assert_allclose(losses[6], wanted[6], rtol=1e-5)
    np.testing.assert_allclose((losses[7] + losses[8]) / 2, wanted[8], rtol=1e-4)
    np.testing.assert_allclose(
        rows(run, "final")[0]["two_pass/nelbo"], rows(undisturbed, "final")[0]["two_pass/nelbo"], rtol=1e-3
    )


def test_the_metrics_hold_everything_and_are_plausible(undisturbed):
    trained = rows(undisturbed, "train", timed=True)
    assert [row["step"] for row in trained] == [2, 4, 6, 8]
    two_pass = [row for row in trained if row["two_pass_share"] > 0]
    assert two_pass
    for row in trained:
        assert 2 < row["loss"] < 9 and 2 < row["cross_entropy"] < 6.5 and 0 < row["grad_norm"] < 100
        by_t = {name: value for name, value in row.items() if name.startswith("cross_entropy_by_t/")}
        assert 3 <= len(by_t) <= 10 and all(2 < value < 6.5 for value in by_t.values())
        assert row["tokens_per_second"] > 0 and row["model_flops_per_second"] > 0 and 0 < row["model_flops_share"] < 1
        assert 0 < row["soft_mask/scale"] < 1 and row["soft_mask/centre"] < 0 < row["soft_mask/steepness"]
    for row in two_pass:
        assert 0 < row["lambda_mean"] < 0.6 and 0 <= row["top_k_hit_rate"] <= 1
        assert len(row["lambda_histogram"]) == 10 and sum(row["lambda_histogram"]) == pytest.approx(1)
    # The first update is null; the warm-up's end is reached after two.
    assert [row["learning_rate"] for row in trained] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert [row["sm_learning_rate"] for row in trained] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert trained[-1]["loss"] < trained[0]["loss"] + 1
    ways = [(kind, row["windows"], row["windows_in_split"]) for kind in ("validation", "final") for row in rows(undisturbed, kind)]
    split = ways[0][2]
    assert ways == [("validation", 8, split)] * 2 + [("final", min(16, split), split)]
    for row in rows(undisturbed, "validation") + rows(undisturbed, "final"):
        for name in ("one_pass", "two_pass"):
            assert row[f"{name}/nelbo_low"] <= row[f"{name}/nelbo"] <= row[f"{name}/nelbo_high"]
            assert row[f"{name}/perplexity"] == pytest.approx(np.exp(row[f"{name}/nelbo"]))
        assert row["gain/low"] <= row["gain/nelbo"] <= row["gain/high"]
        assert row["gain/nelbo"] == pytest.approx(row["one_pass/nelbo"] - row["two_pass/nelbo"])


def test_tensorboard_shows_what_metrics_jsonl_holds(undisturbed):
    shown = events(undisturbed)
    for row in rows(undisturbed, timed=True):
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                found = [v.simple_value for step, v in shown[f"{row['kind']}/{name}"] if step == row["step"]]
                assert found == pytest.approx([value], rel=1e-5)
    histogram = shown["train/lambda_histogram"][0][1].histo
    assert list(histogram.bucket) == pytest.approx(rows(undisturbed, "train")[0]["lambda_histogram"])
    assert list(histogram.bucket_limit) == pytest.approx(np.linspace(0.1, 1, 10))


def test_validation_and_samples_come_on_the_way_and_at_the_end(home):
    """Samples from the middle and the end are kept, each once; rows of every kind close before them."""
    run, summary = home.run("sampled", sample__every=3, sample__count=2)
    assert [row["step"] for row in rows(run, "validation")] == [4, 8]
    assert [row["step"] for row in rows(run, "samples")] == [3, 6, 8]
    assert rows(run, "samples")[-1]["texts"] == summary["samples"] and len(summary["samples"]) == 2
    assert all("▁" not in text for text in summary["samples"])
    assert [row["step"] for row in rows(run, "train")] == [2, 3, 4, 6, 8]
    assert {"samples/texts/0/text_summary", "samples/texts/1/text_summary"} <= events(run).keys()
    assert json.loads((run / "summary.json").read_text()) == summary
    home.run("sampled-stopped", stop_at=3, sample__every=3, sample__count=2)
    again, _ = home.run("sampled-stopped", sample__every=3, sample__count=2)
    assert rows(again) == rows(run)


@pytest.mark.full
def test_a_binary_run_has_one_pass_and_no_soft_masking_in_its_metrics(binary):
    for row in rows(binary, timed=True):
        assert not [name for name in row if "lambda" in name or "soft_mask" in name or "top_k" in name or "sm_" in name]
        assert "two_pass/nelbo" not in row and row.get("two_pass_share", 0) == 0
    assert rows(binary, "final")[0]["one_pass/nelbo"] < np.log(258) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_and_the_next_one_continues(home, undisturbed, monkeypatch, number):
    validate, name = loop.Trainer._validate, f"signalled-{number}"

    def while_validating(trainer, step, state):
        if step == 4:
            os.kill(os.getpid(), number)
        return validate(trainer, step, state)

    monkeypatch.setattr(loop.Trainer, "_validate", while_validating)
    before = signal.getsignal(number)
    run, summary = home.run(name)
    assert summary == {"finished": False, "step": 5} and signal.getsignal(number) is before
    run, summary = home.run(name)
    assert summary["finished"]
    assert_identical(run, undisturbed, STEPS)


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run_too(home, undisturbed, monkeypatch):
    save, name = loop.Trainer._save, "signalled-last"

    def signalled(trainer, step, *rest):
        save(trainer, step, *rest)
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_save", signalled)
        assert home.run(name)[1] == {"finished": False, "step": STEPS}
    run, summary = home.run(name)
    assert summary["finished"] and rows(run) == rows(undisturbed)


def test_a_finished_run_says_so_and_more_steps_continue_it(home, undisturbed, monkeypatch, capsys):
    run, first = home.run("extended", train__steps=6)
    # The last checkpoint is validated, so that it may be the best, though no interval ends there.
    assert [row["step"] for row in rows(run, "validation")] == [4, 6]
    data = tree_files.read_json(run / "checkpoints" / "6", verified=False)
    assert data["metrics"]["validation/nelbo"] == rows(run, "validation")[-1]["two_pass/nelbo"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Trainer", None)  # nothing is built, nothing is trained
        assert home.run("extended", train__steps=6)[1] == first
    assert "This run is done (6 steps)" in capsys.readouterr().out
    _, summary = home.run("extended")
    assert "Continuing from step 6." in capsys.readouterr().out and summary["step"] == STEPS
    assert_identical(run, undisturbed, STEPS)
    assert [row["step"] for row in rows(run, "final")] == [6, STEPS]
    assert_rows_are_unique(run)


def test_epochs_are_counted_in_windows_and_a_run_keeps_the_number(home, capsys):
    assert home.run("epochs", train__epochs=0.5, stop_at=4)[1]["step"] == 4
    an_epoch = int(re.search(r"(\d+) training and \d+ validation windows", capsys.readouterr().out)[1]) / 8
    updates = round(0.5 * an_epoch)
    run, summary = home.run("epochs", train__epochs=0.5)
    settings = json.loads((run / "config.json").read_text())
    assert summary["step"] == settings["train"]["updates"] == updates > 4
    assert home.run("epochs", train__epochs=0.5)[1] == json.loads((run / "summary.json").read_text())
    assert "This run is done" in capsys.readouterr().out


def test_a_config_that_does_not_fit_the_checkpoint_names_its_keys(home, undisturbed):
    with pytest.raises(ValueError, match=r"model.hidden_size: 16 -> 32; model.num_blocks: 1 -> 2"):
        home.run("undisturbed", model__hidden_size=32, model__num_blocks=2, train__steps=9)


def test_a_run_is_not_continued_on_another_corpus(home, undisturbed):
    other = tiny_run.write_texts(home.folder / "other", seed=1)
    with pytest.raises(ValueError, match="trained on other text .* use another --workdir"):
        home.run("undisturbed", data__paths=other, train__steps=9)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(home, undisturbed, caplog):
    run, _ = home.run("damaged", stop_at=6)
    weights = max((run / "checkpoints" / "6" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-7])
    home.run("damaged")
    assert "checkpoints/6 is damaged" in caplog.text and "using step 4 instead" in caplog.text
    assert "6.damaged-1" in os.listdir(run / "checkpoints")
    assert_identical(run, undisturbed, STEPS)
    assert rows(run) == rows(undisturbed)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_run_starts_from_another_runs_weights_at_step_0(home, undisturbed, weights):
    # The first update of a warm-up is null, so what is saved after it is what the run started from.
    run, _ = home.run(f"from-{weights}", stop_at=1, init__checkpoint=str(undisturbed), init__weights=weights)
    ours, theirs = arrays(run, 1), arrays(undisturbed, STEPS)
    source = "ema/" if weights == "ema" else "params/backbone/"
    for name, value in ours.items():
        if name.startswith("params/soft_mask/"):
            np.testing.assert_array_equal(value, theirs[name])
        elif name.startswith("params/"):
            np.testing.assert_array_equal(value, theirs[source + name.removeprefix("params/backbone/")])
            # The EMA starts from the same weights; its own arithmetic may round.
            ema = ours["ema/" + name.removeprefix("params/backbone/")]
            np.testing.assert_allclose(ema, value, rtol=1e-6, atol=1e-7)
    assert ours["params/soft_mask/raw_scale"] != 0.0 and rows(run, "train")[0]["step"] == 1


def test_soft_masking_scalars_are_not_taken_from_a_binary_run(home, binary):
    run, _ = home.run("from-binary", stop_at=1, init__checkpoint=str(binary), soft_mask__init_centre=-5.0)
    ours, theirs = arrays(run, 1), arrays(binary, STEPS)
    table = "embed/table"
    np.testing.assert_array_equal(ours[f"params/backbone/{table}"], theirs[f"ema/{table}"])
    assert rows(run, "train")[0]["soft_mask/centre"] == pytest.approx(-5.0, rel=1e-5)


def test_a_projection_of_the_hidden_state_trains_resumes_samples_and_stays_here(home, binary):
    hidden = dict(soft_mask__variant="hidden", init__checkpoint=str(binary))
    run, _ = home.run("hidden", **hidden)
    name = "params/soft_mask/projection"
    home.run("hidden-stopped", stop_at=5, **hidden)
    assert np.any(arrays(home.folder / "hidden-stopped", 5)[name])
    assert_identical(home.run("hidden-stopped", **hidden)[0], run, STEPS)
    assert rows(run, "final")[0]["two_pass/nelbo"] != rows(run, "final")[0]["one_pass/nelbo"]
    model = softmask_jax.load(run)
    np.testing.assert_array_equal(model.params["soft_mask"]["projection"], arrays(run, STEPS)[name])
    soft, plain = (model.generate(key=root_key(0), count=2, steps=8, soft_mask=name) for name in (None, "none"))
    assert np.any(soft.tokens != plain.tokens)
    with pytest.raises(ValueError, match="variant hidden, which has no converted form"):
        runs.open_run(run, None)


@pytest.mark.full
def test_a_projection_is_sharded_as_the_weights_and_trains_as_on_one_device(home, binary):
    hidden = dict(soft_mask__variant="hidden", init__checkpoint=str(binary))
    ours, theirs = (
        arrays(home.run(f"hidden-{name}", mesh=mesh, **hidden)[0], STEPS)["params/soft_mask/projection"]
        for name, mesh in (("one", (1, 1, 1)), ("many", (2, 2, 2)))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_start_from_nothing_or_from_another_model_is_refused(home, undisturbed, tmp_path):
    (tmp_path / "texts").symlink_to(home.folder / "texts")
    with pytest.raises(FileNotFoundError, match="config.init.checkpoint: no run in .*absent"):
        home.run("refused", init__checkpoint=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"of another model: params/.*found float32\[.*16\], wanted float32\[.*32\]"):
        home.run("refused", init__checkpoint=str(undisturbed), model__hidden_size=32)
    with pytest.raises(ValueError, match="another tokenizer"):
        home.run("refused", init__checkpoint=str(undisturbed), data__tokenizer="bpe", data__bpe_vocab_size=258)
    run = tmp_path / "no_checkpoint"
    with RunFolder(run) as folder:
        folder.write_config(config.from_dict(tiny_run.settings(home.folder)).to_dict())
    loop.data.ByteTokenizer().save(run / "tokenizer")
    with pytest.raises(FileNotFoundError, match="No checkpoint of any step in .*no_checkpoint/checkpoints"):
        home.run("refused", init__checkpoint=str(run))


def test_the_compilation_cache_setting_fills_its_folder(home, undisturbed):
    assert any("-cache" in name for name in os.listdir(home.folder / "compiled"))
