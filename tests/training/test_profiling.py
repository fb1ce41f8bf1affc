"""Traces: of a few steps, of a range of the run's steps, through a port; and what is refused."""
import socket

import jax
import pytest

from softmask_jax.training import loop, profiling
from tests.helpers.host_processes import free_port
from tests.helpers.tiny_run import home as home  # the fixture


def traced(run) -> list[int]:
    """The training steps in the run's trace."""
    (path,) = (run / "profile").rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines]
    steps = [dict(event.stats) for line in lines for event in line.events if event.name == "train"]
    return sorted({stats["step_num"] for stats in steps})


def test_a_trace_is_of_the_third_step_to_the_seventh_as_far_as_the_run_comes(home):
    run, _ = home.run("profiled", stop_at=4, profile=True)
    assert traced(run) == [3, 4]


def test_a_trace_of_a_range_counts_the_steps_of_the_run_whichever_process_does_them(home, capsys):
    run, _ = home.run("ranged", stop_at=4, profile=range(5, 7))
    assert not (run / "profile").exists()
    home.run("ranged", stop_at=7, profile=range(5, 7))
    assert traced(run) == [5, 6]
    home.run("ranged", profile=range(5, 7))
    assert "No trace: the run continues after step 7, past those of --profile=5:7.\n" in capsys.readouterr().out
    assert traced(run) == [5, 6]


def test_what_is_left_of_a_range_is_traced(tmp_path):
    profiler = profiling.Profiler(tmp_path, range(3, 6), last=5)
    assert profiler.begin(3) == "" and [step for step in range(4, 9) if profiler.is_due(step)] == [4, 5]
    assert "past those" in profiler.begin(5)


@pytest.mark.parametrize("steps", [range(3, 10), range(9, 10), range(0, 3), range(4, 4)])
def test_steps_that_the_run_does_not_have_are_refused_before_the_first(home, steps):
    with pytest.raises(ValueError, match=r"^--profile=\d+:\d+ is not within the run's 8 steps; .* 1 <= A < B <= 9\.$"):
        home.run("refused", profile=steps)
    assert not (home.folder / "refused" / "metrics.jsonl").exists()


def test_the_profilers_port_can_be_reached_while_the_run_trains(home, monkeypatch):
    port, progress, reached = free_port(), loop.Tracker.progress, []

    def connect(tracker, step):
        socket.create_connection(("localhost", port), timeout=10).close()
        reached.append(step)
        progress(tracker, step)

    monkeypatch.setattr(loop.Tracker, "progress", connect)
    for stop in (1, 2):  # in one process the second server takes over from the first
        home.run("served", stop_at=stop, profiler_port=port)
    assert reached == [1, 2]


def test_a_port_that_is_taken_ends_the_run_with_one_line(home):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--profiler_port={port} cannot be used \(Address already in use on .*another port\.$"):
            home.run("taken", profiler_port=port)
