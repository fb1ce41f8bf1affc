"""Messages between the supervisors of a run's hosts: one small file each in the folder that they share.

Host i writes `<workdir>/hosts/<i>.json` whole, when something changes and now and then as a sign of life. Others judge
by their own clock when it last changed, so clocks need not agree. Files of an earlier job never change: ignored.
"""
import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path

from softmask_jax.io.files import remove_leftovers, write_atomically

WAITING, RUNNING, DONE, OVER = "waiting", "running", "done", "over"
ENDS = (DONE, OVER)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Message of one supervisor."""

    process: int
    processes: int
    host: str
    life: str  # unlike that of any other supervisor process
    attempt: int = 0  # to train; a higher one than ours means: leave ours
    state: str = WAITING  # for the others to begin | RUNNING | DONE (exit status 0) | OVER (no restart)
    step: int = -1  # of its process
    why: str = ""  # what ended the attempt before, or everything, on this host; "" where it followed another one
    weight: int = 0  # how sure it is that the cause lies here
    code: int = 0  # exit status where it is over


@dataclasses.dataclass
class Peer:
    """Another host as seen from here."""

    process: int
    sign: Sign | None = None  # None before its first
    alive: bool = False  # from its first new message on
    anew: bool = False  # a new supervisor took the place of one that was alive
    changed: float = dataclasses.field(default_factory=time.monotonic)
    text: str | None = None

    @property
    def name(self) -> str:
        return f"{self.process} ({self.sign.host})" if self.sign else str(self.process)

    def quiet(self) -> float:
        """Seconds without a sign of life; 0 once it has ended."""
        return 0.0 if self.alive and self.sign.state in ENDS else time.monotonic() - self.changed


class Peers:
    """The exchange of one supervisor with the others in `workdir`/hosts; a run of one process writes nothing.

    every: seconds between signs of life.
    """

    def __init__(self, workdir: str | os.PathLike, process: int, processes: int, *, every: float):
        self.folder, self.every, self.shared = Path(workdir) / "hosts", every, processes > 1
        self.others = [Peer(i) for i in range(processes) if i != process]
        self.mine = Sign(process, processes, socket.gethostname(), uuid.uuid4().hex[:12])
        self._written, self._count, self._news = -float("inf"), 0, None
        if self.shared:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, f"{process}.json")  # of a supervisor killed while it wrote
            before = [_parse(self._read(i)) for i in range(processes)]
            self.look()
            for peer in self.others:
                peer.alive = False
            # Those that run, if any, see a higher attempt and come along; so this host cannot join one that it missed.
            self.say(attempt=max((sign.attempt for sign in before if sign), default=-1) + 1)

    def say(self, **changes) -> None:
        """Change this host's message; written at once where it matters to others, and otherwise as a sign of life."""
        self.mine = dataclasses.replace(self.mine, **changes)
        news = dataclasses.replace(self.mine, step=0)
        if not self.shared or (news == self._news and time.monotonic() - self._written < self.every):
            return
        self._count += 1
        content = json.dumps(dataclasses.asdict(self.mine) | {"count": self._count})
        # A network file system that has a bad moment: the next try comes soon, and silence is noticed by the others.
        with contextlib.suppress(OSError):
            write_atomically(self.folder / f"{self.mine.process}.json", content + "\n")
            self._news, self._written = news, time.monotonic()

    def look(self) -> None:
        """Read the others' messages."""
        for peer in self.others:
            text = self._read(peer.process)
            sign = _parse(text)
            if sign is not None and text != peer.text:
                # The first text read is perhaps an earlier job's; only a change shows life.
                peer.anew |= peer.alive and sign.life != peer.sign.life
                peer.alive, peer.sign, peer.text, peer.changed = True, sign, text, time.monotonic()

    def newest(self) -> int:
        """The highest attempt of the others; -1 where none is alive."""
        return max((peer.sign.attempt for peer in self.others if peer.alive), default=-1)

    def _read(self, process: int) -> str | None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / f"{process}.json").read_text(encoding="utf-8")
        return None


def _parse(text: str | None) -> Sign | None:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        values = json.loads(text or "")
        values.pop("count", None)
        return Sign(**values)
    return None
