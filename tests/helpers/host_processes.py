"""Processes on localhost that behave like hosts."""
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_run
from tests.helpers.tiny_run import rows
from tests.helpers.xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300
# Long enough to be disturbed on the way.
LONG = dict(train__steps=400, train__log_every=5, checkpoint__every=50, eval__every=400)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(config: Path, workdir: Path, hosts: int, *words: str, module="main", flags=False) -> list[subprocess.Popen]:
    """One process a host for a training run; see `begin`."""
    return begin(module, hosts, f"--config={config}", f"--workdir={workdir}", *words, flags=flags)


def begin(module, hosts: int, *words: str, flags=False) -> list[subprocess.Popen]:
    """One process a host, each with one CPU device; told of the others by `flags`, or by the environment."""
    base = os.environ | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": ONE_DEVICE,
        "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # fmt: skip
    address, processes = f"localhost:{free_port()}", []
    for host in range(hosts):
        several = {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(host)
        }  # fmt: skip
        code = [str(module)] if isinstance(module, Path) else ["-m", f"softmask_jax.{module}"]
        command = [sys.executable, *code, *words]
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
    """A folder with the config of a short run of two micro-batches, and that of a long one."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny_run.write_texts(folder / "texts")
    settings = tiny_run.settings(folder, train__micro_batches=2, train__log_every=1, sample__count=1)
    tiny_run.write_config(folder / "tiny.py", settings)
    tiny_run.write_config(folder / "long.py", tiny_run.settings(folder, **LONG))
    return folder


@pytest.fixture(scope="module")
def one(home):
    """The run of a single process, to compare with."""
    finish(start(home / "tiny.py", home / "one", 1))
    return home / "one"


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(workdir, "train")])
