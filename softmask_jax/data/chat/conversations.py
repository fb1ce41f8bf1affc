"""Conversations of any common format as messages of one form.

A row has messages under the first filled one of `KEYS`, or a pair of `PAIRS`, and maybe a `SYSTEM_KEY`. Messages are
{"role", "content"} or {"from", "value"} (ShareGPT), a list or an object of lists; content is text or a list of parts
of text."""
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from softmask_jax.data.sources.records import HALF_CHARACTER, nearest

KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")


class Pair(NamedTuple):
    """Keys of prompt and answer, text or messages; `more` is text that may follow the prompt in a line of its own."""

    prompt: str
    answer: str
    more: str = ""

    def __str__(self) -> str:
        return f"{self.prompt}{f' (and {self.more})' if self.more else ''} and {self.answer}"


# Alpaca's is the last.
PAIRS = (Pair("prompt", "completion"), Pair("prompt", "response"), Pair("instruction", "output", "input"))
SYSTEM_KEY = "system"
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
TEXT_TYPES = (None, "text", "input_text", "output_text")
EXPECTED = (
    f"a conversation is a list of messages under one of {', '.join(KEYS)}, or a pair: {'; '.join(map(str, PAIRS))}"
)


class Conversation(NamedTuple):
    """Messages {"role": user | assistant | system, "content": str}; the last is the assistant's."""

    name: str
    messages: tuple[dict[str, str], ...]


class Rejected(NamedTuple):
    """A row that is no example: its `kind` in statistics; `name` and `reason` make a sentence."""

    name: str
    kind: str
    reason: str


class NoConversation(ValueError):
    """A row without a conversation: `kind` as in `Rejected`; the message is a sentence without its subject."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def conversation(name: str, row: object, key: str = "") -> Conversation | Rejected:
    """The messages of a row under `key` ("": any), the last of which must be a response."""
    if isinstance(row, Rejected):
        return row
    try:
        messages = read_row(row, key)
        if messages[-1]["role"] != "assistant":
            raise NoConversation("no response", f"ends with a message of the {messages[-1]['role']}, not the assistant")
        if len(messages) == 1:
            raise NoConversation("no prompt", "holds a response alone; give the messages before it")
    except NoConversation as error:
        return Rejected(name, error.kind, str(error))
    return Conversation(name, tuple(messages))


def columns(names: Iterable[str], key: str = "") -> list[str]:
    """The columns of a table that `read_row` needs. ValueError, the end of a sentence, when none is a conversation."""
    names = list(names)
    lists = [name for name in ([key] if key else KEYS) if name in names]
    pairs = [] if key else [
        name for pair in PAIRS if {pair.prompt, pair.answer} <= set(names) for name in pair if name in names
    ]  # fmt: skip
    if not lists and not pairs:
        raise ValueError(_missing("column", key, names))
    return list(dict.fromkeys([*lists, *pairs, *[SYSTEM_KEY] * (SYSTEM_KEY in names)]))


def read_row(row: object, key: str = "") -> list[dict[str, str]]:
    """The messages of a row, at least one. Raises NoConversation."""
    if isinstance(row, list) and row and all(map(is_message, row)):
        return read_messages(row)
    if not isinstance(row, Mapping):
        raise NoConversation("messages", f"is no JSON object but {type(row).__name__}")
    present = [name for name in ([key] if key else KEYS) if name in row]
    filled = next((name for name in present if _is_filled(row[name])), None)
    pair = None if key else next((pair for pair in PAIRS if _has(row, pair.prompt) and _has(row, pair.answer)), None)
    if filled is None and pair:
        messages = _half(row, pair.prompt, "user")
        if pair.more and row.get(pair.more) not in (None, ""):
            more = _message({"role": "user", "content": row[pair.more]}, f"has in {pair.more!r} a text")
            messages[-1]["content"] = "\n".join(filter(None, (messages[-1]["content"], more["content"])))
        messages += _half(row, pair.answer, "assistant")
    elif present:
        name = filled or present[0]
        messages = read_messages(row[name], name)
    else:
        raise NoConversation("messages", _missing("key", key, row))
    if row.get(SYSTEM_KEY) in (None, ""):
        return messages
    system = _message({"role": "system", "content": row[SYSTEM_KEY]}, f"has in {SYSTEM_KEY!r} a message")
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise NoConversation("messages", f"has a system message in {SYSTEM_KEY!r} and another among its messages")
    return messages


def read_messages(value: object, name: str = KEYS[0]) -> list[dict[str, str]]:
    """A list of messages, or an object of lists, under our names. Raises NoConversation. name: the value's key."""
    value = _by_row(value, name)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise NoConversation("messages", f"has in {name!r} {_kind(value)} instead of a list of messages")
    return [_message(message, f"has a message (number {number})") for number, message in enumerate(value, 1)]


