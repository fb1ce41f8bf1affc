"""Conversations in files of every kind, read by number."""
import gzip
import json
import sys
import types

import numpy as np
import pytest

from softmask_jax.data.chat.messages import Conversation, conversation, open_rows
from tests.helpers.chats import chat, write_chats


def read(rows, numbers=None):
    count = sum(count for _, count in rows.files)
    numbers = np.arange(count) if numbers is None else np.array(numbers)
    return [conversation(name, row) for name, row in rows.read(numbers)]


def contents(found):
    return [item.messages[0]["content"] if isinstance(item, Conversation) else item.kind for item in found]


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


@pytest.mark.parametrize("shape", ["lists", "struct of lists", "parts", "null beside another", "prompt and completion"])
def test_parquet_holds_conversations_in_every_shape(tmp_path, shape):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    chats = [chat(f"q{n}", f"a{n}") for n in range(3)]
    by_column = [{name: [message[name] for message in messages] for name in ("role", "content")} for messages in chats]
    parts = [[m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages] for messages in chats]
    columns = {
        "lists": {"messages": chats, "system": [None, "", None]},
        "struct of lists": {"conversations": by_column},
        "parts": {"messages": parts},
        "null beside another": {"messages": [None, None, chats[2]], "conversations": [*by_column[:2], None]},
        "prompt and completion": {"prompt": [m[:1] for m in chats], "completion": [m[1:] for m in chats]},
    }[shape]
    pyarrow.parquet.write_table(pyarrow.table(columns | {"id": range(3)}), tmp_path / "a.parquet")
    found = read(open_rows(f"parquet:{tmp_path}/*.parquet"))
    assert [list(item.messages) for item in found] == chats


def test_a_table_without_a_column_of_conversations_says_what_one_is(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    message = "a.parquet: has no column 'messages' .data.messages_key.; .*a list of messages under one of messages"
    with pytest.raises(ValueError, match=message):
        open_rows(f"parquet:{tmp_path}/a.parquet")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, "zst"], ids=["plain", "gz", "zst"])
def test_a_json_array_is_read_by_number_plain_or_compressed(tmp_path, indent, pack):
    name = "a.json"
    if pack == "zst":
        pack, name = pytest.importorskip("zstandard").ZstdCompressor().compress, "a.json.zst"
    elif pack is gzip.compress:
        name = "a.json.gz"
    content = json.dumps([{"messages": chat(f"q{n}", "a")} for n in range(40)], indent=indent).replace("\n", "\r\n")
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + content.encode()))
    write_chats(tmp_path / "b.jsonl", [chat("last", "a")])
    rows = open_rows(f"jsonl:{tmp_path}/{name},{tmp_path}/b.jsonl")
    assert [count for _, count in rows.files] == [40, 1]
    assert contents(read(rows, [0, 7, 39, 40])) == ["q0", "q7", "q39", "last"]
    assert [item.name.rsplit("/")[-1] for item in read(rows, [7, 40])] == [f"{name}:row 7", "b.jsonl:1"]


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
    ("chats.txt", r"'chats.txt' is neither files of one kind that end in .jsonl, .json, .ndjson, .parquet \(JSON also with "
                  r".gz or .zst\), nor KIND:PATHS with a kind of jsonl, parquet, hf"),
    ("csv:a", "'csv:a' is neither"), ("a.jsonl,b.parquet", "files of one kind"), ("chats/", "is neither"),
    ("", "is neither"),
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON", "a.ndjson", "a.jsonl.gz", "a*.jsonl", "a.jsonl,b.json"])
def test_the_suffix_of_a_file_tells_its_kind(tmp_path, name):
    for part in name.replace("*", "").split(","):
        line = json.dumps({"messages": chat("q", "a")}).encode()
        (tmp_path / part).write_bytes(gzip.compress(line) if part.endswith(".gz") else line)
    paths = ",".join(f"{tmp_path}/{part}" for part in name.split(","))
    rows = open_rows(paths)
    assert len(rows) == len(name.split(",")) and rows.identity() == open_rows(f"jsonl:{paths}").identity()
