"""Several processes on localhost behave like hosts: one run, the same losses, one writer, elastic."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_run
from tests.helpers.tiny_run import assert_rows_are_unique, rows

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300
# Long enough to be disturbed on the way.
LONG = dict(train__steps=400, train__log_every=5, checkpoint__every=50, eval__every=400)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(config: Path, workdir: Path, hosts: int, *words: str, module="main", flags=False) -> list[subprocess.Popen]:
    """One process a host, each with one CPU device; told of the others by `flags`, or by the environment."""
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base |= {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # fmt: skip
    address, processes = f"localhost:{free_port()}", []
    for host in range(hosts):
        several = {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(host)
        }  # fmt: skip
        code = [str(module)] if isinstance(module, Path) else ["-m", f"softmask_jax.{module}"]
        command = [sys.executable, *code, f"--config={config}", f"--workdir={workdir}", *words]
        if flags:
            command += [f"--coordinator={address}", f"--processes={hosts}", f"--process={host}"]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=base | (several if hosts > 1 and not flags else {}), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    return processes


def finish(processes: list[subprocess.Popen], codes=None) -> list[str]:
    """What each printed; all are killed where one hangs."""
    deadline = time.monotonic() + PATIENCE
    try:
        printed = [process.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == (codes or [0] * len(processes)), "\n".join(printed)
    return printed


def until_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Return when the log has come so far, or a process has ended; `finish` tells why it has."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (workdir / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(workdir, "train")):
            return
        time.sleep(0.1)


def child(supervisor: subprocess.Popen) -> int:
    """The training process of a supervisor."""
    return int(Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()[0])


def lost(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Supervisor: Lost")]


def newest(workdir: Path) -> int:
    return max(int(step.name) for step in (workdir / "checkpoints").iterdir() if step.name.isdigit())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config of two micro-batches, and the run of a single process to compare with."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny_run.write_texts(folder / "texts")
    settings = tiny_run.settings(folder, train__micro_batches=2, train__log_every=1, sample__count=1)
    config = tiny_run.write_config(folder / "tiny.py", settings)
    tiny_run.write_config(folder / "long.py", tiny_run.settings(folder, **LONG))
    finish(start(config, folder / "one", 1))
    return folder


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(workdir, "train")])


def test_two_hosts_train_validate_and_end_as_one_does_and_one_of_them_writes(home):
    printed = finish(start(home / "tiny.py", home / "two", 2))
    np.testing.assert_allclose(losses(home / "two"), losses(home / "one"), rtol=1e-4)
    for kind in ("validation", "final"):
        for ours, theirs in zip(rows(home / "two", kind), rows(home / "one", kind), strict=True):
            np.testing.assert_allclose(ours["two_pass/nelbo"], theirs["two_pass/nelbo"], rtol=1e-3)
    assert_rows_are_unique(home / "two")
    ours, theirs = (json.loads((home / name / "summary.json").read_text()) for name in ("two", "one"))
    assert ours["step"] == theirs["step"]
    np.testing.assert_allclose(list(ours["validation"].values()), list(theirs["validation"].values()), 1e-3, 1e-5)
    for line in ("parameters on", "Validating and sampling", "Validation perplexity per token"):
        assert sum(line in text for text in printed) == 1


def test_a_stop_of_one_host_saves_on_all_and_a_single_process_continues_as_both_would(home):
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
    np.testing.assert_allclose(losses(workdir)[:4], losses(home / "one")[:4], rtol=1e-4)
    # The two steps after the stop: the same examples, noise and coins.
    np.testing.assert_allclose(losses(workdir), losses(home / "both"), rtol=1e-4)


@pytest.mark.soak
def test_four_hosts_train_as_one_does_and_two_of_them_go_on_with_the_same_examples(home):
    workdir = home / "four"
    finish(start(home / "tiny.py", workdir, 4, "--config.train.steps=4"))
    finish(start(home / "tiny.py", workdir, 2, "--config.train.steps=8"))
    np.testing.assert_allclose(losses(workdir), losses(home / "one"), rtol=1e-4)
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
    for text in printed:
        print(*(line for line in text.splitlines() if "step/s" not in line), sep="\n")
        first, second, third = lost(text)
        assert first.startswith("Supervisor: Lost host 1 (") and ": its process was killed by SIGKILL after step " in first
        assert second.startswith("Supervisor: Lost host 0 (") and "stopped" in second and "host 1" not in second
        assert "Restart 1 of 3 in 0.2 s, from the last checkpoint." in second
        assert third.startswith("Supervisor: Lost host 0 (") and "killed by SIGKILL" in third and "host 1" not in third
    assert "Continuing from step " in printed[0]


def test_a_stop_of_one_supervisor_saves_on_all_and_none_starts_again(home):
    workdir = home / "told to stop"
    supervisors = start(home / "long.py", workdir, 2, "--config.train.steps=40000", module="supervise", flags=True)
    until_step(workdir, 10, supervisors)
    supervisors[1].send_signal(signal.SIGTERM)
    printed = finish(supervisors)
    assert f"Stopped and saved at step {newest(workdir)};" in printed[0] and not lost("".join(printed))
    assert all("Supervisor" not in text for text in printed)


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
