"""Messages between the supervisors of a run's hosts: one small file per host in the shared folder.

Host i atomically writes `<workdir>/hosts/<i>.json` on changes and regularly as a sign of life. Readers judge its age by
their own clock, so clocks need not agree; files that never change are from an earlier job and ignored."""
import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path

from softmask_jax.io.files import remove_leftovers, write_atomically
from softmask_jax.io.paths import to_path

WAITING, RUNNING, DONE, OVER = "waiting", "running", "done", "over"
ENDS = (DONE, OVER)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Message of one supervisor."""

    process: int
    processes: int
    host: str
    life: str  # unique id of a supervisor process
    attempt: int = 0  # a higher one than ours means: leave ours
    state: str = WAITING  # for the others | RUNNING | DONE (exit status 0) | OVER (no restart)
    step: int = -1  # of its process
    why: str = ""  # what ended the last attempt or the run on this host; "" if it followed another host
    weight: int = 0  # certainty that the cause lies here
    code: int = 0  # exit status if OVER
    count: int = 0  # of messages, so that each differs from the one before


@dataclasses.dataclass
class Peer:
    """Another host as seen from here."""

    process: int
    sign: Sign | None = None  # None before its first
    alive: bool = False  # since its first new message
    anew: bool = False  # a new supervisor replaced a live one
    changed: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return f"{self.process} ({self.sign.host})" if self.sign else str(self.process)

    def quiet(self) -> float:
        """Seconds without a sign of life; 0 once it has ended."""
        return 0.0 if self.alive and self.sign.state in ENDS else time.monotonic() - self.changed


class Peers:
    """Exchange of one supervisor with the others through `workdir`/hosts; nothing is written with one process.
    every: seconds between signs of life."""

    def __init__(self, workdir: str | os.PathLike, process: int, processes: int, *, every: float):
        self.folder, self.every, self.shared = to_path(workdir) / "hosts", every, processes > 1
        self.others = [Peer(i) for i in range(processes) if i != process]
        self.mine = Sign(process, processes, socket.gethostname(), uuid.uuid4().hex[:12])
        self._written, self._news = -float("inf"), None
        if self.shared:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, f"{process}.json")  # of a supervisor killed while writing
            before = [self._read(i) for i in range(processes)]
            self.look()
            for peer in self.others:
                peer.alive = False
            # Running hosts follow to the higher attempt, so this host never joins one that it missed.
            self.say(attempt=max((sign.attempt for sign in before if sign), default=-1) + 1)

    def say(self, **changes) -> None:
        """Change this host's message; written at once if it matters to others, else with the next sign of life."""
        self.mine = dataclasses.replace(self.mine, **changes)
        news = dataclasses.replace(self.mine, step=0, count=0)
        if not self.shared or (news == self._news and time.monotonic() - self._written < self.every):
            return
        self.mine = dataclasses.replace(self.mine, count=self.mine.count + 1)
        # Transient errors of a network file system: the next try is soon, and others notice silence.
        with contextlib.suppress(OSError):
            write_atomically(self._path(self.mine.process), json.dumps(dataclasses.asdict(self.mine)) + "\n")
            self._news, self._written = news, time.monotonic()

    def look(self) -> None:
        """Read the others' messages."""
        for peer in self.others:
            sign = self._read(peer.process)
            if sign is not None and sign != peer.sign:
                # The first may be an earlier job's; only a change shows life.
                peer.anew |= peer.alive and sign.life != peer.sign.life
                peer.alive, peer.sign, peer.changed = True, sign, time.monotonic()

    def newest(self) -> int:
        """Highest attempt of the others; -1 if none is alive."""
        return max((peer.sign.attempt for peer in self.others if peer.alive), default=-1)

    def _path(self, process: int) -> Path:
        return self.folder / f"{process}.json"

    def _read(self, process: int) -> Sign | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Sign(**json.loads(self._path(process).read_text("utf-8")))
        return None
