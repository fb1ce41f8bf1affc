"""Rows of JSON Lines, or of arrays and values over several lines; files may be larger than memory."""
import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from softmask_jax.data.chat.conversations import is_message
from softmask_jax.data.sources.records import BYTE_ORDER_MARK
from softmask_jax.io.files import one_line

HEAD_BYTES, CHUNK_BYTES = 1 << 16, 1 << 20
ROW_CHARACTERS = 64 << 20
# The parser rejects truncated JSON within so many characters of its end, or at the beginning of a truncated string.
TAIL = 16
SPACES = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


def json_rows(opened: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Name and JSON of each row: lines as `name:17`, not parsed, elements of an array as `name:row 16`, from 0.
    Skips blank lines; an array of messages is one row. ValueError for a damaged array or too large a row."""
    head = opened.read(HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
    first_line = head.lstrip().partition(b"\n")[0]
    if first_line.startswith(b"[") or first_line.rstrip() == b"{":
        for number, text in enumerate(_Text(head, opened, name).rows()):
            yield f"{name}:row {number}", text.encode()
        return
    for number, line in enumerate(_lines(head, opened), 1):
        if line and not line.isspace():
            yield f"{name}:{number}", line


def _lines(head: bytes, opened: BinaryIO) -> Iterator[bytes]:
    for line in io.BytesIO(head):
        yield line if line.endswith(b"\n") else line + opened.readline()
    yield from opened


class _Text:
    """Text of a file from the current row on, which begins in line `_line`."""

    def __init__(self, head: bytes, opened: BinaryIO, name: str):
        self._opened, self._name = opened, name
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._line, self._row, self._ended = "", 1, 0, False
        self._append(head)

    def rows(self) -> Iterator[str]:
        """JSON of the file's values, arrays being replaced by their elements."""
        at = self._skip(0)
        while at < len(self._text):
            if self._text[at] != "[" or self._is_chat(at):
                at = yield from self._value(at)
                continue
            at = self._skip(at + 1)
            while not self._text.startswith("]", at):
                at = yield from self._value(at)
                if self._text.startswith(",", at):
                    at = self._skip(at + 1)
                elif not self._text.startswith("]", at):
                    raise self._error("no comma behind it" if at < len(self._text) else "the file is cut short", at)
            at = self._skip(at + 1)

    def _value(self, at: int):
        """Yield the value at `at` and drop it; return the position of the next character."""
        _, end = self._parse(at)
        yield self._text[at:end]
        self._row += 1
        if end > CHUNK_BYTES:
            self._line += self._text.count("\n", 0, end)
            self._text, end = self._text[end:], 0
        return self._skip(end)

    def _is_chat(self, at: int) -> bool:
        first = self._skip(at + 1)
        return not self._text.startswith("]", first) and is_message(self._parse(first)[0])

    def _skip(self, at: int) -> int:
        while (at := SPACES.match(self._text, at).end()) == len(self._text) and self._more(at):
            pass
        return at

    def _parse(self, at: int) -> tuple[object, int]:
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, at)
                if end < len(self._text) or not self._more(at):  # a number may go on
                    return value, end
            except json.JSONDecodeError as error:
                unterminated = error.msg.startswith("Unterminated string")
                if not (unterminated or error.pos >= len(self._text) - TAIL) or not self._more(at):
                    cut = unterminated or error.pos >= len(self._text.rstrip())
                    raise self._error("the file is cut short" if cut else error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._error(one_line(error, 100), at) from None

    def _more(self, start: int) -> bool:
        """Read on, as much as there is from `start` on; whether there was more."""
        if self._ended:
            return False
        size = len(self._text) - start
        if size > ROW_CHARACTERS:
            raise self._error(f"it has more than {ROW_CHARACTERS:,} characters", start)
        self._append(self._opened.read(max(CHUNK_BYTES, size)))
        return True

    def _append(self, content: bytes) -> None:
        self._ended = not content
        try:
            self._text += self._decode(content, self._ended)
        except UnicodeDecodeError as error:
            raise self._error(f"{error.reason}: no UTF-8", len(self._text)) from None

    def _error(self, reason: str, at: int) -> ValueError:
        line = self._line + self._text.count("\n", 0, at)
        row = f"row {self._row} of its JSON cannot be read ({reason}, line {line})"
        return ValueError(f"{self._name}: {row}; mend it, or write one row a line (JSON Lines)")
