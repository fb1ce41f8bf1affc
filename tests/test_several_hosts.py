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

from tests import tiny_run
from tests.tiny_run import assert_rows_are_unique, rows

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("hosts")]

ROOT = Path(__file__).parent.parent
PATIENCE = 150


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(config: Path, workdir: Path, hosts: int, *overrides: str) -> list[subprocess.Popen]:
    """One process a host, each with one CPU device."""
    base = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    base |= {
        "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # fmt: skip
    address, processes = f"localhost:{free_port()}", []
    for host in range(hosts):
        several = {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(host)
        }  # fmt: skip
        command = [sys.executable, "-m", "softmask_jax.main", f"--config={config}", f"--workdir={workdir}", *overrides]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=base | (several if hosts > 1 else {}), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each printed; all are killed where one hangs."""
    try:
        printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return printed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config of two micro-batches, and the run of a single process to compare with."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny_run.write_texts(folder / "texts")
    settings = tiny_run.settings(folder, train__micro_batches=2, train__log_every=1, sample__count=1)
    config = tiny_run.write_config(folder / "tiny.py", settings)
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
    processes = start(home / "tiny.py", workdir, 2, steps)
    deadline = time.monotonic() + PATIENCE
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir, "train")) < 5:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            break  # `finish` tells why
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes)
    saved = max(int(step.name) for step in (workdir / "checkpoints").iterdir() if step.name.isdigit())
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
