"""A training process as its supervisor sees it: started, watched by its heartbeats, ended."""
import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from softmask_jax.distributed import heartbeat

_PR_SET_PDEATHSIG = 1


class Watched:
    """One process at a time.

    Args:
      command: what to run.
      stall: seconds that a step may take.
      stall_else: seconds that all else may take: the start with its compilation, validation, samples, saving.
    """

    def __init__(self, command: Sequence[str], *, stall: float, stall_else: float):
        self.command, self.stall, self.stall_else = list(command), stall, stall_else
        self._folder = tempfile.TemporaryDirectory(prefix="softmask_jax_")  # local: a beat at every step
        self._path = Path(self._folder.name) / "heartbeat"
        self._process: subprocess.Popen | None = None
        self._libc = ctypes.CDLL(None)

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._started, self._killed = time.monotonic(), False
        self._process = subprocess.Popen(
            self.command, env=os.environ | {heartbeat.VARIABLE: str(self._path)},
            # A group of its own: the supervisor passes on what a terminal's Ctrl-C means, and ends all of it.
            start_new_session=True, preexec_fn=self._die_with_parent,
        )  # fmt: skip

    def _die_with_parent(self) -> None:
        # Otherwise a process whose supervisor was killed goes on, and gets in the way of the one that comes next.
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    @property
    def step(self) -> int:
        """The last step that it has told of; -1 before the first."""
        beat = heartbeat.read(self._path)
        return -1 if beat is None else beat.step

    def ended(self) -> int | None:
        """The exit status (negative: a signal), None while it runs."""
        return None if self._process is None else self._process.poll()

    def stalled(self) -> str:
        """Why it counts as stalled, in words; "" while it does not."""
        beat = heartbeat.read(self._path)
        doing, seconds = ("starting", time.monotonic() - self._started) if beat is None else (beat.doing, beat.seconds)
        limit = self.stall if doing == heartbeat.STEPPING else self.stall_else
        if seconds < limit:
            return ""
        what = "no new step" if doing == heartbeat.STEPPING else f"{doing}, without an end,"
        return f"stalled: {what} for {seconds:.0f} s {self.where()}{' (the process is stopped)' if self.stopped() else ''}"

    def stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP, a debugger)."""
        with contextlib.suppress(OSError, IndexError, AttributeError):
            return Path(f"/proc/{self._process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] in "Tt"
        return False

    def where(self) -> str:
        """'after step 7' and the like."""
        return f"after step {self.step}" if self.step >= 0 else "before its first step"

    def terminate(self) -> bool:
        """Ask it to save and end; whether there was one to ask."""
        runs = self._process is not None and self.ended() is None
        if runs:
            self._process.send_signal(signal.SIGTERM)
        return runs

    def kill(self) -> None:
        """End it and what it started, at once."""
        if self._process is not None and not self._killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._killed = True  # the number of its group may be another's from now on

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


def in_words(code: int) -> str:
    """An exit status: 'was killed by SIGKILL', 'failed with exit status 1'."""
    if code >= 0:
        return f"failed with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
