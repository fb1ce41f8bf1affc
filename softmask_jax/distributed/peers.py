"""What the supervisors of a run's hosts tell each other, through one small file each in the folder that they share.

`<workdir>/hosts/<i>.json` is written whole by host i when something changes and, as a sign of life, now and then. Others
judge by their own clock when it last changed, so clocks need not agree. Files of an earlier job lie still, and count for
nothing until they change.
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
    """What one supervisor says.

    Attributes:
      host: its name; life: of this supervisor process, unlike that of any other.
      attempt: the attempt to train that it is at, or waits for; a higher one than ours means: leave ours.
      state: waiting for the others to begin the attempt | running it | done (exit status 0) | over (no restart).
      step: that its process has reached, -1 before the first.
      why: what ended the attempt before, or everything, on this host; "" where it followed another one.
      weight: how sure it is that the cause lies here.
      code: the exit status where it is over.
    """

    process: int
    processes: int
    host: str
    life: str
    attempt: int = 0
    state: str = WAITING
    step: int = -1
    why: str = ""
    weight: int = 0
    code: int = 0


@dataclasses.dataclass
class Peer:
    """Another host as seen from here; `sign` is None where it never wrote, `alive` False until it writes anew; `anew`
    where a new supervisor took the place of one that was alive."""

    process: int
    sign: Sign | None = None
    alive: bool = False
    anew: bool = False
    changed: float = dataclasses.field(default_factory=time.monotonic)
    text: str | None = None

    @property
    def name(self) -> str:
        return f"{self.process} ({self.sign.host})" if self.sign else str(self.process)

    def quiet(self) -> float:
        """Seconds without a sign of life; 0 once it has ended."""
        return 0.0 if self.alive and self.sign.state in ENDS else time.monotonic() - self.changed


class Peers:
    """The exchange of one supervisor with the others.

    Args:
      workdir: of the run; `hosts/` in it is made. A run of one process leaves it alone.
      every: seconds between signs of life.
    """

    def __init__(self, workdir: str | os.PathLike, process: int, processes: int, *, every: float):
        self.folder, self.every, self.shared = Path(workdir) / "hosts", every, processes > 1
        self.others = [Peer(i) for i in range(processes) if i != process]
        self.mine = Sign(process, processes, socket.gethostname(), uuid.uuid4().hex[:12])
        self.written, self.count, self.said = -float("inf"), 0, None
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
        """Change what this host says; written at once where it matters to others, and otherwise as a sign of life."""
        self.mine = dataclasses.replace(self.mine, **changes)
        news = dataclasses.replace(self.mine, step=0)
        if not self.shared or (news == self.said and time.monotonic() - self.written < self.every):
            return
        self.count += 1
        content = json.dumps(dataclasses.asdict(self.mine) | {"count": self.count})
        # A network file system that has a bad moment: the next try comes soon, and silence is noticed by the others.
        with contextlib.suppress(OSError):
            write_atomically(self.folder / f"{self.mine.process}.json", content + "\n")
            self.said, self.written = news, time.monotonic()

    def look(self) -> None:
        """Read what the others say."""
        for peer in self.others:
            text = self._read(peer.process)
            sign = _parse(text)
            if sign is not None and text != peer.text:
                # The first text read is perhaps an earlier job's; only a change shows life.
                peer.anew |= peer.alive and sign.life != peer.sign.life
                peer.alive = True
                peer.sign, peer.text, peer.changed = sign, text, time.monotonic()

    def _read(self, process: int) -> str | None:
        try:
            return (self.folder / f"{process}.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None


def _parse(text: str | None) -> Sign | None:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        values = json.loads(text or "")
        values.pop("count", None)
        return Sign(**values)
    return None