def is_message(value: object) -> bool:
    """Whether a JSON value is a message, valid or not, rather than a row with messages."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value) and not any(key in value for key in KEYS)


def _missing(field: str, key: str, names: Iterable[str]) -> str:
    name = key or KEYS[0]
    setting = " (data.messages_key)" if field == "column" else ""
    return f"has no {field} {name!r}{setting}; {nearest(name, names)}" + ("" if key else f"; {EXPECTED}")


def _kind(value: object) -> str:
    return "an empty list" if value == [] else "null" if value is None else type(value).__name__


def _has(row: Mapping, name: str) -> bool:
    return row.get(name) is not None


def _half(row: Mapping, name: str, role: str) -> list[dict[str, str]]:
    """The messages of one key of a pair."""
    return read_messages([{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name], name)


def _is_filled(value: object) -> bool:
    return any(value.values()) if isinstance(value, Mapping) else bool(value)


def _by_row(value: object, name: str) -> object:
    """A list of objects from an object of lists; any other value unchanged."""
    if not isinstance(value, Mapping):
        return value
    fields = {key: items for key, items in value.items() if isinstance(items, list)}
    if not fields or len(set(map(len, fields.values()))) > 1:
        lengths = ", ".join(f"{len(items)} of {key!r}" for key, items in fields.items())
        kind = f"lists of different lengths ({lengths})" if fields else "an object"
        raise NoConversation("messages", f"has in {name!r} {kind} instead of a list of messages")
    return [dict(zip(fields, items, strict=True)) for items in zip(*fields.values(), strict=True)]


def _message(message: object, subject: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise NoConversation("messages", f"{subject} that is {type(message).__name__}, no object")
    # Fields of other rows are null in Parquet.
    fields = {key: value for key, value in message.items() if value is not None}
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    if role is None:
        raise NoConversation("role", f'{subject} without a role; write {{"role": "user", "content": "..."}}')
    if not isinstance(role, str) or role.casefold() not in ROLES:
        raise NoConversation("role", f"{subject} of the role {role!r:.60}; known are {', '.join(ROLES)}")
    if fields.get("tool_calls") or fields.get("function_call"):
        raise NoConversation("role", f"{subject} that calls tools")
    if isinstance(content, list | Mapping) and content:
        content = "".join(_part(part, subject) for part in _by_row(content, "content"))
    if not isinstance(content, str):
        raise NoConversation("content", f"{subject} whose content is {_kind(content)}, not text")
    if half := HALF_CHARACTER.search(content):
        raise NoConversation("content", f"{subject} with half a character (\\u{ord(half[0]):04x})")
    return {"role": ROLES[role.casefold()], "content": content}


def _part(part: object, subject: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise NoConversation("content", f"{subject} whose content is list with a part that is {type(part).__name__}")
    if part.get("type") not in TEXT_TYPES:
        raise NoConversation("content", f"{subject} with a part of the type {part['type']!r:.60}; only text is read")
    if not isinstance(part.get("text"), str):
        raise NoConversation("content", f"{subject} with a part of text that has none")
    return part["text"]
