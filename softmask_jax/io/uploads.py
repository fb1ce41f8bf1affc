"""Folders of other libraries that write only to disks: in a bucket a local one, whose files are uploaded as they grow."""
import contextlib
import logging
import math
import tempfile
import threading
from pathlib import Path

from softmask_jax.io.paths import BucketPath

EVERY = 30.0  # seconds
PIECE_BYTES = 1 << 20

log = logging.getLogger(__name__)


def mirror(path: Path) -> "Mirror":
    """The local folder to write into for `path`, which is that itself outside of buckets."""
    return _Uploads(path) if isinstance(path, BucketPath) else Mirror(path)


class Mirror:
    """A folder to write into.

    Attributes:
      folder: local; made by the caller if need be.
      piece_bytes: begin another file at this size, as a file that grew is sent again whole."""

    piece_bytes = math.inf

    def __init__(self, folder: Path):
        self.folder = folder

    def close(self) -> None:
        """Wait until everything is uploaded. A failure is logged as a warning."""


class _Uploads(Mirror):
    """A local folder whose files are sent to a bucket in the background, the rest by `close`."""

    piece_bytes = PIECE_BYTES

    def __init__(self, target: BucketPath):
        self._temporary = tempfile.TemporaryDirectory(prefix="softmask_jax_")
        super().__init__(Path(self._temporary.name))
        self._target, self._sent, self._ended = target, {}, threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._send()
        except OSError as error:
            log.warning("Not everything for %s was uploaded (%s).", self._target, error)
        self._temporary.cleanup()

    def _work(self) -> None:
        while not self._ended.wait(EVERY):
            with contextlib.suppress(OSError):  # the next time again
                self._send()

    def _send(self) -> None:
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if self._sent.get(name) != path.stat().st_size:
                content = path.read_bytes()
                (self._target / name).write_bytes(content)
                self._sent[name] = len(content)
