"""JSON Lines and Parquet: parts, bad rows, and files that cannot be used."""
import gzip
import json
import os
import pickle
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from softmask_jax.data.sources import BadRow, make_source, records
from tests.helpers.source_files import json_rows, one_line

GOOD = b'{"text": "fine"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(source) -> list[str]:
    """Texts, and reasons of bad rows: what does not depend on parts."""
    return [item.reason if type(item) is BadRow else item.text for item in source]


def table(path: str, columns: dict, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\n\n", b"\n \r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_ranges_of_any_size_join_to_the_same_rows(monkeypatch, ends, last):
    texts = ["a", "", "é € 𝄞" * 3, "long " * 30, "b\r\nc", "z"]
    content = json_rows(texts).replace(b"\n", ends) + b"not json" + ends + b'{"text": "end"}' + ends * last
    Path("rows.jsonl").write_bytes(content)
    Path("more.jsonl").write_bytes(b'{"text": "more"}')
    whole = make_source("jsonl", "rows.jsonl,more.jsonl")
    expected = [*texts, "is not valid JSON (Expecting value at column 1)", "end", "more"]
    assert contents(whole) == expected and whole.num_parts() == 1
    for size in (1, 2, 3, 5, 8, 13, 50, len(content) - 1, len(content), len(content) + 1):
        monkeypatch.setattr(records, "PART_BYTES", size)
        source = pickle.loads(pickle.dumps(make_source("jsonl", "rows.jsonl,more.jsonl")))
        assert contents(source) == expected, size
        assert source.num_parts() >= len(content) // size
        assert source.identity() != whole.identity()


def test_a_line_belongs_to_the_range_in_which_it_begins(monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 20)
    lines = [b'{"text": "1"}\n', b'{"text": "%s"}\n' % (b"x" * 100), b'{"text": "3"}\n']
    Path("a.jsonl").write_bytes(b"".join(lines))
    source = make_source("jsonl", "a.jsonl")
    parts = [[item.text[0] for item in source.read(part)] for part in range(source.num_parts())]
    assert parts == [["1", "x"], [], [], [], [], [], ["3"], []]
    assert [item.name for item in source] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:byte 127"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a" "b"}', "is not valid JSON (Expecting ',' delimiter at column 14)"),
        (b"[1, 2]", "is no JSON object but list; this is JSON, but not JSON Lines: write one object a line"),
        (b"[", "is not valid JSON (Expecting value at column 1); this is JSON, but not JSON Lines: write one object"),
        (b"null", "is no JSON object but NoneType"),
        (b'{"texts": "a", "id": 1}', "has no key 'text'; the nearest is 'texts'"),
        (b'{"id": 1, "body": "a"}', "has no key 'text'; there are 'id', 'body'"),
        (b"{}", "has no key 'text'; there is none"),
        (b'{"text": 5}', "has no text in 'text' but int"),
        (b'{"text": null}', "has no text in 'text' but null"),
        (b'{"text": "a\xff"}', "is not UTF-8 at byte 11 (0xff) of the line"),
        (b'{"text": "\\ud834"}', "holds half a character (\\ud834) in 'text'"),
        (b'{"text": ' + b"[" * 100_000, "is not readable JSON (maximum recursion depth exceeded"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "is not readable JSON (Exceeds the limit"),
    ],
)
def test_a_line_without_text_is_a_bad_row_with_its_reason(line, reason):
    Path("a.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    first, bad, last = make_source("jsonl", "a.jsonl")
    assert first.text == last.text == "fine"
    assert type(bad) is BadRow and bad.name == "a.jsonl:2" and bad.reason.startswith(reason)
    assert "\n" not in bad.reason and len(bad.reason) < 300


def test_dotted_keys_look_inside_objects():
    rows = [{"meta": {"text": "in"}}, {"meta.text": "flat"}, {"meta": {"txt": ""}}, {"meta": "x"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert contents(make_source("jsonl", "a.jsonl", text_key="meta.text")) == [
        "in", "flat", "has no key 'meta.text'; the nearest is 'meta.txt'", "has in 'meta' no JSON object but str"
    ]


def test_nul_escaped_surrogate_pairs_and_a_byte_order_mark_are_text():
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + json_rows(["nul \0", "𝄞"], ascii_only=True))
    assert contents(make_source("jsonl", "a.jsonl")) == ["fine", "nul \0", "𝄞"]


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_compressed_files_are_one_part_each_and_their_lines_are_numbered(monkeypatch, end):
    monkeypatch.setattr(records, "PART_BYTES", 10)
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[end]
    # Two members or frames, as `cat a b` or a parallel compressor makes them.
    Path(f"a.jsonl{end}").write_bytes(pack(GOOD * 3) + pack(GOOD + b"\n{}\n"))
    Path(f"b.jsonl{end}").write_bytes(pack(GOOD))
    source = make_source("jsonl", f"*.jsonl{end}")
    assert source.num_parts() == 2
    assert [item.name for item in source.read(0)] == [f"a.jsonl{end}:{n}" for n in (1, 2, 3, 4, 6)]


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage", [lambda c: c[:-9], lambda c: c[:2], lambda c: b"junk" + c, lambda c: c + b"junk" * 9]
)
def test_a_damaged_compressed_file_is_named(end, damage):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[end]
    Path(f"a.jsonl{end}").write_bytes(damage(pack(json_rows([str(n) for n in range(9999)]))))
    with pytest.raises(ValueError) as error:
        list(make_source("jsonl", f"a.jsonl{end}"))
    assert one_line(error).startswith(f"a.jsonl{end}: damaged or cut short (")


def test_zst_without_its_package_says_what_to_install(monkeypatch):
    Path("a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError) as error:
        make_source("jsonl", "a.jsonl.zst")
    assert one_line(error) == "a.jsonl.zst: *.zst needs a package: pip install 'softmask_jax[zst]'"


def test_an_empty_file_and_one_of_blank_lines_are_errors():
    Path("a.jsonl").touch()
    with pytest.raises(ValueError, match=r"^a\.jsonl: is empty"):
        make_source("jsonl", "a.jsonl")
    Path("a.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"^a\.jsonl: holds no row"):
        list(make_source("jsonl", "a.jsonl"))


def test_a_file_without_any_good_row_is_an_error_after_its_rows():
    Path("a.jsonl").write_bytes(b'{"content": "a"}\n' * 3)
    Path("b.jsonl").write_bytes(GOOD)
    items = iter(make_source("jsonl", "b.jsonl,a.jsonl"))
    assert [type(next(items)) is BadRow for _ in range(4)] == [False, True, True, True]
    with pytest.raises(ValueError) as error:
        next(items)
    assert one_line(error).startswith("a.jsonl: none of its 3 rows holds text; a.jsonl:1 has no key 'text'; ")


def test_a_range_without_a_good_row_is_an_error_only_when_it_has_many(monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 100)
    Path("a.jsonl").write_bytes(GOOD * 10 + b"bad\n" * 10 + GOOD * 10)
    assert contents(make_source("jsonl", "a.jsonl")).count("fine") == 20
    Path("a.jsonl").write_bytes(GOOD * 10 + b"bad\n" * 100 + GOOD * 10)
    with pytest.raises(ValueError, match=r"^a\.jsonl: none of its 25 rows holds text; a\.jsonl:byte \d+ is not valid"):
        list(make_source("jsonl", "a.jsonl"))


def test_row_groups_are_joined_into_parts(monkeypatch):
    texts = [f"row {n}" for n in range(100)]
    table("a.parquet", {"id": list(range(100)), "text": texts}, row_group_size=10)
    table("b.parquet", {"text": ["last"]})
    whole = make_source("parquet", "*.parquet")
    assert whole.num_parts() == 1 and contents(whole) == [*texts, "last"]
    for size in (1, 200, 500):
        monkeypatch.setattr(records, "PART_BYTES", size)
        source = make_source("parquet", "*.parquet")
        parts = [list(source.read(part)) for part in range(source.num_parts())]
        assert len(parts) > 2 and all(parts)
        assert [item for part in parts for item in part] == list(whole)
        assert source.identity() != whole.identity()


def test_rows_are_decoded_in_small_batches(monkeypatch):
    monkeypatch.setattr(records, "BATCH_BYTES", 100)
    texts = ["x" * n for n in range(200)]
    table("a.parquet", {"text": texts})
    assert contents(make_source("parquet", "a.parquet")) == texts


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str
)
def test_strings_of_every_kind_are_read_and_nulls_are_bad_rows(kind):
    table("a.parquet", {"text": pyarrow.array(["é", None, "é"], pyarrow.string()).cast(kind)})
    first, bad, last = make_source("parquet", "a.parquet")
    assert first.text == last.text == "é"
    assert bad == BadRow("a.parquet:row 1", "has no text in 'text' but null")


def test_a_string_that_is_not_utf8_is_a_bad_row():
    strings = pyarrow.array([b"fine", b"a\xff"], pyarrow.binary()).view(pyarrow.string())
    table("a.parquet", {"text": strings})
    assert contents(make_source("parquet", "a.parquet")) == ["fine", "is not UTF-8 at byte 1 of 'text'"]


def test_a_column_that_is_missing_or_holds_no_strings_is_an_error():
    table("a.parquet", {"txt": ["a"], "n": [1]})
    with pytest.raises(ValueError) as error:
        make_source("parquet", "a.parquet")
    assert one_line(error) == "a.parquet: has no column 'text' (data.text_key); the nearest is 'txt'"
    with pytest.raises(ValueError, match="column 'n' holds int64, not strings"):
        make_source("parquet", "a.parquet", text_key="n")


def test_a_parquet_file_without_rows_or_text_is_an_error():
    table("a.parquet", {"text": pyarrow.array([], pyarrow.string())})
    with pytest.raises(ValueError, match=r"^a\.parquet: holds no row"):
        make_source("parquet", "a.parquet")
    table("a.parquet", {"text": pyarrow.array([None, None], pyarrow.string())})
    with pytest.raises(ValueError, match=r"^a\.parquet: none of its 2 rows holds text; a\.parquet:row 0 has no text"):
        list(make_source("parquet", "a.parquet"))


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: b"", lambda c: b"text", lambda c: c[4000:]])
def test_a_damaged_parquet_file_is_named(damage):
    table("a.parquet", {"text": [str(n) for n in range(9999)]})
    content = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(damage(content))
    with pytest.raises(ValueError) as error:
        list(make_source("parquet", "a.parquet"))
    assert one_line(error).startswith("a.parquet: damaged or no Parquet file (")


def test_damage_inside_a_parquet_file_is_named():
    table("a.parquet", {"text": [str(n) for n in range(9999)]}, compression="zstd")
    content = bytearray(Path("a.parquet").read_bytes())
    content[100:5000] = b"\xff" * 4900
    Path("a.parquet").write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(make_source("parquet", "a.parquet"))
    assert one_line(error).startswith("a.parquet: damaged or no Parquet file (")


def test_parquet_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'softmask_jax\[parquet\]'"):
        make_source("parquet", "*.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_identity_of_rows_follows_files_and_key(kind):
    Path("a.jsonl").write_bytes(GOOD)
    table("a.parquet", {"text": ["a"], "body": ["b"]})
    before = make_source(kind, f"a.{kind}").identity()
    assert make_source(kind, f"a.{kind}").identity() == before
    assert make_source(kind, f"a.{kind}", text_key="body").identity() != before
    os.utime(f"a.{kind}", (1, 1))
    assert make_source(kind, f"a.{kind}").identity() != before
