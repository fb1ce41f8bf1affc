"""Several processes on localhost behave like hosts: one run, the same losses, one writer, elastic."""
import json
import os
import shutil
import signal

import numpy as np
import pytest

from softmask_jax.io import goodput
from tests.helpers import tiny_run
from tests.helpers.tiny_run import assert_rows_are_unique, rows
from tests.helpers.host_processes import child, finish, losses, lost, newest, start, until_step
from tests.helpers.host_processes import home as home  # the fixture
from tests.helpers.host_processes import one as one  # the fixture

pytestmark = pytest.mark.full


def test_two_hosts_train_validate_and_end_as_one_does_and_one_of_them_writes(home, one):
    check_two_hosts(home, one)


def test_so_do_two_hosts_that_are_a_slice_each(home, one):
    check_two_hosts(home, one, "--config.mesh.dcn_data=2")


def check_two_hosts(home, one, *words):
    workdir = home / "-".join(["two", *words])
    printed = finish(start(home / "tiny.py", workdir, 2, *words))
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)
    for kind in ("validation", "final"):
        for ours, theirs in zip(rows(workdir, kind), rows(one, kind), strict=True):
            np.testing.assert_allclose(ours["two_pass/nelbo"], theirs["two_pass/nelbo"], rtol=1e-3)
    assert_rows_are_unique(workdir)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (workdir, one))
    assert ours["step"] == theirs["step"]
    np.testing.assert_allclose(list(ours["validation"].values()), list(theirs["validation"].values()), 1e-3, 1e-5)
    for line in ("parameters on", "Validating and sampling", "Validation perplexity per token", "Goodput: "):
        assert sum(line in text for text in printed) == 1


def test_a_stop_of_one_host_saves_on_all_and_a_single_process_continues_as_both_would(home, one):
    workdir, steps = home / "stopped", "--config.train.steps=4000"
    processes = start(home / "tiny.py", workdir, 2, steps, flags=True)
    until_step(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes)
    saved = newest(workdir)
    assert len(rows(workdir, "train")) == saved < 4000
    shutil.copytree(workdir, home / "both")
    further = f"--config.train.steps={saved + 2}"
    finish(start(home / "tiny.py", workdir, 1, further))
    finish(start(home / "tiny.py", home / "both", 2, further))
    assert len(losses(workdir)) == saved + 2
    assert_rows_are_unique(workdir)
    np.testing.assert_allclose(losses(workdir)[:4], losses(one)[:4], rtol=1e-4)
    # The two steps after the stop: the same examples, noise and coins.
    np.testing.assert_allclose(losses(workdir), losses(home / "both"), rtol=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("slices", [(1, 1), (4, 2)])
def test_four_hosts_train_as_one_does_and_two_of_them_go_on_with_the_same_examples(home, one, slices):
    workdir, (first, second) = home / f"four-{slices[0]}", (f"--config.mesh.dcn_data={number}" for number in slices)
    finish(start(home / "tiny.py", workdir, 4, "--config.train.steps=4", first))
    finish(start(home / "tiny.py", workdir, 2, "--config.train.steps=8", second))
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-4)
    assert_rows_are_unique(workdir)


def test_killed_and_stopped_processes_are_named_and_the_end_has_the_bits_of_an_undisturbed_run(home):
    finish(start(home / "long.py", home / "undisturbed", 2))
    workdir = home / "disturbed"
    words = ("--stall=10", "--stall_else=200", "--back_off=0.2", "--silence=30", "--heartbeat_seconds=100")
    supervisors = start(home / "long.py", workdir, 2, *words, module="supervise")
    until_step(workdir, 120, supervisors)
    os.kill(child(supervisors[1]), signal.SIGKILL)
    until_step(workdir, 240, supervisors)
    os.kill(child(supervisors[0]), signal.SIGSTOP)
    until_step(workdir, 320, supervisors)
    os.kill(child(supervisors[0]), signal.SIGKILL)  # the coordinator of all
    printed = finish(supervisors)
    tiny_run.assert_identical(workdir, home / "undisturbed", 400)
    assert rows(workdir) == rows(home / "undisturbed")
    account = goodput.read(workdir)
    assert account.starts == 4 and account.finished and account.seconds["down"] > 0
    assert account.wall == pytest.approx(account.seen - account.since, abs=1e-3)
    for text in printed:
        print(*(line for line in text.splitlines() if "step/s" not in line), sep="\n")
        first, second, third = lost(text)
        assert first.startswith("Supervisor: Lost host 1 (") and ": its process was killed by SIGKILL after step " in first
        assert second.startswith("Supervisor: Lost host 0 (") and "stopped" in second and "host 1" not in second
        assert "Restart 1 of 3 in 0.2 s, from the last checkpoint." in second
        assert third.startswith("Supervisor: Lost host 0 (") and "killed by SIGKILL" in third and "host 1" not in third
    assert "Continuing from step " in printed[0]
