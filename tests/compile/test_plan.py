"""The planner: budgets by hand, FLOPs by the method's rule, hours by arithmetic, seconds out of a noisy log."""
import json

import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.compile import plan
from tests.helpers.crafted_run import write

SMALL = ["model.hidden_size=32", "model.num_blocks=1", "model.num_heads=2", "data.seq_len=16", "train.steps=1000"]


def test_budgets_are_the_papers_half_and_the_share_of_forward_passes():
    soft = config.load("configs/mdlm_owt.py")
    found = {line.name: line for line in plan.plan(soft, plan.counted(soft))}
    assert found["binary"].updates == found["soft-masked, iso_update"].updates == 1_000_000
    assert found["soft-masked, iso_compute_paper"].updates == 500_000
    assert found["soft-masked, iso_flops"].updates == round(1_000_000 * 3 / 3.8)
    assert found["soft-masked, iso_update"].ratio == pytest.approx(3.8 / 3, rel=1e-9)
    assert found["soft-masked, iso_flops"].ratio == pytest.approx(1.0, abs=1e-6)
    # 6 N D without the table of embeddings, whose lookup is none; attention's products are on top.
    assert found["binary"].flops > 6 * 131e6 * 512 * 1024 * 1_000_000
    assert found["binary"].tokens == 512 * 1024 * 1e6


@pytest.mark.parametrize("remat, adapter, least, most", [
    # A plain update is a forward pass, a backward one of as many products where the base is frozen (attention's has two
    # for each), and the layers again.
    ("none", "dora", 1.45, 1.5), ("full", "dora", 1.32, 1.34), ("none", "none", 1.333, 1.334), ("full", "none", 1.25, 1.26),
])  # fmt: skip
def test_iso_flops_buys_the_flops_of_the_binary_training_whatever_is_frozen_or_run_again(remat, adapter, least, most):
    base = ["model.base_dtype=float"] + ["model.param_dtype=float32"] * (adapter == "none")
    soft = config.load("configs/dream7b.py", [f"model.remat={remat}", f"model.adapter={adapter}", *base])
    step = plan.counted(soft)
    assert least < step.flops[1] / step.flops[0] < most
    found = {line.name: line for line in plan.plan(soft, step)}
    assert found["soft-masked, iso_flops"].ratio == pytest.approx(1.0, abs=1e-4)
    assert found["soft-masked, iso_update"].ratio == pytest.approx(step.mixed(step.flops, 0.5) / step.flops[0])


def test_epochs_are_counted_in_data_that_a_plan_does_not_read():
    soft = config.load("configs/mdlm_owt.py", ["train.epochs=1"])
    with pytest.raises(ValueError, match="give --config.train.epochs=0 and the steps"):
        plan.plan(soft, plan.Step((3.0, 4.0), 1))


def test_chip_hours_are_updates_times_seconds_times_chips():
    soft = config.load("configs/mdlm_owt.py", ["train.steps=3600", "soft_mask.p_sm=0.5"])
    step = plan.Step((3.0, 4.0), 1, ((1.0, 2.0), (3.0, 6.0)), chips=4)
    found = {line.name: line.hours for line in plan.plan(soft, step)}
    assert found["binary"] == pytest.approx((4.0, 8.0))
    assert found["soft-masked, iso_update"] == pytest.approx((8.0, 16.0))
    assert found["soft-masked, iso_compute_paper"] == pytest.approx((4.0, 8.0))


def test_seconds_of_both_kinds_of_steps_come_out_of_a_log_with_pauses(tmp_path):
    folder, random = write(tmp_path / "run", steps=400), np.random.default_rng(0)
    rows = []
    for step in range(10, 401, 10):
        share = random.binomial(10, 0.8) / 10
        seconds = (0.5 + 0.2 * share) * (1 + random.normal(0, 0.003)) * (3.0 if step % 70 == 0 else 1.0)
        rows.append({"step": step, "kind": "train", "loss": 1.0, "two_pass_share": share, "tokens_per_second": 128 / seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timing = plan.measured(str(folder))
    (plain, _), (both, _) = timing["seconds"]
    assert plain == pytest.approx(0.5, rel=0.03) and both == pytest.approx(0.7, rel=0.03)
    assert "40 rows" in timing["source"]
    settings = config.load("configs/dream7b.py").to_dict()
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="conversations of any length.*give --seconds"):
        plan.measured(str(folder))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--config=configs/mdlm_owt.py:binary"], "give the soft-masked one"),
        (["--config=configs/mdlm.py"], "No config file at 'configs/mdlm.py'"),
        (["--config=configs/mdlm_owt.py", "--run={folder}/absent"], "absent"),
        (["--config=configs/mdlm_owt.py", "--run={folder}/short"], "let it run longer"),
        (["--config=configs/mdlm_owt.py", "--json={folder}/no/where.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words, said, tmp_path, capsys):
    write(tmp_path / "short", steps=20)
    assert plan.main([word.format(folder=tmp_path) for word in words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seconds=1"], "go together"), (["--seconds=2", "--two_pass_seconds=1"], "not below it"),
        (["--run=a", "--topology=v5e:1x1"], "one of --topology"), (["--chips=0"], "at least 1"),
        (["--length=-5"], "--length and --vocab_size"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config=configs/mdlm_owt.py", *words])
    assert said in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_the_same_figures(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = [f"--config.{key}" for key in SMALL] + ["--vocab_size=100", f"--json={out}"]
    words += ["--seconds=3.6", "--two_pass_seconds=7.2", "--chips=2"]
    assert plan.main(["--config=configs/mdlm_owt.py", *words]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [line["updates"] for line in found["lines"]] == [1000, 1000, 500, 789]
    assert found["lines"][0]["hours"] == [2.0, 2.0] and "| 2.000" in said and "on 2 chips: from the command line" in said


@pytest.mark.full
def test_seconds_come_from_the_program_that_is_compiled_for_a_tpu(tmp_path, capsys):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    words = [f"--config.{key}" for key in [*SMALL, "train.global_batch_size=8"]] + ["--vocab_size=100", f"--json={out}"]
    assert plan.main(["--config=configs/mdlm_owt.py", "--topology=v5e:1x1", *words]) == 0
    step = json.loads(out.read_text())["step"]
    (low, high), (low2, high2) = step["seconds"]
    assert 0 < low < high and low < low2 and high < high2 and step["chips"] == 1
    assert "never run" in capsys.readouterr().out
