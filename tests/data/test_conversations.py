"""A conversation in a row, whichever way it is written, and what is wrong with a row that has none."""
import pytest

from softmask_jax.data.chat.conversations import KEYS, Rejected, columns, conversation
from tests.helpers.chats import chat

IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}


@pytest.mark.parametrize("messages", [
    [{"role": "HUMAN", "content": "q"}, {"role": "ASSISTANT", "content": "a"}],
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    [{"from": "user", "value": "q"}, {"from": "Model", "value": "a"}],
    [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]}, {"role": "bot", "content": ["a"]}],
    {"role": ["user", "assistant"], "content": ["q", "a"]},
    {"from": ["human", "gpt"], "value": ["q", "a"], "weight": None},
    {"role": ["user", "assistant"], "content": [{"type": ["text", "text"], "text": ["q", ""]}, ["a"]]},
    [{"role": "User", "content": "q", "from": None}, {"role": "assistant", "content": "a", "tool_calls": None}],
])  # fmt: skip
def test_roles_and_keys_of_every_style_become_ours(messages):
    for key in KEYS:
        assert conversation("row", {key: messages}).messages == tuple(chat("q", "a"))


@pytest.mark.parametrize("row", [
    {"messages": None, "conversations": chat("q", "a")}, {"messages": [], "conversations": chat("q", "a")},
    {"messages": {"role": None, "content": None}, "dialog": chat("q", "a")}, chat("q", "a"),
    {"conversations": chat("no", "no"), "messages": chat("q", "a")},
    {"prompt": "q", "completion": "a"}, {"prompt": chat("q"), "completion": chat("q", "a")[1:], "messages": None},
    {"prompt": "q", "response": "a"}, {"prompt": "no", "messages": chat("q", "a"), "completion": "no"},
    {"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "output": "a", "input": None},
    {"instruction": "", "input": "q", "output": "a"}, {"instruction": "no", "output": "no", "messages": chat("q", "a")},
    {"system": "", "messages": chat("q", "a")}, {"system": None, "messages": chat("q", "a")},
])  # fmt: skip
def test_a_row_holds_its_messages_under_the_first_key_that_is_filled(row):
    assert conversation("row", row).messages == tuple(chat("q", "a"))


def test_a_system_message_may_have_a_key_of_its_own():
    for messages in (chat("q", "a"), chat("q", "a", system="s")):
        assert conversation("row", {"system": "s", "messages": messages}).messages == tuple(chat("q", "a", system="s"))
    assert conversation("row", {"system": "s", "prompt": "q", "completion": "a"}).messages[0]["content"] == "s"


def test_the_input_of_an_instruction_follows_it_in_a_line_of_its_own():
    row = {"instruction": "Add.", "input": "2 + 3", "output": "5"}
    assert conversation("row", row | {"system": "s"}).messages == tuple(chat("Add.\n2 + 3", "5", system="s"))
    assert conversation("row", row | {"instruction": chat("q", "a", "Add.")}).messages == tuple(chat("q", "a", "Add.\n2 + 3", "5"))
    assert columns(row.keys() | {"id"}) == ["instruction", "output", "input"]


def test_with_a_key_of_ones_own_no_other_is_read():
    row = {"mine": None, "messages": chat("q", "a")}
    assert conversation("row", row, "mine").reason == "has in 'mine' null instead of a list of messages"
    assert conversation("row", {"mine": chat("q", "a")}, "mine").messages == tuple(chat("q", "a"))


@pytest.mark.parametrize(("row", "kind", "reason"), [
    ([], "messages", "is no JSON object but list"),
    ({"mesages": chat("q", "a")}, "messages", "has no key 'messages'; the nearest is 'mesages'"),
    ({"messages": "text"}, "messages", "has in 'messages' str instead of a list"),
    ({"messages": []}, "messages", "an empty list"),
    ({"messages": ["text"]}, "messages", "that is str, no object"),
    ({"messages": [{"role": "tool", "content": "4"}, *chat("q", "a")]}, "role", "(number 1) of the role 'tool'"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [1]}]}, "role", "that calls tools"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": None}]}, "content", "whose content is null"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": [1]}]}, "content", "whose content is list with a part"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": []}]}, "content", "whose content is an empty list"),
    ({"messages": [{"role": "user", "content": [IMAGE]}, *chat("q", "a")[1:]]}, "content", "type 'image_url'; only"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": [{"type": "text"}]}]}, "content", "text that has none"),
    ({"messages": [{"content": "q"}]}, "role", "has a message (number 1) without a role; write {"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": None, "function_call": {"n": 1}}]}, "role", "calls"),
    ({"messages": None}, "messages", "has in 'messages' null instead of a list"),
    ({"messages": None, "conversations": []}, "messages", "has in 'messages' null instead of a list"),
    ({"messages": {"role": ["user"], "content": []}}, "messages", "different lengths (1 of 'role', 0 of"),
    ({"messages": {"role": "user", "content": "q"}}, "messages", "has in 'messages' an object instead of a list"),
    ({"text": "q"}, "messages", "there are 'text'; a conversation is a list of messages under one of messages, conv"),
    ({"text": "q"}, "messages", "or a pair: prompt and completion; prompt and response; instruction (and input) and output"),
    ({"instruction": "q", "output": "a", "input": 4}, "content", "has in 'input' a text whose content is int"),
    ({"prompt": "q", "completion": 4}, "messages", "has in 'completion' int instead of a list of messages"),
    ({"messages": chat("q", "a", system="x"), "system": "y"}, "messages", "system message in 'system' and another"),
    ({"messages": chat("q", "a"), "system": 7}, "content", "has in 'system' a message whose content is int"),
    ([["q", "a"]], "messages", "is no JSON object but list"),
    ({"messages": chat("q", "\ud83d")}, "content", "half a character (\\ud83d)"),
    ({"messages": chat("q", "a", "q")}, "no response", "ends with a message of the user"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "no prompt", "holds a response alone"),
])  # fmt: skip
def test_a_row_that_is_no_conversation_says_why(row, kind, reason):
    found = conversation("a.jsonl:1", row)
    assert isinstance(found, Rejected) and found.kind == kind and reason in found.reason
