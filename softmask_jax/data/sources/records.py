"""Text in the rows of files: JSON Lines, plain or compressed, and Parquet."""
import contextlib
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from softmask_jax.data.sources.documents import BadRow, Document, Source, spans
from softmask_jax.data.sources.listing import (
    Listed, fingerprint, is_compressed, list_files, open_file, open_unpacked, required,
)
from softmask_jax.io.files import one_line

PART_BYTES = 64 << 20
# Approximate text in a decoded batch of Parquet.
BATCH_BYTES = 4 << 20
# This many bad rows without a good one are an error.
HOPELESS_ROWS = 20
# Typical ratio.
COMPRESSION = 4
ONE_A_LINE = "this is JSON, but not JSON Lines: write one object a line, as `jq -c` does"
STRING_TYPES = ("string", "large_string", "string_view")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Half a surrogate pair: valid in JSON, in no encoding.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def checked(items: Iterable[Document | BadRow], name: str, whole: bool) -> Iterator[Document | BadRow]:
    """The items of a `whole` file or of a part. Raises ValueError at the end of a file, or long part, without texts."""
    first, bad, good = None, 0, False
    for item in items:
        if type(item) is BadRow:
            first, bad = first or item, bad + 1
        else:
            good = True
        yield item
    if bad >= HOPELESS_ROWS and not good or whole and first and not good:
        raise ValueError(f"{name}: none of its {bad} rows holds text; {first.name} {first.reason}; check data.text_key")
    if whole and not good:
        raise ValueError(f"{name}: holds no row; leave it out of data.paths")


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a message about a name that is not `known`."""
    known = [key if len(key) <= 40 else key[:37] + "..." for key in itertools.islice(known, 100)]
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"the nearest is {close[0]!r}"
    return "there are " + ", ".join(map(repr, known[:8])) if known else "there is none"


def no_column(title: str, key: str, names: Iterable[str]) -> str:
    return f"{title}: has no column {key!r} (data.text_key); {nearest(key, names)}"


def no_text_column(title: str, key: str, content: str) -> str:
    return f"{title}: column {key!r} holds {content}; name another in data.text_key"


def text_or_bad(name: str, value: object, key: str) -> Document | BadRow:
    """The row with this value of the field `key`: text, UTF-8 bytes, or neither."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRow(name, f"is not UTF-8 at byte {error.start} of {key!r}")
    if isinstance(value, str):
        return Document(name, value)
    return BadRow(name, f"has no text in {key!r} but {'null' if value is None else type(value).__name__}")


@dataclass(frozen=True)
class JsonLines(Source):
    """One JSON object a line; blank lines are ignored. Reading raises ValueError for damage or no text, or OSError."""

    listing: tuple[Listed, ...]
    text_key: str = "text"  # `meta.text` is `text` inside `meta`
    part_bytes: int = PART_BYTES  # a part has the lines that begin in such ranges
    name: str = "jsonl"

    @cached_property
    def _ranges(self) -> list[tuple[int, int, int]]:
        # (file, first byte, last + 1)
        ranges = []
        for number, file in enumerate(self.listing):
            starts = [0] if is_compressed(file) else range(0, file.size, self.part_bytes)
            ranges += [(number, start, min(start + self.part_bytes, file.size)) for start in starts]
        return ranges

    @cached_property
    def _groups(self) -> tuple[tuple[int, int], ...]:
        weights = [COMPRESSION if is_compressed(file) else 1 for file in self.listing]
        return spans(((stop - start) * weights[file] for file, start, stop in self._ranges), self.part_bytes)

    def identity(self) -> str:
        return fingerprint(self.name, self.text_key, self.part_bytes, self.listing)

    def read(self, part: int) -> Iterator[Document | BadRow]:
        for number, start, stop in self._ranges[slice(*self._groups[part])]:
            file = self.listing[number]
            whole = is_compressed(file) or stop - start == file.size
            lines = _lines(file, start, stop)
            rows = (_parse(name, line, self.text_key) for name, line in lines if not line.isspace())
            yield from checked(rows, file.name, whole)


