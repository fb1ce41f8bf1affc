"""Heartbeat file: current step and phase of a training process, read by the supervisor on the same host.
Named by SOFTMASK_JAX_HEARTBEAT; unset, nothing is written. Times are CLOCK_MONOTONIC, shared by processes of a host."""
import os
import time
from typing import NamedTuple

VARIABLE = "SOFTMASK_JAX_HEARTBEAT"
STEPPING = "stepping"
_WIDTH = 64


class Beat(NamedTuple):
    step: int  # updates done; -1 before the first of this process
    doing: str  # phase, one word
    seconds: float  # since it was written


class Heartbeat:
    """Writer of beats, one system call each."""

    def __init__(self):
        path = os.environ.get(VARIABLE)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None

    def beat(self, step: int, doing: str = STEPPING) -> None:
        if self._file is not None:
            # Fixed width: each write replaces the whole record, so readers never see a partial one.
            os.pwrite(self._file, f"{step} {time.monotonic():.3f} {doing}".ljust(_WIDTH).encode(), 0)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read(path: str | os.PathLike) -> Beat | None:
    """Last beat in the file; None before the first."""
    try:
        with open(path, encoding="ascii") as file:
            step, when, doing = file.read(_WIDTH).split()
        return Beat(int(step), doing, max(time.monotonic() - float(when), 0.0))
    except (FileNotFoundError, ValueError):
        return None
