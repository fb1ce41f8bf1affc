"""Supervisors of several hosts, each with a toy process: which one was lost, who restarts, who gives up."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softmask_jax import supervise
from softmask_jax.distributed import child_process, heartbeat, peers
from softmask_jax.distributed.child_process import in_words
from softmask_jax.distributed.peers import Peers
from tests.helpers.toy_hosts import ROOT, Hosts
from tests.helpers.waiting import until


@pytest.fixture
def several(tmp_path, monkeypatch):
    return Hosts(tmp_path, monkeypatch)


def test_hosts_whose_processes_end_well_end_well_without_a_word(several):
    assert several.run("3", "6") == [0, 0]
    assert several.lines() == [] and several.starts(0) == several.starts(1) == 1


def test_a_killed_process_is_named_on_all_hosts_and_all_start_again(several):
    assert several.run("9:hang,5", "9:hang,5", "4:kill 9,5", stall=60) == [0] * 3
    name = several.supervisors[2].peers.mine.host
    expected = f"Lost host 2 ({name}): its process was killed by SIGKILL after step 4. Restart 1 of 2 in 0.05 s, from the "
    assert [several.lines(i) for i in range(3)] == [[expected + "last checkpoint."]] * 3
    assert [several.starts(i) for i in range(3)] == [2] * 3


def test_whoever_only_lost_the_other_is_not_blamed(several):
    """The process of host 0 is ended by JAX, or fails, as it loses its peer; here even before its peer dies."""
    assert several.run("4:kill 6,5", "4:hang,5", "5:kill 9,5", stall=60) == [0] * 3
    assert all("Lost host 2" in line or "SIGABRT" in line for line in several.lines())
    several.said.clear()
    assert several.supervisors[0].fruitless >= 1


def test_a_process_that_makes_no_step_is_ended_and_started_again(several):
    assert several.run("3:hang,5") == [0]
    (line,) = several.lines()
    assert "its process stalled: no new step for 1 s after step 3." in line and several.starts(0) == 2


def test_all_but_steps_has_a_limit_of_its_own(several):
    assert several.run("2:sleep,5", stall_else=1.5) == [0]
    (line,) = several.lines()
    assert "its process stalled: validation, without an end, for 2 s after step 2." in line


def test_a_stopped_process_is_named_though_others_stall_too(several):
    for process in range(2):
        several.start(process, 2, "9:hang,3", stall=1.5)
    until(lambda: len(several.supervisors) == 2 and all(s.child.step == 9 for s in several.supervisors.values()))
    os.kill(several.supervisors[1].child._process.pid, signal.SIGSTOP)
    assert several.finish() == [0, 0]
    for line in several.lines():
        assert "Lost host 1" in line and "stopped" in line and "host 0" not in line


def test_restarts_that_come_no_further_end_in_giving_up(several):
    assert several.run("3:exit 1", "9:hang", stall=60) == [1, 1]
    assert several.starts(0) == 3
    *_, last = several.lines(0)
    assert last.startswith("Host 0 gave up: 2 restarts in a row came no further than step 3. Lost host 0 (")
    assert last.endswith("its process failed with exit status 1 after step 3.")
    # The other may have come further this time, and announce another restart just before it hears of the end.
    assert several.starts(1) <= 3 and "gave up" in several.lines(1)[-1]


def test_restarts_that_come_further_go_on(several):
    assert several.run("1:exit 1,2:exit 1,3:exit 1,4:exit 1,5") == [0]
    assert all("Restart 1 of 2" in line for line in several.lines()) and several.starts(0) == 5


@pytest.mark.parametrize("code, why", [(2, "its command line was refused"), (130, "its process was interrupted")])
def test_some_ends_are_never_followed_by_a_restart_on_any_host(several, code, why):
    assert several.run(f":exit {code}", "9:hang", stall=60) == [code, code]
    assert several.lines(0) == [f"Host 0 ended: {why}."] and several.starts(1) <= 1
    assert f"Host 1 ends, as host 0 ({several.supervisors[0].peers.mine.host}) ended: {why}." in several.lines(1)


def test_a_signal_is_passed_on_and_nothing_starts_again(several):
    for process in range(2):
        several.start(process, 2, "99:hang")
    until(lambda: len(several.supervisors) == 2 and all(s.child.step > 3 for s in several.supervisors.values()))
    for supervisor in several.supervisors.values():
        supervisor.note()
    assert several.finish() == [0, 0] and several.starts(0) == 1 and several.lines() == []


def test_a_host_that_is_done_comes_back_for_one_that_died_at_its_end(several):
    assert several.run("3", "9:kill 9,3") == [0, 0]
    assert several.starts(0) == 2


def test_a_host_that_never_comes_is_named(several):
    several.start(0, 2, "3", wait=3.0, silence=1.0)
    assert several.finish() == [1]
    first, last = several.lines()
    assert first == "Host 1 has not come yet; waiting 3 s for it at most."
    assert "waited 3 s in vain for host 1: does the same command run there, in a --workdir that all hosts share?" in last
    assert several.starts(0) == 0


def test_counts_of_processes_that_differ_are_named(several):
    several.start(0, 2, "3")
    several.start(1, 3, "3")
    assert several.finish() == [2, 2] and several.starts(0) == several.starts(1) == 0
    assert any("Host 0 was told of 2 processes, host 1 (" in line and ") of 3." in line for line in several.lines())


def test_files_of_an_earlier_job_are_no_hosts(several):
    assert several.run("3:exit 1", "3", restarts=0) == [1, 1]
    several.threads.clear(), several.codes.clear(), several.said.clear()
    several.start(0, 2, "3", wait=2.0)
    assert several.finish() == [1]
    several.threads.clear(), several.codes.clear()
    assert several.run("4", "4") == [0, 0]


def test_a_supervisor_that_vanishes_is_named_and_its_successor_lets_all_go_on(several):
    several.start(0, 2, "9:hang,3", stall=60)
    process = subprocess.Popen([sys.executable, "-c", VANISHING, str(several.folder), str(ROOT)])
    until(lambda: 0 in several.supervisors and several.supervisors[0].child.step == 9)
    process.kill()
    process.wait()
    until(several.lines)
    host = several.supervisors[0].peers.mine.host
    assert several.lines()[0].startswith(f"Lost host 1 ({host}): no sign of its supervisor for ")
    several.start(1, 2, "3")
    assert several.finish() == [0, 0] and several.starts(0) == 2


@pytest.mark.full
def test_a_supervisor_that_is_replaced_at_once_is_named(several):
    several.start(0, 2, "9:hang,3", stall=60, silence=30.0)
    process = subprocess.Popen([sys.executable, "-c", VANISHING, str(several.folder), str(ROOT)])
    until(lambda: 0 in several.supervisors and several.supervisors[0].child.step == 9)
    process.kill()
    process.wait()
    several.start(1, 2, "3")
    assert several.finish() == [0, 0]
    assert "its supervisor started anew. Restart 1 of 2" in several.lines(0)[0]


VANISHING = """
import argparse, sys, time
sys.path.insert(0, sys.argv[2])
from softmask_jax.distributed.peers import Peers
peers = Peers(sys.argv[1], 1, 2, every=0.2)
while True:
    time.sleep(0.1)
    peers.look()
    newest = max([peer.sign.attempt for peer in peers.others if peer.alive], default=0)
    peers.say(attempt=max(newest, peers.mine.attempt), state="running")
