"""Sources of conversations: rows of JSON files, Parquet and Hugging Face's data sets, read by number."""
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from softmask_jax.data.chat.conversations import Conversation, Rejected, columns, conversation
from softmask_jax.data.json_rows import json_rows
from softmask_jax.data.sources.hubs import hugging_face_stamp, open_hugging_face
from softmask_jax.data.sources.listing import Listed, fingerprint, list_files, open_unpacked, required
from softmask_jax.data.sources.records import open_parquet
from softmask_jax.io.files import one_line, split_paths

__all__ = ["Conversation", "Rejected", "Rows", "conversation", "open_rows"]

BATCH_ROWS = 500


class Rows:
    """Rows by number; reading raises ValueError for a damaged file, or OSError. Subclasses add `files`: (name, number
    of rows) in order, `identity()`, which changes with the rows, and `_read(file's number, ascending rows [n])`."""

    def __len__(self) -> int:
        return sum(count for _, count in self.files)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        """Name and value (or a `Rejected`) of the rows `numbers` [n], ascending."""
        first = 0
        for file, (_, count) in enumerate(self.files):
            rows = between(numbers, first, first + count) - first
            if len(rows):
                yield from self._read(file, rows)
            first += count


def between(numbers: np.ndarray, first: int, end: int) -> np.ndarray:
    """Those of ascending `numbers` that lie in [first, end)."""
    return numbers[slice(*np.searchsorted(numbers, (first, end)))]


@dataclass(frozen=True)
class JsonRows(Rows):
    """Rows of JSON files (see `json_rows`), plain or compressed."""

    listing: tuple[Listed, ...]

    @functools.cached_property
    def files(self) -> tuple[tuple[str, int], ...]:
        return tuple((file.name, sum(1 for _ in _lines(file))) for file in self.listing)

    def identity(self) -> str:
        return fingerprint("jsonl", self.listing)

    def _read(self, file: int, rows: np.ndarray) -> Iterator[tuple[str, object]]:
        lines, chosen = itertools.islice(_lines(self.listing[file]), int(rows[-1]) + 1), set(rows.tolist())
        return ((name, _parse(name, line)) for row, (name, line) in enumerate(lines) if row in chosen)


def _lines(file: Listed) -> Iterator[tuple[str, bytes]]:
    with open_unpacked(file) as opened:
        yield from json_rows(opened, file.name)


def _parse(name: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Rejected(name, "unreadable", f"is not readable JSON ({one_line(error, 100)})")


def _json_rows(patterns: str, key: str) -> JsonRows:
    return JsonRows(list_files(patterns, "jsonl", "chats/*.jsonl"))


@dataclass(frozen=True)
class ParquetRows(Rows):
    """Rows of Parquet files, only the columns with conversations."""

    listing: tuple[Listed, ...]
    columns: tuple[tuple[str, ...], ...]
    files: tuple[tuple[str, int], ...]

    def identity(self) -> str:
        return fingerprint("parquet", self.columns, self.listing)

    def _read(self, file: int, rows: np.ndarray) -> Iterator[tuple[str, object]]:
        import pyarrow

        first = 0
        with open_parquet(self.listing[file]) as opened:
            for batch in opened.iter_batches(BATCH_ROWS, columns=list(self.columns[file])):
                inside = between(rows, first, first + len(batch))
                values = batch.take(pyarrow.array(inside - first)).to_pylist()
                yield from zip((f"{self.files[file][0]}:row {row}" for row in inside), values, strict=True)
                first += len(batch)


def _parquet_rows(patterns: str, key: str) -> ParquetRows:
    required("pyarrow", "parquet", "chat data in parquet")
    listing, chosen, counts = list_files(patterns, "parquet", "chats/*.parquet"), (), ()
    for file in listing:
        with open_parquet(file) as opened:
            chosen += (_columns(file.name, opened.schema_arrow.names, key),)
            counts += ((file.name, opened.metadata.num_rows),)
    return ParquetRows(listing, chosen, counts)


def _columns(title: str, names: Iterable[str], key: str) -> tuple[str, ...]:
    try:
        return tuple(columns(names, key))
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None


@dataclass(frozen=True)
class HubRows(Rows):
    """A split of a data set of Hugging Face, or a folder of `save_to_disk`."""

    title: str
    columns: tuple[str, ...]
    stamp: str
    rows: object

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        return ((self.title, len(self.rows)),)

    def identity(self) -> str:
        return fingerprint("hf", self.title, self.columns, self.stamp, self.files)

    def _read(self, file: int, rows: np.ndarray) -> Iterator[tuple[str, object]]:
        for start in range(0, len(self.rows), BATCH_ROWS):
            inside = between(rows, start, start + BATCH_ROWS)
            values = self.rows[start : min(start + BATCH_ROWS, len(self.rows))] if len(inside) else {}
            for row in inside.tolist():
                yield f"{self.title}#{row}", {name: values[name][row - start] for name in self.columns}


def _hub_rows(paths: str, key: str) -> HubRows:
    title, location, _, rows = open_hugging_face(paths)
    chosen = _columns(title, rows.column_names, key)
    return HubRows(title, chosen, hugging_face_stamp(location, rows), rows.select_columns(list(chosen)))


KINDS = {"jsonl": _json_rows, "parquet": _parquet_rows, "hf": _hub_rows}
# Kinds of files by suffix, behind which those of compressed JSON may stand.
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")


def open_rows(entry: str, key: str = "") -> Rows:
    """The rows of `jsonl:GLOBS`, `parquet:GLOBS`, `hf:OWNER/NAME[/CONFIG]:SPLIT`, or of globs with one of `SUFFIXES`;
    `key`: see `conversation`. Raises ValueError, ImportError or OSError, also for a file without rows."""
    kind, paths = _kind_and_paths(entry.strip())
    rows = KINDS[kind](paths, key)
    if empty := [name for name, count in rows.files if not count]:
        raise ValueError(f"{empty[0]}: holds no row; leave it out of data.paths")
    return rows


def _kind_and_paths(entry: str) -> tuple[str, str]:
    kind, colon, paths = entry.partition(":")
    if colon and kind in KINDS:
        return kind, paths
    kinds = {SUFFIXES.get(_suffix(pattern)) for pattern in split_paths(entry, ",")}
    if len(kinds) == 1 and None not in kinds:
        return kinds.pop(), entry
    suffixes = f"files of one kind that end in {', '.join(SUFFIXES)} (JSON also with {' or '.join(COMPRESSED)})"
    raise ValueError(f"data.paths: {entry!r} is neither {suffixes}, nor KIND:PATHS with a kind of {', '.join(KINDS)}")


def _suffix(pattern: str) -> str:
    """The suffix of a path or glob in lower case, without that of a compressed file."""
    name = pattern.lower()
    for packed in COMPRESSED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]
