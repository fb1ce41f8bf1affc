"""Rows of JSON files, one a line or in an array, whole or damaged."""
import io
import json

import pytest

from softmask_jax.data import json_rows as module
from softmask_jax.data.json_rows import json_rows

VALUES = [{"text": 'é "[{,}]" \\ \n'}, {"a": [1, {"b": []}], "c": float("nan")}, "text", 12, None, [[1], 2], {}, []]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def rows(content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    return [(name, json.loads(row)) for name, row in json_rows(io.BytesIO(content), "a.json")]


def same(found, values):
    assert json.dumps([value for _, value in found]) == json.dumps(values)  # NaN is not equal to itself


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array_is_read_row_by_row_however_it_is_cut(monkeypatch, chunk, indent):
    monkeypatch.setattr(module, "HEAD_BYTES", 8)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    for text in (json.dumps(VALUES, indent=indent), json.dumps(VALUES, indent=indent, ensure_ascii=False)):
        same(rows(f" \n{text}\r\n"), VALUES)


@pytest.mark.parametrize("head", [8, 9, 10, 1 << 16])
def test_rows_are_named_by_line_or_counted(monkeypatch, head):
    monkeypatch.setattr(module, "HEAD_BYTES", head)
    assert rows('{"a": 1}\n\n{"b": 2}') == [("a.json:1", {"a": 1}), ("a.json:3", {"b": 2})]
    assert [name for name, _ in rows('[{"a": 1}, {"b": 2}]')] == ["a.json:row 0", "a.json:row 1"]


@pytest.mark.parametrize(("text", "values"), [
    ("[]", []), ("", []), (" \n", []), ("[1, 2,]", [1, 2]), ("[\n]\n", []), ("[1]\n[2, 3]\n", [1, 2, 3]),
    ('{\n"a": 1\n}\n{\n"b": [2]\n}\n', [{"a": 1}, {"b": [2]}]),
    (json.dumps(CHAT), [CHAT]), (json.dumps(CHAT, indent=1), [CHAT]), (f"{json.dumps(CHAT)}\n" * 2, [CHAT, CHAT]),
    (json.dumps([CHAT, CHAT]), [CHAT, CHAT]), ('{"a": 1}\n[1, 2]\n', [{"a": 1}, [1, 2]]),
    ("\ufeff[1, 2]", [1, 2]), ('\ufeff{"a": 1}', [{"a": 1}]),
])  # fmt: skip
def test_the_beginning_tells_lines_from_values_and_a_chat_from_rows(text, values):
    same(rows(text), values)


@pytest.mark.parametrize(("text", "reason"), [
    ("[1,\n2", "row 2 of its JSON cannot be read .the file is cut short, line 2."),
    ('[{"a": 1},\n{"b": "tex', "row 1 .*the file is cut short, line 2"),
    ("[1,\n2,", "row 2 .*the file is cut short"), ("[", "row 0 .*the file is cut short"),
    ('[1, {"a": 1,}, 3]', "row 1 of its JSON cannot be read .(Illegal trailing comma|Expecting property name)"),
    ("[1\n2]", "row 1 of its JSON .*no comma behind it, line 2."), ("[1, two]", "row 1 .*Expecting value"),
    ("[1] x", "row 1 .*Expecting value"), (b'["\xff"]', "row 0 .*no UTF-8"), ("[" + "[" * 100_000, "row 0 .*recursion"),
])  # fmt: skip
def test_a_damaged_array_is_an_error_that_names_the_row_and_line(text, reason):
    with pytest.raises(ValueError, match=f"^a.json: {reason}") as error:
        rows(text)
    assert "\n" not in str(error.value) and str(error.value).endswith("or write one row a line (JSON Lines)")


def test_a_row_too_long_to_be_one_is_an_error_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(module, "ROW_CHARACTERS", 100)
    monkeypatch.setattr(module, "HEAD_BYTES", 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 10)
    assert len(rows(json.dumps(["x" * 90] * 50))) == 50
    with pytest.raises(ValueError, match="row 1 of its JSON cannot be read .it has more than 100 characters, line 1"):
        rows(json.dumps([1, "x" * 1000]))
