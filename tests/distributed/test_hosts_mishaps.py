"""Hosts that die, fail, differ or never come: all of them end, and say why."""
import signal

import pytest

from tests.helpers.host_processes import PATIENCE, finish, free_port, lost, newest, start, until_step
from tests.helpers.host_processes import home as home  # the fixture

pytestmark = pytest.mark.full

ONE_FAILS = """
import sys, jax
from softmask_jax import main
from softmask_jax.training import loop as train
progress = train.Tracker.progress
def fail(tracker, step):
    if step == 5 and jax.process_index() == 1:
        raise OSError("No space left on host 1")
    progress(tracker, step)
train.Tracker.progress = fail
sys.exit(main.main(sys.argv[1:]))
"""


def test_without_supervisors_the_death_of_one_host_ends_the_other(home):
    workdir = home / "unsupervised"
    processes = start(home / "long.py", workdir, 2, "--config.train.steps=4000", "--heartbeat_seconds=10", flags=True)
    until_step(workdir, 10, processes)
    processes[1].kill()
    for process in processes:
        process.communicate(timeout=PATIENCE)
    assert processes[0].returncode not in (0, None)


def test_an_error_on_one_host_ends_all_and_says_where_it_was(home):
    """The other one would wait for it in a step, and it at its exit for the other one."""
    module = home / "one_fails.py"
    module.write_text(ONE_FAILS)
    processes = start(home / "long.py", home / "failed", 2, module=module)
    printed = finish(processes, codes=[processes[0].wait(PATIENCE), 1])
    assert processes[0].returncode not in (0, None) and "Error: No space left on host 1" in printed[1]


def test_hosts_that_do_not_run_the_same_say_what_differs(home):
    address = f"--coordinator=localhost:{free_port()}"
    processes = []
    for host, steps in enumerate((8, 9)):
        words = (address, "--processes=2", f"--process={host}", f"--config.train.steps={steps}")
        processes += start(home / "tiny.py", home / "unlike", 1, *words)
    for text in finish(processes, codes=[1, 1]):
        assert "Error: The hosts do not run the same: config.train.steps is 9 on host 1 (" in text
        assert "Terminating process" not in text


def test_a_host_without_the_first_one_and_the_first_one_without_others_end_in_one_line(home):
    address = f"--coordinator=localhost:{free_port()}"
    words = (address, "--processes=2", "--join_seconds=3")
    (text,) = finish(start(home / "tiny.py", home / "alone", 1, *words, "--process=1"), codes=[1])
    assert text.count("\n") == 1 and "Error: Host 1: no answer from host 0 at localhost:" in text
    (text,) = finish(start(home / "tiny.py", home / "alone", 1, *words, "--process=0"), codes=[1])
    assert text.count("\n") == 1 and "Error: Of 2 hosts 1 did not come to localhost:" in text


def test_a_stop_of_one_supervisor_saves_on_all_and_none_starts_again(home):
    workdir = home / "told to stop"
    supervisors = start(home / "long.py", workdir, 2, "--config.train.steps=40000", module="supervise", flags=True)
    until_step(workdir, 10, supervisors)
    supervisors[1].send_signal(signal.SIGTERM)
    printed = finish(supervisors)
    assert f"Stopped and saved at step {newest(workdir)};" in printed[0] and not lost("".join(printed))
    assert all("Supervisor" not in text for text in printed)
