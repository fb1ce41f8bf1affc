"""Prompts for generation, rows of a file.

A row is a line of JSON, or an element of a file's one array: a text, or an object with one of
    "prompt": text to continue
    "messages": [{"role", "content"}, ...] to answer, rendered by the model's chat template; in any form of
        `chat.conversations`, "system" beside it
    "parts": [text, 24, text, ...], a number being that many masks to fill
    "tokens": [ids], with the mask's id where text is to be generated
and optionally "id", "max_new_tokens" (of a prompt or messages) and "forced": {"3": text or id, ...}, fixed tokens at
positions of the answer, counted from 0 over the row's masks. In a .txt file every line is a prompt.
"""
import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from softmask_jax.data.chat import conversations
from softmask_jax.data.json_rows import json_rows
from softmask_jax.data.sources.records import BYTE_ORDER_MARK, nearest

KINDS = ("prompt", "messages", "parts", "tokens")
KEYS = (*KINDS, "id", "max_new_tokens", "forced", *conversations.KEYS, conversations.SYSTEM_KEY)
# Kind of a row of masks alone, which files do not have.
MASKS = "masks"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file. name: for messages. kind: of `KINDS`, or `MASKS` with value None.

    max_new_tokens: None if unset. forced: (position in the answer, text or id), in the row's order.
    """

    name: str
    kind: str
    value: object
    id: str | int | None = None
    max_new_tokens: int | None = None
    forced: tuple[tuple[int, str | int], ...] = ()

    @property
    def is_pattern(self) -> bool:
        """Whether the row places its masks, instead of being continued."""
        return self.kind in ("parts", "tokens", MASKS)


def read(path: str) -> list[Row]:
    """The rows of a file ("-": standard input) without blank lines.

    Raises ValueError without rows or for invalid ones, naming the first by file and line, OSError for an unreadable
    file.
    """
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise OSError(f"--prompts={path} cannot be read ({error.strerror}).") from None
    as_text = path.endswith(".txt")
    if as_text:
        lines = content.removeprefix(BYTE_ORDER_MARK).split(b"\n")
        numbered = [(f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        numbered = list(json_rows(io.BytesIO(content), name))
    if not numbered:
        raise ValueError(f"{name} holds no row: write a prompt on each line.")
    return every(numbered, lambda pair: _parse(*pair, as_text))


def every(values: Iterable, function: Callable) -> list:
    """function(value) of each. ValueError with the first error's message and the number of others."""
    results, errors = [], []
    for value in values:
        try:
            results.append(function(value))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1:,} more rows cannot be used either.)" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    return results


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the rows' content."""
    values = [[row.kind, row.value, row.id, row.max_new_tokens, row.forced] for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _parse(name: str, line: bytes, as_text: bool) -> Row:
    try:
        text = line.decode("utf-8")
        value = text.rstrip("\r") if as_text else json.loads(text, parse_constant=_refuse_constant)
        # Fails for half a surrogate pair, which JSON can hold.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        remedy = 'write {"prompt": "..."}, or name the file *.txt if its lines are prompts.'
        raise ValueError(f"{name}: not readable as JSON ({reason:.100}); {remedy}") from None
    return named(name, value)


def named(name: str, value: object) -> Row:
    """`parse`, with the row's name in errors."""
    try:
        return parse(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _refuse_constant(constant: str):
    raise ValueError(f"{constant} is not JSON")


def parse(name: str, value: object) -> Row:
    """The row of a JSON value. ValueError, without the row's name, for invalid ones."""
    if isinstance(value, str):
        value = {"prompt": value}
    if isinstance(value, list) and value and all(map(conversations.is_message, value)):
        value = {"messages": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"a row is text or an object, not {_kind(value)}.")
    for key in value:
        if key not in KEYS:
            raise ValueError(f"no key {key[:40]!r} is known; {nearest(key, KEYS)}.")
    value = {key: content for key, content in value.items() if content is not None}
    chat = any(key in value for key in conversations.KEYS)
    kinds = [kind for kind in KINDS if (chat if kind == "messages" else kind in value)]
    if len(kinds) != 1:
        raise ValueError(f"a row has one of {', '.join(KINDS)}; this has {' and '.join(kinds) or 'none of them'}.")
    kind, content = kinds[0], value.get(kinds[0])
    if chat:
        content = _messages(value)
    else:
        _check(kind, content)
        if conversations.SYSTEM_KEY in value:
            raise ValueError(f"{conversations.SYSTEM_KEY} belongs to messages.")
    if not isinstance(id_ := value.get("id"), (str, int, type(None))) or isinstance(id_, bool):
        raise ValueError(f"id must be text or an integer, not {_kind(id_)}.")
    row = Row(name, kind, content, id_, value.get("max_new_tokens"), _forced(value.get("forced", {})))
    if row.max_new_tokens is not None:
        if row.is_pattern:
            raise ValueError(f"max_new_tokens belongs to a prompt or messages; {kind} say themselves where masks are.")
        if not is_integer(row.max_new_tokens) or row.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, not {row.max_new_tokens!r}.")
    return row


def _check(kind: str, content: object) -> None:
    """Raise ValueError unless the content fits a row of the kind prompt, parts or tokens."""
    if kind == "prompt":
        if not isinstance(content, str):
            raise ValueError(f"prompt must be text, not {_kind(content)}.")
        if not content:
            raise ValueError("the prompt is empty; give it some text.")
        return
    is_list = isinstance(content, list) and content
    if kind == "tokens":
        if not is_list or not all(map(is_integer, content)):
            raise ValueError("tokens must be a list of ids, integers all.")
        return
    if not is_list:
        raise ValueError("parts must be a list of texts and numbers of masks.")
    for number, part in enumerate(content, 1):
        if not (isinstance(part, str) or (is_integer(part) and part > 0)):
            raise ValueError(f"part {number} must be text or a positive number of masks, not {part!r:.60}.")
    if not any(map(is_integer, content)):
        raise ValueError("nothing is masked: put a number of masks among the parts.")


def _messages(row: Mapping) -> list[dict[str, str]]:
    try:
        messages = conversations.read_row(row)
    except conversations.NoConversation as error:
        raise ValueError(f"the row {error}.") from None
    if not messages[-1]["content"]:
        raise ValueError("the last message is empty; give it some text.")
    return messages


def _forced(tokens: object) -> tuple[tuple[int, str | int], ...]:
    if not isinstance(tokens, Mapping):
        raise ValueError(f'forced must be an object such as {{"0": "text"}}, not {_kind(tokens)}.')
    for position, token in tokens.items():
        if not (position.isascii() and position.isdigit()):
            raise ValueError(f"forced has the position {position!r:.40}; positions count the answer's tokens from 0.")
        if not ((isinstance(token, str) and token) or is_integer(token)):
            raise ValueError(f"forced must have text or an id at position {position}, not {token!r:.60}.")
    return tuple((int(position), token) for position, token in tokens.items())


def is_integer(value: object) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), f"the number {value}")