"""


def test_a_process_dies_with_its_supervisor(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from softmask_jax.distributed.child_process import Watched\n"
        "child = Watched(['sleep', '60'], stall=9, stall_else=9); child.start()\n"
        "print(child._process.pid, flush=True); import time; time.sleep(60)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    pid = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()
    until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())


def test_beats_are_read_back_and_half_a_file_is_none(tmp_path, monkeypatch):
    path = tmp_path / "beat"
    assert heartbeat.read(path) is None
    heartbeat.Heartbeat().beat(3)  # nobody watches
    monkeypatch.setenv(heartbeat.VARIABLE, str(path))
    heart = heartbeat.Heartbeat()
    heart.beat(1234, "validation")
    heart.beat(5)
    step, doing, seconds = heartbeat.read(path)
    assert (step, doing) == (5, "stepping") and 0 <= seconds < 5
    heart.close()
    path.write_text("7")
    assert heartbeat.read(path) is None


def test_signs_that_cannot_be_read_are_as_none(tmp_path):
    first = Peers(tmp_path, 0, 2, every=1.0)
    for text in ("", "{", "[]", json.dumps({"process": 1})):
        (tmp_path / "hosts" / "1.json").write_text(text)
        first.look()
        assert first.others[0].sign is None and not first.others[0].alive


def test_a_single_host_writes_nothing_into_the_folder(tmp_path):
    Peers(tmp_path / "run", 0, 1, every=1.0).say(state=peers.DONE)
    assert not (tmp_path / "run").exists()


def test_ends_are_put_into_words():
    assert [in_words(code) for code in (1, -9, -6, -99)] == [
        "failed with exit status 1", "was killed by SIGKILL", "was killed by SIGABRT", "was killed by signal 99"
    ]  # fmt: skip


def test_a_wrong_command_line_ends_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(child_process.Watched, "start", lambda self: pytest.fail("started"))
    with pytest.raises(SystemExit) as end:
        supervise.supervise(["--config=x.py", "--workdir=x", "--wrokdir=y"])
    assert end.value.code == 2 and "wrokdir" in capsys.readouterr().err
    for name in ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    words = ["--config=x.py", "--workdir=y", "--coordinator=a:8", "--processes=2", "--process=2"]
    assert supervise.supervise(words) == 1
    assert "Error: --process=2 is out of range" in capsys.readouterr().err


def test_flags_are_shared_out_between_the_supervisor_and_main():
    mine = ["--config=x.py", "--config.train.steps", "8", "--profile", "3:5", "--profiler_port=9999", "--workdir=y"]
    flags, rest = supervise.parse(["--stall=5", "--", *mine])
    assert flags.stall == 5 and flags.restarts == 3 and rest == mine
    assert supervise.main.parse([*rest, "--workdir=y"])[0].profile == range(3, 5)
