"""What the log tells of lambda and of the device, and whom; the rest is seen in whole runs (test_train)."""
import types

import pytest

from softmask_jax import config
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training.tracking import Openness, Tracker, peak_flops
from softmask_jax.training.wandb_rows import FINISHED
from tests.helpers.fake_wandb import wandb as wandb  # the fixture


def said(means, every=100):
    """(step, the line) where there is one."""
    openness = Openness()
    lines = [(step * every, openness.line(step * every, mean, 0.5)) for step, mean in enumerate(means)]
    return [(step, line) for step, line in lines if line]


def test_every_opening_and_closing_of_soft_masking_is_said():
    lines = said([0.3, 0.2, 0.001, 0.002, 0.2, 0.3, 0.001])
    assert [step for step, _ in lines] == [0, 200, 400, 600]
    for (_, line), part in zip(lines, ("is open", "has closed", "is open", "has closed"), strict=True):
        assert part in line and ("Warning" in line) == ("closed" in part)


def test_a_warning_comes_back_after_1000_steps_of_closed_soft_masking():
    lines = said([0.001] * 25)
    assert [step for step, _ in lines] == [0, 1000, 2000] and all("still closed" in line for _, line in lines)


def test_a_scale_near_zero_is_named_as_the_reason():
    assert "config.soft_mask.init_scale starts it higher" in Openness().line(5, 1e-7, 1e-6)


@pytest.mark.parametrize("kind, peak", [("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4", 275e12)])
def test_the_peak_is_that_of_a_jax_device_not_of_a_chip(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


@pytest.mark.parametrize("project, handed", [("", 0), ("toys", 1)])
def test_rows_go_to_wandb_only_where_a_project_is_named(tmp_path, wandb, project, handed):
    wanted = config.from_dict({"train": {"wandb": project, "steps": 5}})
    with RunFolder(tmp_path) as folder:
        tracker = Tracker(folder, wanted, start=0)
        tracker.row(1, "train", {"loss": 2.0})
        tracker.exit_code = FINISHED
        tracker.close()
    assert [run.exit_code for run in wandb.runs] == [FINISHED] * handed
    assert wandb.logged() == [(1, "train")] * handed and (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_only_the_first_process_talks_to_wandb(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with RunFolder(tmp_path) as folder:
        tracker = Tracker(folder, config.from_dict({"train": {"wandb": "toys"}}), start=0)
        tracker.row(1, "train", {"loss": 2.0})
        tracker.close()
    assert not wandb.runs and not (tmp_path / "wandb.json").exists()
