"""Conversations in the rows of JSON Lines, Parquet and Hugging Face's data sets, their roles by one set of names.

A row has a list of messages under `messages` or `conversations`, each {"role", "content"} or {"from", "value"}; the
last one is the assistant's, the response.
"""
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from softmask_jax.data.hubs import hugging_face_stamp, open_hugging_face
from softmask_jax.data.listing import (
    Listed, check_compression, fingerprint, list_files, open_file, open_unpacked,
)
from softmask_jax.data.records import BYTE_ORDER_MARK, nearest

KEYS = ("messages", "conversations")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
BATCH_ROWS = 500


class Conversation(NamedTuple):
    """Messages {"role": user | assistant | system, "content": str}; the last is the assistant's."""

    name: str
    messages: tuple[dict[str, str], ...]


class Rejected(NamedTuple):
    """A row that is no example. `kind` is what it is counted as; `name` and `reason` make a sentence."""

    name: str
    kind: str
    reason: str


class Rows(Protocol):
    """Rows by number. `files` are (name, number of rows) in order; `identity()` differs when the rows may differ."""

    files: tuple[tuple[str, int], ...]

    def identity(self) -> str: ...

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        """Name and value (or a `Rejected`) of the rows `numbers` [n], ascending."""


def conversation(name: str, row: object, key: str = "") -> Conversation | Rejected:
    """The messages of a row under `key` ("": the first of `KEYS` that it has)."""
    if isinstance(row, Rejected):
        return row
    if not isinstance(row, Mapping):
        return Rejected(name, "messages", f"is no JSON object but {type(row).__name__}")
    found = next((known for known in ([key] if key else KEYS) if known in row), None)
    if found is None:
        wanted = key or KEYS[0]
        return Rejected(name, "messages", f"has no key {wanted!r}; {nearest(wanted, row)}")
    if not isinstance(row[found], list) or not row[found]:
        kind = "an empty list" if row[found] == [] else type(row[found]).__name__
        return Rejected(name, "messages", f"has in {found!r} {kind} instead of a list of messages")
    messages = []
    for number, message in enumerate(row[found], 1):
        parsed = _message(message)
        if isinstance(parsed, tuple):
            return Rejected(name, parsed[0], f"has a message (number {number}) {parsed[1]}")
        messages.append(parsed)
    if messages[-1]["role"] != "assistant":
        return Rejected(name, "no response", f"ends with a message of the {messages[-1]['role']}, not the assistant")
    if len(messages) == 1:
        return Rejected(name, "no prompt", "holds a response alone; give the messages before it")
    return Conversation(name, tuple(messages))


def _message(message: object) -> dict[str, str] | tuple[str, str]:
    """A message by our names, or what it is counted as and what is wrong with it."""
    if not isinstance(message, Mapping):
        return "messages", f"that is {type(message).__name__}, no object"
    # Parquet fills in the fields that other rows have with nulls.
    role = message.get("role") if message.get("role") is not None else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if not isinstance(role, str) or role.casefold() not in ROLES:
        return "role", f"of the role {role!r}; known are {', '.join(ROLES)}"
    if message.get("tool_calls"):
        return "role", "that calls tools"
    if not isinstance(content, str):
        return "content", f"whose content is {'null' if content is None else type(content).__name__}, not text"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        return "content", f"with half a character (\\u{ord(content[error.start]):04x})"
    return {"role": ROLES[role.casefold()], "content": content}


@dataclass(frozen=True)
class JsonRows:
    """JSON Lines, plain or compressed, blank lines ignored. Raises ValueError for a damaged file, OSError otherwise."""

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
        for number, line in enumerate(opened, 1):
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not line.isspace() and line:
                yield f"{file.name}:{number}", line


def _parse(name: str, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Rejected(name, "unreadable", f"is not readable JSON ({str(error).splitlines()[0]:.100})")


@dataclass(frozen=True)
class ParquetRows:
    """One list of messages a row, in the column `keys` names for each file. Raises ValueError for a damaged file."""

    listing: tuple[Listed, ...]
    keys: tuple[str, ...]
    files: tuple[tuple[str, int], ...]

    def identity(self) -> str:
        return fingerprint("parquet", self.keys, self.listing)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        first = 0
        for file, key, (name, count) in zip(self.listing, self.keys, self.files, strict=True):
            own = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + count)] - first
            row = 0
            for batch in _batches(file, key) if len(own) else ():
                inside = own[np.searchsorted(own, row) : np.searchsorted(own, row + len(batch))]
                values = batch.column(0).take(_indices(inside - row)).to_pylist()
                for number, value in zip(inside.tolist(), values, strict=True):
                    yield f"{name}:row {number}", {key: value}
                row += len(batch)
            first += count


def _indices(numbers: np.ndarray):
    import pyarrow

    return pyarrow.array(numbers)


def _batches(file: Listed, key: str) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    with open_file(file.path) as opened:
        try:
            whole = pyarrow.parquet.ParquetFile(opened)
            yield from whole.iter_batches(BATCH_ROWS, columns=[key])
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file.name}: damaged or no Parquet file ({reason:.200}); fetch it again") from error


def _parquet_rows(patterns: str, key: str) -> ParquetRows:
    if not importlib.util.find_spec("pyarrow"):
        raise ImportError("chat data in parquet needs a package: pip install 'softmask_jax[parquet]'")
    import pyarrow
    import pyarrow.parquet

    listing = list_files(patterns, "parquet", "chats/*.parquet")
    keys, files = [], []
    for file in listing:
        with open_file(file.path) as opened:
            try:
                whole = pyarrow.parquet.ParquetFile(opened)
                columns, count = whole.schema_arrow.names, whole.metadata.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{file.name}: damaged or no Parquet file ({reason:.200}); fetch it again") from error
        keys.append(_column(file.name, columns, key))
        files.append((file.name, count))
    return ParquetRows(listing, tuple(keys), tuple(files))


def _column(title: str, columns: list[str], key: str) -> str:
    for known in [key] if key else KEYS:
        if known in columns:
            return known
    wanted = key or KEYS[0]
    raise ValueError(f"{title}: has no column {wanted!r} (data.messages_key); {nearest(wanted, columns)}")


@dataclass(frozen=True)
class HubRows:
    """A split of a data set of Hugging Face, or a folder that `save_to_disk` wrote."""

    title: str
    key: str
    stamp: str
    rows: object
    files: tuple[tuple[str, int], ...]

    def identity(self) -> str:
        return fingerprint("hf", self.title, self.key, self.stamp, self.files)

    def read(self, numbers: np.ndarray) -> Iterator[tuple[str, object]]:
        (_, count), = self.files
        for start in range(0, count, BATCH_ROWS):
            inside = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, start + BATCH_ROWS)]
            values = self.rows[start : min(start + BATCH_ROWS, count)][self.key] if len(inside) else ()
            for number in inside.tolist():
                yield f"{self.title}#{number}", {self.key: values[number - start]}


def _hub_rows(paths: str, key: str) -> HubRows:
    title, location, _, rows = open_hugging_face(paths)
    column = _column(title, list(rows.column_names), key)
    stamp = hugging_face_stamp(location, rows)
    return HubRows(title, column, stamp, rows.select_columns([column]), ((title, len(rows)),))


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
