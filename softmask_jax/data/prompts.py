"""Prompts for generation: lines of a .txt file, or rows of a JSON file, each a text or an object with one of

    "prompt": text to continue
    "messages": [{"role", "content"}, ...] to answer by the model's chat template; any form of `chat.conversations`
    "parts": [text, 24, text, ...], a number being that many masks to fill
    "tokens": [ids], with the mask's id where text is to be generated
and optionally "id", "max_new_tokens" (of a prompt or messages) and "forced": {"3": text or id, ...}, fixed tokens at
positions of the answer, counted from 0 over the row's masks."""
import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from softmask_jax.data.chat import conversations
from softmask_jax.data.json_rows import json_rows
from softmask_jax.data.sources.records import BYTE_ORDER_MARK, nearest
from softmask_jax.io.files import one_line
from softmask_jax.io.paths import to_path

KINDS = ("prompt", "messages", "parts", "tokens")
KEYS = (*KINDS, "id", "max_new_tokens", "forced", *conversations.KEYS, conversations.SYSTEM_KEY)
# Kind of a row of masks alone, which files do not have.
MASKS = "masks"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file."""

    name: str  # for error messages
    kind: str  # of `KINDS`, or `MASKS` with value None
    value: object
    id: str | int | None = None
    max_new_tokens: int | None = None
    forced: tuple[tuple[int, str | int], ...] = ()  # (position in the answer, text or id)

    @property
    def is_pattern(self) -> bool:
        """Whether the row places its masks, instead of being continued."""
        return self.kind in ("parts", "tokens", MASKS)


def read(path: str) -> list[Row]:
    """The rows of a file ("-": standard input). Raises ValueError, naming the first bad row, or OSError."""
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else to_path(path).read_bytes()
    except OSError as error:
        raise OSError(f"--prompts={path} cannot be read ({error.strerror}).") from None
    as_text = path.endswith(".txt")
    if as_text:
        lines = content.removeprefix(BYTE_ORDER_MARK).split(b"\n")
        numbered = [(f"{name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        numbered = list(json_rows(io.BytesIO(content), name))
    _require(numbered, f"{name} holds no row: write a prompt on each line.")
    return every(numbered, lambda pair: _decoded(*pair, as_text))


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


def _decoded(name: str, line: bytes, as_text: bool) -> Row:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        text = line.decode("utf-8")
        value = text.rstrip("\r") if as_text else json.loads(text, parse_constant=refuse)
        # Fails for half a surrogate pair, which JSON can hold.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        remedy = 'write {"prompt": "..."}, or name the file *.txt if its lines are prompts.'
        raise ValueError(f"{name}: not readable as JSON ({one_line(error, 100)}); {remedy}") from None
    return named(name, value)


def named(name: str, value: object) -> Row:
    """The row of a JSON value. Raises ValueError for invalid ones."""
    try:
        return _parse(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _parse(name: str, value: object) -> Row:
    if isinstance(value, str):
        value = {"prompt": value}
    if isinstance(value, list) and value and all(map(conversations.is_message, value)):
        value = {"messages": value}
    _require(isinstance(value, Mapping), f"a row is text or an object, not {_kind(value)}.")
    for key in value:
        _require(key in KEYS, f"no key {key[:40]!r} is known; {nearest(key, KEYS)}.")
    value = {key: content for key, content in value.items() if content is not None}
    chat = any(key in value for key in conversations.KEYS)
    kinds = [kind for kind in KINDS if (chat if kind == "messages" else kind in value)]
    _require(len(kinds) == 1, f"a row has one of {', '.join(KINDS)}; this has {' and '.join(kinds) or 'none of them'}.")
    kind, content = kinds[0], value.get(kinds[0])
    if chat:
        content = _messages(value)
    else:
        CHECKS[kind](content)
        _require(conversations.SYSTEM_KEY not in value, f"{conversations.SYSTEM_KEY} belongs to messages.")
    id_, limit = value.get("id"), value.get("max_new_tokens")
    valid_id = isinstance(id_, str | int | None) and not isinstance(id_, bool)
    _require(valid_id, f"id must be text or an integer, not {_kind(id_)}.")
    row = Row(name, kind, content, id_, limit, _forced(value.get("forced", {})))
    if limit is not None:
        belongs = f"max_new_tokens belongs to a prompt or messages; {kind} say themselves where masks are."
        _require(not row.is_pattern, belongs)
        _require(is_integer(limit) and limit > 0, f"max_new_tokens must be a positive integer, not {limit!r}.")
    return row


def _check_prompt(content: object) -> None:
    _require(isinstance(content, str), f"prompt must be text, not {_kind(content)}.")
    _require(content, "the prompt is empty; give it some text.")


def _check_parts(content: object) -> None:
    _require(isinstance(content, list) and content, "parts must be a list of texts and numbers of masks.")
    for number, part in enumerate(content, 1):
        valid = isinstance(part, str) or is_integer(part) and part > 0
        _require(valid, f"part {number} must be text or a positive number of masks, not {part!r:.60}.")
    _require(any(map(is_integer, content)), "nothing is masked: put a number of masks among the parts.")


def _check_tokens(content: object) -> None:
    valid = isinstance(content, list) and content and all(map(is_integer, content))
    _require(valid, "tokens must be a list of ids, integers all.")


CHECKS = {"prompt": _check_prompt, "parts": _check_parts, "tokens": _check_tokens}


def _messages(row: Mapping) -> list[dict[str, str]]:
    try:
        messages = conversations.read_row(row)
    except conversations.NoConversation as error:
        raise ValueError(f"the row {error}.") from None
    _require(messages[-1]["content"], "the last message is empty; give it some text.")
    return messages


def _forced(tokens: object) -> tuple[tuple[int, str | int], ...]:
    _require(isinstance(tokens, Mapping), f'forced must be an object such as {{"0": "text"}}, not {_kind(tokens)}.')
    for position, token in tokens.items():
        is_position = position.isascii() and position.isdigit()
        _require(is_position, f"forced has the position {position!r:.40}; positions count the answer's tokens from 0.")
        is_token = isinstance(token, str) and token or is_integer(token)
        _require(is_token, f"forced must have text or an id at position {position}, not {token!r:.60}.")
    return tuple((int(position), token) for position, token in tokens.items())


def is_integer(value: object) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), f"the number {value}")