def _lines(file: Listed, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    with open_unpacked(file) as opened:
        if start:
            # The first line of the range begins after a line end, possibly the last byte before `start`.
            opened.seek(start - 1)
            skipped = opened.readline(stop - start)
            offset = start - 1 + len(skipped) if skipped.endswith(b"\n") else stop
            while offset < stop and (line := opened.readline()):
                yield f"{file.name}:byte {offset}", line
                offset += len(line)
            return
        offset, stop = 0, math.inf if is_compressed(file) else stop
        for number, line in enumerate(opened, 1):
            offset += len(line)
            yield f"{file.name}:{number}", line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if offset >= stop:
                return


def _parse(name: str, line: bytes, text_key: str) -> Document | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(name, f"is not UTF-8 at byte {error.start} (0x{line[error.start]:02x}) of the line")
    except json.JSONDecodeError as error:
        hint = f"; {ONE_A_LINE}" if line.strip() in (b"[", b"[{", b"{") else ""
        return BadRow(name, f"is not valid JSON ({error.msg} at column {error.colno}){hint}")
    except (ValueError, RecursionError) as error:
        return BadRow(name, f"is not readable JSON ({one_line(error, 100)})")
    value, keys = row, text_key.split(".")
    for depth, key in enumerate([text_key] if isinstance(row, dict) and text_key in row else keys):
        inside = ".".join(keys[:depth])
        if not isinstance(value, dict):
            subject = f"has in {inside!r} no" if inside else "is no"
            hint = f"; {ONE_A_LINE}" if isinstance(row, list) else ""
            return BadRow(name, f"{subject} JSON object but {type(value).__name__}{hint}")
        if key not in value:
            known = (f"{inside}.{known}" if inside else known for known in value)
            return BadRow(name, f"has no key {text_key!r}; {nearest(text_key, known)}")
        value = value[key]
    if b"\\u" in line and isinstance(value, str) and (half := HALF_CHARACTER.search(value)):
        return BadRow(name, f"holds half a character (\\u{ord(half[0]):04x}) in {text_key!r}")
    return text_or_bad(name, value, text_key)


def json_lines(patterns: str | Iterable[str], text_key: str = "text") -> JsonLines:
    """Rows of the files of `list_files`. Raises its errors and ValueError for an empty file."""
    listing = list_files(patterns, "jsonl", "texts/*.jsonl")
    if empty := [file.name for file in listing if not file.size]:
        raise ValueError(f"{empty[0]}: is empty; leave it out of data.paths")
    return JsonLines(listing, text_key, PART_BYTES)


@dataclass(frozen=True)
class Parquet(Source):
    """One document a row, from the string column `text_key`. row_groups: (file, group, first row, rows, text bytes)."""

    listing: tuple[Listed, ...]
    row_groups: tuple[tuple[int, int, int, int, int], ...]
    text_key: str = "text"
    name: str = "parquet"

    @cached_property
    def _groups(self) -> tuple[tuple[int, int], ...]:
        return spans((size for *_, size in self.row_groups), PART_BYTES)

    def identity(self) -> str:
        return fingerprint(self.name, self.text_key, self._groups, self.listing)

    def read(self, part: int) -> Iterator[Document | BadRow]:
        chosen = self.row_groups[slice(*self._groups[part])]
        for number, groups in itertools.groupby(chosen, key=lambda group: group[0]):
            file, groups = self.listing[number], list(groups)
            whole = len(groups) == sum(group[0] == number for group in self.row_groups)
            yield from checked(self._rows(file, groups), file.name, whole)

    def _rows(self, file: Listed, groups: list[tuple[int, int, int, int, int]]) -> Iterator[Document | BadRow]:
        row = groups[0][2]
        rows, size = sum(group[3] for group in groups), sum(group[4] for group in groups)
        batch_rows = max(1, min(BATCH_BYTES * rows // max(size, 1), 1 << 16))
        with open_parquet(file) as opened:
            for batch in opened.iter_batches(batch_rows, [group[1] for group in groups], [self.text_key]):
                for value in _values(batch.column(0)):
                    yield text_or_bad(f"{file.name}:row {row}", value, self.text_key)
                    row += 1


def _values(column) -> Iterator[str | bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.large_binary()).to_pylist()


@contextlib.contextmanager
def open_parquet(file: Listed) -> Iterator:
    """The `pyarrow.parquet.ParquetFile`. Raises ValueError for a damaged file, also while it is read."""
    import pyarrow
    import pyarrow.parquet

    with open_file(file.path) as opened:
        try:
            # With a buffer, pages of a large row group are read as they are needed.
            yield pyarrow.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file.name}: damaged or no Parquet file ({one_line(error)}); fetch it again") from error


def parquet(patterns: str | Iterable[str], text_key: str = "text") -> Parquet:
    """Rows of the files of `list_files`. Raises its errors, ImportError without pyarrow, ValueError for unfit files."""
    pyarrow = required("pyarrow", "parquet", "data.source=parquet")
    listing = list_files(patterns, "parquet", "texts/*.parquet")
    row_groups: list[tuple[int, int, int, int, int]] = []
    for number, file in enumerate(listing):
        with open_parquet(file) as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
        if text_key not in schema.names:
            raise ValueError(no_column(file.name, text_key, schema.names))
        kind = schema.field(text_key).type
        if str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in STRING_TYPES:
            raise ValueError(no_text_column(file.name, text_key, f"{kind}, not strings"))
        if not metadata.num_rows:
            raise ValueError(f"{file.name}: holds no row; leave it out of data.paths")
        leaf = [metadata.schema.column(index).path for index in range(metadata.num_columns)].index(text_key)
        first = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            row_groups.append((number, index, first, group.num_rows, group.column(leaf).total_uncompressed_size))
            first += group.num_rows
    return Parquet(listing, tuple(row_groups), text_key)
