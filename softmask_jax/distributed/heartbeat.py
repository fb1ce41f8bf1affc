"""Heartbeat file: current step and phase of a training process, read by the supervisor beside it.

A supervisor names the file in SOFTMASK_JAX_HEARTBEAT; without it nothing is written. Times are of CLOCK_MONOTONIC,
which all processes of one host share.
"""
import os
import time
from typing import NamedTuple

VARIABLE = "SOFTMASK_JAX_HEARTBEAT"
STEPPING = "stepping"
_WIDTH = 64


class Beat(NamedTuple):
    step: int  # updates done, -1 before the first of this process
    doing: str  # phase, one word
    seconds: float  # since it was written


class Heartbeat:
    """Writes beats, one system call each."""

    def __init__(self):
        path = os.environ.get(VARIABLE)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None

    def beat(self, step: int, doing: str = STEPPING) -> None:
        if self._file is not None:
            # A fixed width overwrites the whole record before: a reader never sees a part of it.
            os.pwrite(self._file, f"{step} {time.monotonic():.3f} {doing}".ljust(_WIDTH).encode(), 0)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read(path: str | os.PathLike) -> Beat | None:
    """The last beat in the file; None before the first."""
    try:
        with open(path, encoding="ascii") as file:
            step, when, doing = file.read(_WIDTH).split()
        return Beat(int(step), doing, max(time.monotonic() - float(when), 0.0))
    except (FileNotFoundError, ValueError):
        return None
