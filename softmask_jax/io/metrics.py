"""A run's rows of metrics, one JSON object a line: metrics.jsonl, or in a bucket `metrics/<number>.jsonl`, as objects
cannot be appended to. Readers take both, so a run may be copied from one to the other."""
import os
import time
from collections.abc import Iterator
from pathlib import Path

from softmask_jax.io.files import explained, write_atomically
from softmask_jax.io.paths import BucketPath

FILE, FOLDER = "metrics.jsonl", "metrics"
PIECE_BYTES = 1 << 17  # a piece is put again with every write until it has so many
PUT_SECONDS = 5.0


def open_metrics(folder: Path) -> "_File | _Pieces":
    """The writer of a folder's rows: `append(line)`, `flush()`, `truncate(belongs)`, `close()`."""
    return _Pieces(folder) if isinstance(folder, BucketPath) else _File(folder)


def name(folder: Path) -> str:
    """Name of the file or folder with rows that a run writes."""
    return FOLDER if isinstance(folder, BucketPath) else FILE


def files(folder: Path) -> list[Path]:
    """The files with rows, oldest first."""
    file, pieces = folder / FILE, folder / FOLDER
    numbered = [path for path in pieces.iterdir() if _number(path)] if pieces.is_dir() else []
    return [file] * file.is_file() + sorted(numbered, key=_number)


def lines(folder: Path) -> Iterator[str]:
    """All lines, damaged ones too. FileNotFoundError without any file."""
    paths = files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} has no {FILE}.")
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _number(path: Path) -> int:
    return int(path.stem) if path.suffix == ".jsonl" and path.stem.isdigit() else 0


class _File:
    """Lines are in the file when `append` returns. OSError as `explained`."""

    def __init__(self, folder: Path):
        self.folder, self.path, self._file = folder, folder / FILE, None

    def append(self, line: bytes) -> None:
        with explained(self.path):
            if self._file is None:
                line = b"\n" * (self.path.exists() and _is_torn(self.path)) + line
                self._file = open(self.path, "ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]

    def flush(self) -> None:
        pass

    def truncate(self, belongs) -> int:
        """Drop the lines that do not belong, and count them."""
        self.close()
        dropped = 0
        for path in files(self.folder):
            with open(path, encoding="utf-8", errors="replace") as file:
                old = file.readlines()
            kept = [line.removesuffix("\n") + "\n" for line in old if belongs(line)]
            if len(kept) < len(old):
                write_atomically(path, "".join(kept))
            dropped += len(old) - len(kept)
        return dropped

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Pieces:
    """Lines are put PUT_SECONDS after those before, at the latest by `flush`, which precedes every checkpoint."""

    def __init__(self, folder: BucketPath):
        self.folder, self._number, self._piece, self._put, self._due = folder, 0, b"", True, 0.0

    def append(self, line: bytes) -> None:
        if not self._number:
            self._number = max(map(_number, files(self.folder)), default=0) + 1
        if len(self._piece) + len(line) > PIECE_BYTES and self._piece:
            self.flush()
            self._number, self._piece = self._number + 1, b""
        self._piece, self._put = self._piece + line, False
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        if not self._put:
            (self.folder / FOLDER / f"{self._number:06d}.jsonl").write_bytes(self._piece)
            self._put, self._due = True, time.monotonic() + PUT_SECONDS

    def truncate(self, belongs) -> int:
        """Drop the lines that do not belong from the newest pieces, back to one without such lines; count them."""
        self.close()
        dropped = 0
        for path in reversed(files(self.folder)):
            old = path.read_text("utf-8", "replace").splitlines(keepends=True)
            kept = [line for line in old if belongs(line)]
            if len(kept) == len(old):
                break
            dropped += len(old) - len(kept)
            if kept:
                path.write_bytes("".join(kept).encode())
            else:
                path.unlink()
        return dropped

    def close(self) -> None:
        self.flush()
        self._number, self._piece = 0, b""


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line, as after a kill."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() not in (b"", b"\n")
