"""A file that one process appends to, synced and locked; in a bucket, whose objects cannot grow, kept in pieces.

Beside `out.jsonl` in a bucket are `out.jsonl.pieces/<number>`, what was appended since it was put last, and the lock."""
import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from softmask_jax.io import bucket_lock
from softmask_jax.io.files import explained, is_device, remove_leftovers, try_lock, write_atomically
from softmask_jax.io.paths import BucketPath


@contextlib.contextmanager
def appended(path: Path, elsewhere: str) -> Iterator["Appended"]:
    """The file, made if missing and locked. RuntimeError for one in use, OSError as `explained`."""
    with explained(path, elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_device(path):
            raise OSError(f"{path} is no file; {elsewhere}.")
    if isinstance(path, BucketPath):
        with bucket_lock.held(path.with_name(f"{path.name}.lock"), elsewhere):
            yield _Pieces(path)
        return
    with explained(path, elsewhere):
        file = open(path, "a+b", buffering=0)
    with file:
        if not try_lock(file.fileno(), path):
            remedy = f"Wait for it to end, stop it, or {elsewhere}."
            raise RuntimeError(f"{path} is being written by another process. {remedy}")
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
            raise RuntimeError(f"Another process has just ended with {path}; run the command again.")
        remove_leftovers(path.parent, glob.escape(path.name))
        yield Appended(path, file, elsewhere)


def read(path: Path) -> bytes:
    """What another process has appended; b"" if the file is absent."""
    with contextlib.suppress(FileNotFoundError):
        return _Pieces(path).read() if isinstance(path, BucketPath) else path.read_bytes()
    return b""


def remove(path: Path) -> None:
    """Remove another process's file, if it is there."""
    if isinstance(path, BucketPath):
        _Pieces(path).remove()
    else:
        path.unlink(missing_ok=True)


class Appended:
    """A local file."""

    def __init__(self, path: Path, file, elsewhere: str):
        self.path, self._file, self._elsewhere = path, file, elsewhere

    def read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def append(self, content: bytes) -> None:
        """Return when the content is on the disk."""
        with explained(self.path, self._elsewhere):
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())

    def truncate(self, size: int) -> None:
        with explained(self.path, self._elsewhere):
            self._file.truncate(size)

    def replace(self, content: bytes, changed: bool) -> None:
        """Replace the whole content; `changed`: whether it differs from what was appended."""
        if changed:
            write_atomically(self.path, [content], elsewhere=self._elsewhere)

    def remove(self) -> None:
        self.path.unlink()


class _Pieces(Appended):
    def __init__(self, path: BucketPath):
        self.path, self._folder = path, path.with_name(f"{path.name}.pieces")
        self._last = max((int(name) for name in self._folder.objects()), default=0)

    def read(self) -> bytes:
        whole = self.path.read_bytes() if self.path.exists() else b""
        return whole + b"".join((self._folder / name).read_bytes() for name in self._folder.objects())

    def append(self, content: bytes) -> None:
        self._last += 1
        (self._folder / f"{self._last:08d}").write_bytes(content)

    def truncate(self, size: int) -> None:
        self.replace(self.read()[:size], True)

    def replace(self, content: bytes, changed: bool) -> None:
        # Killed in between, rows are there twice, which readers by key do not mind.
        self.path.write_bytes(content)
        self._folder.rmtree(missing_ok=True)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._folder.rmtree(missing_ok=True)
