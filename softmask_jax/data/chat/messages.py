"""Where conversations come from: rows of JSON files, Parquet and Hugging Face's data sets, read by number."""
import functools
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from softmask_jax.data.chat.conversations import Conversation, Rejected, columns, conversation
from softmask_jax.data.json_rows import json_rows
from softmask_jax.data.sources.hubs import hugging_face_stamp, open_hugging_face
from softmask_jax.data.sources.listing import (
    Listed, check_compression, fingerprint, list_files, open_file, open_unpacked,
)

__all__ = ["Conversation", "Rejected", "Rows", "conversation", "open_rows"]

BATCH_ROWS = 500


class Rows(Protocol):
    """Rows by number. `files` are (name, number of rows) in order; `identity()` differs when the rows may differ."""

    files: tuple[tuple[str, int], ...]

    def identity(self) -> str: ...

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        """Name and value (or a `Rejected`) of the rows `numbers` [n], ascending."""


@dataclass(frozen=True)
class JsonRows:
    """See `json_rows`; plain or compressed. Raises ValueError for a damaged file, OSError otherwise."""

    listing: tuple[Listed, ...]

    @functools.cached_property
    def files(self) -> tuple[tuple[str, int], ...]:
        return tuple((file.name, sum(1 for _ in _lines(file))) for file in self.listing)

    def identity(self) -> str:
        return fingerprint("jsonl", self.listing)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        first = 0
        for file, (_, count) in zip(self.listing, self.files, strict=True):
            own = iter(numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + count)].tolist())
            wanted = next(own, None)
            for number, (name, line) in enumerate(_lines(file) if wanted is not None else (), first):
                if number == wanted:
                    yield name, _parse(name, line)
                    wanted = next(own, None)
                    if wanted is None:
                        break
            first += count


def _lines(file: Listed) -> Iterator[tuple[str, bytes]]:
    with open_unpacked(file) as opened:
        yield from json_rows(opened, file.name)


def _parse(name: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Rejected(name, "unreadable", f"is not readable JSON ({str(error).splitlines()[0]:.100})")


@dataclass(frozen=True)
class ParquetRows:
    """Of each file the columns that `columns` chose. Raises ValueError for a damaged file."""

    listing: tuple[Listed, ...]
    columns: tuple[tuple[str, ...], ...]
    files: tuple[tuple[str, int], ...]

    def identity(self) -> str:
        return fingerprint("parquet", self.columns, self.listing)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        first = 0
        for file, wanted, (name, count) in zip(self.listing, self.columns, self.files, strict=True):
            own = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + count)] - first
            row = 0
            for batch in _batches(file, wanted) if len(own) else ():
                inside = own[np.searchsorted(own, row) : np.searchsorted(own, row + len(batch))]
                values = batch.take(_indices(inside - row)).to_pylist()
                for number, value in zip(inside.tolist(), values, strict=True):
                    yield f"{name}:row {number}", value
                row += len(batch)
            first += count


def _indices(numbers: np.ndarray):
    import pyarrow

    return pyarrow.array(numbers)


def _batches(file: Listed, wanted: tuple[str, ...]) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    with open_file(file.path) as opened:
        try:
            whole = pyarrow.parquet.ParquetFile(opened)
            yield from whole.iter_batches(BATCH_ROWS, columns=list(wanted))
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file.name}: damaged or no Parquet file ({reason:.200}); fetch it again") from error


def _parquet_rows(patterns: str, key: str) -> ParquetRows:
    if not importlib.util.find_spec("pyarrow"):
        raise ImportError("chat data in parquet needs a package: pip install 'softmask_jax[parquet]'")
    import pyarrow
    import pyarrow.parquet

    listing = list_files(patterns, "parquet", "chats/*.parquet")
    chosen, files = [], []
    for file in listing:
        with open_file(file.path) as opened:
            try:
                whole = pyarrow.parquet.ParquetFile(opened)
                names, count = whole.schema_arrow.names, whole.metadata.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{file.name}: damaged or no Parquet file ({reason:.200}); fetch it again") from error
        chosen.append(_columns(file.name, names, key))
        files.append((file.name, count))
    return ParquetRows(listing, tuple(chosen), tuple(files))


def _columns(title: str, names: list[str], key: str) -> tuple[str, ...]:
    try:
        return tuple(columns(names, key))
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None


@dataclass(frozen=True)
class HubRows:
    """A split of a data set of Hugging Face, or a folder that `save_to_disk` wrote."""

    title: str
    columns: tuple[str, ...]
    stamp: str
    rows: object
    files: tuple[tuple[str, int], ...]

    def identity(self) -> str:
        return fingerprint("hf", self.title, self.columns, self.stamp, self.files)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        (_, count), = self.files
        for start in range(0, count, BATCH_ROWS):
            inside = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, start + BATCH_ROWS)]
            values = self.rows[start : min(start + BATCH_ROWS, count)] if len(inside) else {}
            for number in inside.tolist():
                yield f"{self.title}#{number}", {name: values[name][number - start] for name in self.columns}


def _hub_rows(paths: str, key: str) -> HubRows:
    title, location, _, rows = open_hugging_face(paths)
    chosen = _columns(title, list(rows.column_names), key)
    stamp = hugging_face_stamp(location, rows)
    return HubRows(title, chosen, stamp, rows.select_columns(list(chosen)), ((title, len(rows)),))


def _json_rows(patterns: str, key: str) -> JsonRows:
    listing = list_files(patterns, "jsonl", "chats/*.jsonl")
    check_compression(listing)
    return JsonRows(listing)


KINDS = {"jsonl": _json_rows, "parquet": _parquet_rows, "hf": _hub_rows}


def open_rows(spec: str, key: str = "") -> Rows:
    """The rows of `jsonl:GLOBS`, `parquet:GLOBS` or `hf:OWNER/NAME[/CONFIG]:SPLIT`; `key`: see `conversation`.

    Raises ValueError, ImportError or OSError, each one line that says what is missing: a package, a file, a column,
    the network; ValueError for a file without rows.
    """
    kind, colon, paths = spec.strip().partition(":")
    if not colon or kind not in KINDS:
        raise ValueError(f"data.paths: {spec.strip()!r} is not KIND:PATHS with a kind of {', '.join(KINDS)}")
    rows = KINDS[kind](paths, key)
    for name, count in rows.files:
        if not count:
            raise ValueError(f"{name}: holds no row; leave it out of data.paths")
    return rows
