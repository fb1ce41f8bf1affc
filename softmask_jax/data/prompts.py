"""What to generate from: rows of a file, and what each of them asks for.

A row is a line of JSON, or an element of a file's one array: a text, or an object with one of
    "prompt": text, continued
    "messages": [{"role", "content"}, ...], rendered by the model's chat template and answered; in any form that
        conversations for training may have (see `data.conversations`), "system" beside it
    "parts": [text, 24, text, ...], where a number is that many masks to fill
    "tokens": [ids], with the mask's id where text is wanted
and, where wanted, "id", "max_new_tokens" (of a prompt or messages) and "forced": {"3": text or id, ...}, tokens that
must stand at a position of the answer, counted from 0 over the row's masks. In a .txt file every line is a prompt.
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
from softmask_jax.data.shards.records import BYTE_ORDER_MARK, nearest

KINDS = ("prompt", "messages", "parts", "tokens")
KEYS = (*KINDS, "id", "max_new_tokens", "forced", *conversations.KEYS, conversations.SYSTEM_KEY)
# The kind of a row of masks alone, which no file holds.
MASKS = "masks"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it was given. name: where, for messages. kind: of `KINDS`, or `MASKS`, whose value is None.

    max_new_tokens: None where the row does not say. forced: (position in the answer, text or id), in the row's order.
    """

    name: str
    kind: str
    value: object
    id: str | int | None = None
    max_new_tokens: int | None = None
    forced: tuple[tuple[int, str | int], ...] = ()

    @property
    def is_pattern(self) -> bool:
        """Whether the row says itself where its masks are, instead of being continued."""
        return self.kind in ("parts", "tokens", MASKS)


def read(path: str) -> list[Row]:
    """The rows of a file, of standard input for "-"; blank lines are passed over.

    Raises:
      ValueError: no row at all, or rows that are none; the first is named by file and line. OSError: no such file.
    """
    name = "standard input" if path == "-" else path
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        try:
            content = Path(os.path.expanduser(path)).read_bytes()
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
    """function(value) of each. ValueError with the first one's message, and how many more there are."""
    found, errors = [], []
    for value in values:
        try:
            found.append(function(value))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1:,} more rows cannot be used either.)" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    return found


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of what the rows say, wherever they were read from."""
    values = [[row.kind, row.value, row.id, row.max_new_tokens, row.forced] for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _parse(name: str, line: bytes, as_text: bool) -> Row:
    try:
        text = line.decode("utf-8")
        value = text.rstrip("\r") if as_text else json.loads(text, parse_constant=_refuse_constant)
        # Half a surrogate pair, which JSON can spell, can be neither encoded nor written.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'{name}: not readable as JSON ({reason:.100}); write {{"prompt": "..."}}, or name the file *.txt if its '
            "lines are prompts."
        ) from None
    return named(name, value)


def named(name: str, value: object) -> Row:
    """`parse`, its errors beginning with the row's name."""
    try:
        return parse(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _refuse_constant(constant: str):
    raise ValueError(f"{constant} is not JSON")


def parse(name: str, value: object) -> Row:
    """The row that a JSON value stands for. ValueError for one that stands for none, without the row's name."""
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
        _CHECKS[kind](content)
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


def _check_prompt(content: object) -> None:
    if not isinstance(content, str):
        raise ValueError(f"prompt must be text, not {_kind(content)}.")
    if not content:
        raise ValueError("the prompt is empty; give it some text.")


def _messages(row: Mapping) -> list[dict[str, str]]:
    try:
        messages = conversations.read_row(row)
    except conversations.NoConversation as error:
        raise ValueError(f"the row {error}.") from None
    if not messages[-1]["content"]:
        raise ValueError("the last message is empty; give it some text.")
    return messages


def _check_parts(content: object) -> None:
    if not isinstance(content, list) or not content:
        raise ValueError("parts must be a list of texts and numbers of masks.")
    for number, part in enumerate(content, 1):
        if not (isinstance(part, str) or (is_integer(part) and part > 0)):
            raise ValueError(f"part {number} must be text or a positive number of masks, not {part!r:.60}.")
    if not any(is_integer(part) for part in content):
        raise ValueError("nothing is masked: put a number of masks among the parts.")


def _check_tokens(content: object) -> None:
    if not isinstance(content, list) or not content or not all(is_integer(id_) for id_ in content):
        raise ValueError("tokens must be a list of ids, integers all.")


_CHECKS = {"prompt": _check_prompt, "parts": _check_parts, "tokens": _check_tokens}


def _forced(given: object) -> tuple[tuple[int, str | int], ...]:
    if not isinstance(given, Mapping):
        raise ValueError(f'forced must be an object such as {{"0": "text"}}, not {_kind(given)}.')
    found = []
    for place, token in given.items():
        if not (place.isascii() and place.isdigit()):
            raise ValueError(f"forced has the position {place!r:.40}; positions count the answer's tokens from 0.")
        if not ((isinstance(token, str) and token) or is_integer(token)):
            raise ValueError(f"forced must have text or an id at position {place}, not {token!r:.60}.")
        found.append((int(place), token))
    return tuple(found)


def is_integer(value: object) -> bool:
    """Whether a JSON value is one; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), f"the number {value}")
