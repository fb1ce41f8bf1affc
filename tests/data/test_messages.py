"""Conversations from rows of every kind: roles by one set of names, and what is wrong with a row."""
import gzip
import json
import sys
import types

import numpy as np
import pytest

from softmask_jax.data.messages import Conversation, Rejected, conversation, open_rows
from tests.data.chats import chat, write_chats


def read(rows, numbers=None):
    count = sum(count for _, count in rows.files)
    numbers = np.arange(count) if numbers is None else np.array(numbers)
    return [conversation(name, row) for name, row in rows.read(numbers)]


def contents(found):
    return [item.messages[0]["content"] if isinstance(item, Conversation) else item.kind for item in found]


@pytest.mark.parametrize("messages", [
    [{"role": "HUMAN", "content": "q"}, {"role": "ASSISTANT", "content": "a"}],
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    [{"role": "User", "content": "q", "from": None}, {"role": "assistant", "content": "a", "tool_calls": None}],
])  # fmt: skip
def test_roles_and_keys_of_every_style_become_ours(messages):
    for key in ("messages", "conversations"):
        assert conversation("row", {key: messages}).messages == tuple(chat("q", "a"))


@pytest.mark.parametrize(("row", "kind", "reason"), [
    ([], "messages", "is no JSON object but list"),
    ({"mesages": chat("q", "a")}, "messages", "has no key 'messages'; the nearest is 'mesages'"),
    ({"messages": "text"}, "messages", "has in 'messages' str instead of a list"),
    ({"messages": []}, "messages", "an empty list"),
    ({"messages": ["text"]}, "messages", "that is str, no object"),
    ({"messages": [{"role": "tool", "content": "4"}, *chat("q", "a")]}, "role", "(number 1) of the role 'tool'"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [1]}]}, "role", "that calls tools"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": None}]}, "content", "whose content is null"),
    ({"messages": [*chat("q"), {"role": "assistant", "content": [1]}]}, "content", "whose content is list"),
    ({"messages": chat("q", "\ud83d")}, "content", "half a character (\\ud83d)"),
    ({"messages": chat("q", "a", "q")}, "no response", "ends with a message of the user"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "no prompt", "holds a response alone"),
])  # fmt: skip
def test_a_row_that_is_no_conversation_says_why(row, kind, reason):
    found = conversation("a.jsonl:1", row)
    assert isinstance(found, Rejected) and found.kind == kind and reason in found.reason


def test_json_lines_are_read_by_number_across_files_blank_lines_left_out(tmp_path):
    first = json.dumps({"messages": chat("q0", "a")}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + first + b"\n \n{\n")
    write_chats(tmp_path / "b.jsonl", [chat(f"q{n}", "a") for n in (2, 3, 4)], "conversations")
    packed = gzip.compress((tmp_path / "b.jsonl").read_bytes())
    (tmp_path / "c.jsonl.gz").write_bytes(packed)
    rows = open_rows(f"jsonl:{tmp_path}/a.jsonl,{tmp_path}/b.jsonl,{tmp_path}/c.jsonl.gz")
    assert [count for _, count in rows.files] == [2, 3, 3]
    assert contents(read(rows)) == ["q0", "unreadable", "q2", "q3", "q4", "q2", "q3", "q4"]
    assert contents(read(rows, [0, 3, 7])) == ["q0", "q3", "q4"]
    assert [item.name.rsplit("/")[-1] for item in read(rows, [1, 3])] == ["a.jsonl:3", "b.jsonl:2"]


def test_parquet_is_read_by_number_across_batches_and_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for name, key, first in (("a", "messages", 0), ("b", "conversations", 1200)):
        column = [chat(f"q{n}", "a") for n in range(first, first + 1200)]
        pyarrow.parquet.write_table(pyarrow.table({key: column, "id": range(1200)}), tmp_path / f"{name}.parquet")
    rows = open_rows(f"parquet:{tmp_path}/*.parquet")
    assert contents(read(rows)) == [f"q{n}" for n in range(2400)]
    assert contents(read(rows, [0, 499, 500, 1199, 1200, 2399])) == ["q0", "q499", "q500", "q1199", "q1200", "q2399"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="b.parquet: damaged or no Parquet file"):
        open_rows(f"parquet:{tmp_path}/*.parquet")


def test_a_data_set_of_the_hub_is_read_by_name_config_and_split(monkeypatch):
    class Rows:
        info = types.SimpleNamespace(version="1", download_checksums=None)
        column_names = ["id", "messages"]

        def __len__(self):
            return 1200

        def select_columns(self, names):
            assert names == ["messages"]
            return self

        def __getitem__(self, part):
            return {"messages": [chat(f"q{n}", "a") for n in range(1200)[part]]}

    asked = []
    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or Rows(), load_from_disk=None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows = open_rows("hf:HuggingFaceTB/smoltalk/all:test")
    assert asked == [(("HuggingFaceTB/smoltalk", "all"), {"split": "test"})]
    assert contents(read(rows, [3, 499, 500, 1199])) == ["q3", "q499", "q500", "q1199"]
    with pytest.raises(ValueError, match="has no column 'chat' .data.messages_key"):
        open_rows("hf:HuggingFaceTB/smoltalk/all:test", "chat")


@pytest.mark.parametrize(("spec", "message"), [
    ("chats.jsonl", "is not KIND:PATHS with a kind of jsonl, parquet, hf"), ("csv:a", "is not KIND:PATHS"),
])  # fmt: skip
def test_a_source_that_is_none_is_an_error(spec, message):
    with pytest.raises(ValueError, match=message):
        open_rows(spec)


def test_an_empty_or_missing_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="a.jsonl: holds no row"):
        open_rows(f"jsonl:{tmp_path}/a.jsonl")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_rows(f"jsonl:{tmp_path}/b.jsonl")
