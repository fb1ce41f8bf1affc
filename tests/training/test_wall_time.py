"""Where the wall time of a run goes, over kills and restarts: nothing is left out, nothing counted twice."""
import types

import jax
import pytest

from softmask_jax import main
from softmask_jax.io import goodput
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.report import run_page
from softmask_jax.training import wall_time
from softmask_jax.training.wall_time import WallTime
from tests.helpers.tiny_run import Crash, STEPS
from tests.helpers.tiny_run import home as home  # the fixture


def test_the_kinds_of_a_killed_and_resumed_run_add_up_to_its_wall_time(home, monkeypatch):
    """Killed after its checkpoint, then before it is where it was, then stopped; continued to its end."""
    accounts, settings = [], dict(checkpoint__every=2, checkpoint__keep=4, eval__every=8, sample__count=1)
    monkeypatch.setattr(wall_time, "RECORD_SECONDS", 0.0)

    def start(**options):
        run, summary = home.folder / "killed", None
        with monkeypatch.context() as patch:
            if "crash_at" in options:  # leaves what SIGKILL would
                end = lambda times, *_: jax.monitoring.unregister_event_duration_listener(times._compiled)  # noqa: E731
                patch.setattr(WallTime, "__exit__", end)
            try:
                run, summary = home.run("killed", **options, **settings, train__log_every=1)
            except Crash:
                pass
        accounts.append(goodput.read(run))
        return run, summary

    start(crash_at=4)
    start(crash_at=3)
    start(stop_at=6)
    run, summary = start()
    for starts, account in enumerate(accounts, 1):
        assert account.starts == starts and account.finished == (starts == 4)
        assert account.wall == pytest.approx(account.seen - account.since, abs=1e-3)
        assert min(account.seconds.values()) >= 0 and [*account.seconds] == [*goodput.KINDS]
    first, second, third, last = (account.seconds for account in accounts)
    assert first["repeated"] == first["down"] == 0
    assert second["repeated"] > 0 and third["down"] > second["down"] > 0
    assert all(seconds > 0 for seconds in last.values())
    assert [mark[0] for mark in accounts[-1].marks] == [0, 2, 4, 6, STEPS]
    assert 0 < summary["goodput"] < 1 and abs(summary["goodput"] - accounts[-1].goodput) < 0.5
    assert f"Goodput: {accounts[-1].line()}" in main.report(summary, run)
    source = run_page.write(run).read_text()
    assert f"<td>{accounts[-1].shares['repeated']:.1%}</td>" in source and "starts: 4." in source


def test_the_account_begins_where_an_older_version_has_left_a_run(home):
    run, _ = home.run("older", stop_at=4)
    (run / goodput.FILE).unlink()
    home.run("older")
    account = goodput.read(run)
    assert account.starts == 1 and account.marks[0] == [4, [0.0] * len(goodput.WORK)] and account.seconds["repeated"] == 0
    assert "(step 4), starts: 1." in run_page.write(run).read_text()


@pytest.fixture
def clock(monkeypatch):
    """The time, set by hand."""
    clock = types.SimpleNamespace(time=lambda: clock.now, now=100.0)
    monkeypatch.setattr(wall_time, "time", clock)
    return clock


def steps(ready: bool) -> list:
    """Pending metrics of a device that has finished them, or not."""
    return [types.SimpleNamespace(loss=types.SimpleNamespace(is_ready=lambda: ready))]


def test_a_wait_for_data_behind_a_busy_device_is_no_loss(tmp_path, clock):
    with RunFolder(tmp_path) as folder, WallTime(folder, 90.0) as times:
        for pending, seconds in ((steps(False), 1.0), (steps(True), 2.0), ([], 4.0)):
            times.enter("steps")
            with times.waiting(pending):
                clock.now += seconds
            clock.now += 8.0
        times.record()
        assert times.account.seconds["data"] == 6 and times.account.seconds["steps"] == 25
    assert goodput.read(tmp_path).wall == 41


def test_compilation_is_told_from_what_asked_for_it(tmp_path):
    with RunFolder(tmp_path) as folder, WallTime(folder, 0.0) as times:
        with times.on("validating"):
            jax.jit(lambda x: x * 17 + 3)(2.0)
        compiling, wall = times.account.seconds["compiling"], times.account.wall
        assert compiling > 0 and times.account.seconds["validating"] > 0
    jax.jit(lambda x: x * 17 + 4)(2.0)  # the process may go on
    assert times.account.seconds["compiling"] == compiling and wall == pytest.approx(times.account.seen, abs=60)


def test_the_account_is_written_by_the_first_process_now_and_then(tmp_path, clock):
    with RunFolder(tmp_path / "a", lock=False) as folder, WallTime(folder, 90.0):
        pass
    assert not (tmp_path / "a").exists()
    with RunFolder(tmp_path / "b") as folder, WallTime(folder, 90.0) as times:
        for now, seen in ((104.0, 100.0), (114.0, 114.0), (120.0, 114.0)):
            clock.now = now
            times.record(every=10.0)
            assert goodput.read(tmp_path / "b").seen == seen
        times.checkpoint(3)
        assert goodput.read(tmp_path / "b").seen == 120
