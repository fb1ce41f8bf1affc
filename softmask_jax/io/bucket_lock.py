"""A lock of a folder in a bucket, by objects that only one process can create.

`.lock/<n>` is the n-th turn. Its holder writes it again every RENEWAL seconds, and in the end as released. A turn that
was released, whose process has died on this host, or that does not change for SILENCE seconds is over: who then creates
the next one, on the condition that there is none (a generation precondition), holds the lock. Clocks need not agree."""
import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from softmask_jax.io.paths import BucketPath

RENEWAL, SILENCE = 10.0, 45.0
POLL = 1.0

log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(path: BucketPath, elsewhere: str) -> Iterator[Callable[[], None]]:
    """Hold the lock in the folder `path`; yields `Lock.check`. RuntimeError if another process holds it."""
    lock = Lock(path, elsewhere)
    lock.acquire()
    try:
        yield lock.check
    finally:
        lock.release()


class Lock:
    """One process's part."""

    def __init__(self, path: BucketPath, elsewhere: str):
        self.path, self.elsewhere, self.turn, self.lost = path, elsewhere, 0, False
        self._me = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "life": uuid.uuid4().hex, **_here()}
        self._count, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._renew, name="bucket lock", daemon=True)

    def acquire(self) -> None:
        while not self.turn:
            last = max(self._turns(), default=0)
            if last and not self._is_over(last):
                holder = (self._read(last) or {}).get("holder", "another process")
                remedy = f"Wait for it to end, stop it, or {self.elsewhere}"
                raise RuntimeError(f"{self.path.parent} is in use by {holder}. {remedy}.")
            if (self.path / str(last + 1)).create(self._content()):
                self.turn = last + 1
                # The listing may have been older than this turn's deletion by the holder of a later one.
                if max(self._turns(), default=0) > self.turn:
                    (self.path / str(self.turn)).unlink(missing_ok=True)
                    self.turn = 0
        for turn in self._turns():
            if turn < self.turn:
                (self.path / str(turn)).unlink(missing_ok=True)
        self._thread.start()

    def check(self) -> None:
        """RuntimeError if another process took the lock over, after this one was silent for too long (stopped, offline)."""
        if self.lost:
            folder = self.path.parent
            raise RuntimeError(f"{folder} was taken over by another process, as this one was silent for too long.")

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # the next one waits, or sees that this process is gone
                (self.path / str(self.turn)).write_bytes(self._content(released=True))

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            with contextlib.suppress(OSError):  # tried again; others judge by silence
                if max(self._turns(), default=0) > self.turn:
                    self.lost = True
                    return
                (self.path / str(self.turn)).write_bytes(self._content())

    def _content(self, released: bool = False) -> bytes:
        self._count += 1
        content = self._me | {"count": self._count, "released": released}
        return json.dumps(content).encode()

    def _turns(self) -> list[int]:
        return [int(name) for name in self.path.objects() if name.isdigit()]

    def _read(self, turn: int) -> dict | None:
        """A turn's content; None if it is gone."""
        try:
            return json.loads((self.path / str(turn)).read_bytes())
        except FileNotFoundError:
            return None

    def _is_over(self, turn: int) -> bool:
        """Whether nobody holds that turn; waits for its silence if need be."""
        first, deadline = self._read(turn), time.monotonic() + SILENCE
        if first is None or first["released"]:
            return True
        if first["where"] and first["where"] == self._me["where"]:
            return not _is_alive(first)
        log.info("%s: waiting up to %.0f s for a sign of %s.", self.path.parent, SILENCE, first["holder"])
        while time.monotonic() < deadline:
            time.sleep(POLL)
            now = self._read(turn)
            if now is None or now["released"]:
                return True
            if now != first:
                return False
        return True


def _here() -> dict:
    """What tells this process from every other: machine since its start, namespace of ids, id, its own start."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return {"where": f"{boot} {os.readlink('/proc/self/ns/pid')}", "pid": os.getpid(), "start": _start(os.getpid())}
    return {"where": "", "pid": 0, "start": ""}


def _start(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]


def _is_alive(holder: dict) -> bool:
    """Whether a holder on this host still runs."""
    try:
        return _start(holder["pid"]) == holder["start"]
    except (OSError, IndexError):
        return False
