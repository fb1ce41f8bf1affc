"""Training process as a child of its supervisor: started, monitored by heartbeats, ended."""
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
    """One child process at a time. stall, stall_else: seconds allowed for a step, and for anything else (compiling).
    unit: what its heartbeat counts, in one word."""

    def __init__(self, command: Sequence[str], *, stall: float, stall_else: float, unit: str = "step"):
        self.command, self.stall, self.stall_else, self.unit = list(command), stall, stall_else, unit
        self._folder = tempfile.TemporaryDirectory(prefix="softmask_jax_")  # local, as beats are frequent
        self._path = Path(self._folder.name) / "heartbeat"
        self._process: subprocess.Popen | None = None
        self._libc = ctypes.CDLL(None)

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._started, self._killed = time.monotonic(), False
        self._process = subprocess.Popen(
            self.command, env=os.environ | {heartbeat.VARIABLE: str(self._path)},
            # Own process group: the supervisor forwards Ctrl-C and kills the whole group.
            start_new_session=True,
            # Die with the supervisor; an orphan would interfere with its successor.
            preexec_fn=lambda: self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Step of the last beat; -1 before the first."""
        beat = heartbeat.read(self._path)
        return -1 if beat is None else beat.step

    def ended(self) -> int | None:
        """Exit status (negative: a signal), None while it runs."""
        return None if self._process is None else self._process.poll()

    def stalled(self) -> str:
        """Why the process counts as stalled, or ""."""
        beat = heartbeat.read(self._path)
        doing, seconds = ("starting", time.monotonic() - self._started) if beat is None else (beat.doing, beat.seconds)
        stepping = doing == heartbeat.STEPPING
        if seconds < (self.stall if stepping else self.stall_else):
            return ""
        what = "no new step" if stepping else f"{doing}, without an end,"
        stopped = " (the process is stopped)" if self.stopped() else ""
        return f"stalled: {what} for {seconds:.0f} s {self.where()}{stopped}"

    def stopped(self) -> bool:
        """Whether it is stopped by a signal (SIGSTOP, a debugger)."""
        with contextlib.suppress(OSError, IndexError, AttributeError):
            return Path(f"/proc/{self._process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] in "Tt"
        return False

    def where(self) -> str:
        """'after step 7' etc., for messages."""
        return f"after {self.unit} {self.step}" if self.step >= 0 else f"before its first {self.unit}"

    def terminate(self) -> bool:
        """Ask the process to save and end; returns whether one was running."""
        running = self._process is not None and self.ended() is None
        if running:
            self._process.send_signal(signal.SIGTERM)
        return running

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._process is not None and not self._killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._killed = True  # its group id may be reused from now on

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


def in_words(code: int) -> str:
    """Exit status in words: 'was killed by SIGKILL', 'failed with exit status 1'."""
    if code >= 0:
        return f"failed with exit status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
