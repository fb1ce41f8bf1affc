"""Sources: what counts as a document, in which order, in which parts, and how bad files are reported."""
import json
import os
import pickle
import sys
from pathlib import Path

import fsspec
import pytest

from softmask_jax.data.sources import BadRow, Document, make_source, text_files
from softmask_jax.data.sources.listing import list_files, open_file
from tests.helpers.source_files import TEXTS, one_line, save_texts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "B", "a.txt": "A\r\n", "sub/c.txt": "C", "sub/deep/d.txt": "D", "x.md": "X"}.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_the_standard_library_has_sources_but_no_tests_or_installed_packages():
    source = make_source("stdlib")
    names = [file.name for file in source.listing]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"site-packages", "__pycache__", "test", "tests", "idle_test"}
    assert next(iter(source)) == next(iter(source))
    total = sum(file.path.stat().st_size for file in source.listing)
    assert 3e6 < total < 3e7


def test_a_file_of_the_standard_library_that_cannot_be_read_is_a_bad_row(tmp_path, monkeypatch):
    for name, content in {"a.py": b"a = 1", "latin.py": b"# \xe9", "null.py": b"\0", "z.py": b"z = 1"}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(text_files.sysconfig, "get_path", lambda name: str(tmp_path))
    source = make_source("stdlib")
    (tmp_path / "z.py").unlink()
    assert list(source) == [
        Document("a.py", "a = 1"), BadRow("latin.py", "is not UTF-8 text"), BadRow("null.py", "is not UTF-8 text"),
        BadRow("z.py", "cannot be read (No such file or directory)"),
    ]  # fmt: skip


def test_globs_keep_their_order_recurse_and_take_each_file_once(folder):
    names = [file.name for file in make_source("files", "sub/**/*.txt, *.txt,**/*.txt").listing]
    assert names == ["sub/c.txt", "sub/deep/d.txt", "a.txt", "b.txt"]
    assert make_source("files", ("x.md",)).listing[0].name == "x.md"


def test_text_is_taken_byte_for_byte(folder):
    assert list(make_source("files", "a.txt")) == [Document("a.txt", "A\r\n")]


def test_a_separator_cuts_a_file_into_documents(folder):
    Path("many.txt").write_text("one<|x|>two<|x|>three")
    assert list(make_source("files", "many.txt", separator="<|x|>")) == [
        ("many.txt#0", "one"), ("many.txt#1", "two"), ("many.txt#2", "three")
    ]


@pytest.mark.parametrize("separator", ["\n\n", "é", "aa", "<|x|>"])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_separator_across_two_reads_is_found(folder, monkeypatch, separator, step):
    monkeypatch.setattr(text_files, "READ_BYTES", step)
    for text in ("", "aaaaa", "é\n\n\nü<|x|>é", "<|x|><|x|", "x" * 50 + "\n\n" + "é" * 20):
        Path("many.txt").write_text(text)
        found = [document.text for document in make_source("files", "many.txt", separator=separator)]
        assert found == text.split(separator)


def test_files_are_parts_in_groups_and_a_large_one_is_alone(folder, monkeypatch):
    monkeypatch.setattr(text_files, "PART_BYTES", 4)
    Path("a.txt").write_bytes(b"A" * 100)
    source = make_source("files", "*.txt,sub/**/*.txt,x.md")
    parts = [[document.name for document in source.read(part)] for part in range(source.num_parts())]
    assert parts == [["a.txt"], ["b.txt", "sub/c.txt", "sub/deep/d.txt", "x.md"]]


def test_an_empty_file_is_a_blank_document(folder):
    Path("empty.txt").touch()
    source = make_source("files", "empty.txt")
    assert source.num_parts() == 1 and list(source) == [Document("empty.txt", "")]


def test_the_same_documents_in_every_kind_of_file_are_the_same_texts(tmp_path):
    sources = save_texts(tmp_path, TEXTS)
    assert set(sources) == {"files", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tfds"}
    for form, source in sources.items():
        assert [item.text for item in source] == TEXTS, form


def test_sources_survive_pickling_and_parts_join_to_the_whole(tmp_path):
    for source in [make_source("stdlib"), *save_texts(tmp_path, TEXTS).values()]:
        whole = list(source)
        copy = pickle.loads(pickle.dumps(source))
        assert [item for part in range(copy.num_parts()) for item in copy.read(part)] == whole == list(source)
        assert copy.identity() == source.identity() and copy.name == source.name


def test_the_identity_follows_files_and_settings(folder):
    def identity(**settings):
        return make_source("files", "*.txt", **settings).identity()

    before = identity()
    assert identity() == before
    assert len({before, identity(separator="x"), identity(detokenizer="lm1b")}) == 3
    stat = os.stat("a.txt")
    os.utime("a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = identity()
    Path("c.txt").touch()
    assert len({before, touched, identity()}) == 3


def test_a_detokenizer_changes_texts_and_leaves_bad_rows(folder):
    Path("a.jsonl").write_text('{"text": "It \'s fine ."}\nnot json\n')
    source = make_source("jsonl", "a.jsonl", detokenizer="lm1b")
    first, second = source
    assert first.text == "It's fine." and type(second) is BadRow
    assert source.name == "jsonl" and source.num_parts() == 1
    with pytest.raises(ValueError, match="choose '' or one of lm1b"):
        make_source("jsonl", "a.jsonl", detokenizer="x")


def test_a_pattern_without_a_match_is_named_with_the_folder(folder):
    with pytest.raises(FileNotFoundError) as error:
        make_source("files", "*.txt,nothing-*.txt")
    assert "'nothing-*.txt'" in one_line(error) and str(folder) in one_line(error)


def test_a_pattern_that_matches_only_folders_says_what_to_write(folder):
    with pytest.raises(FileNotFoundError) as error:
        make_source("files", "sub/")
    assert "'sub/**/*'" in one_line(error)


def test_sources_without_paths_and_unknown_sources_are_errors():
    for kind in ("files", "jsonl", "parquet"):
        with pytest.raises(ValueError, match=f"data.source={kind} needs data.paths"):
            make_source(kind, " ,")
    with pytest.raises(ValueError, match="choose one of stdlib, files, jsonl, parquet, tfds, hf"):
        make_source("wikipedia")


@pytest.mark.parametrize(("content", "offset"), [(b"abc\xff\xfe", 3), (b"ab\0cd\xff", 2), (b"\xe9", 0)])
@pytest.mark.parametrize("separator", ["", "b", "|"])
def test_a_binary_file_is_named_with_the_first_bad_byte(folder, content, offset, separator):
    Path("bad.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(make_source("files", "bad.txt", separator=separator))
    assert one_line(error).startswith(f"bad.txt: byte {offset} (0x{content[offset]:02x})")
    assert "iconv" in str(error.value)


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as error:
        list(make_source("files", "a.txt"))
    assert one_line(error).startswith("a.txt: cannot be read (Permission denied)")


def test_a_file_that_went_away_is_named(folder):
    source = make_source("files", "a.txt")
    Path("a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"^a\.txt: cannot be read"):
        list(source)


def test_files_behind_a_url_read_as_local_ones_do(folder, bucket):
    bucket.pipe("/texts/b.txt", b"B")
    bucket.pipe("/texts/deep/a.txt", b"A\r\n")
    bucket.pipe("/texts/rows.jsonl", b'{"text": "one"}\n{"text": "two"}')
    source = make_source("files", "memory://texts/**/*.txt,a.txt,memory://texts/b.txt")
    assert [item.text for item in source] == ["B", "A\r\n", "A\r\n"]
    assert [file.name for file in source.listing] == ["memory:///texts/b.txt", "memory:///texts/deep/a.txt", "a.txt"]
    assert [item.text for item in make_source("jsonl", "memory://texts/*.jsonl")] == ["one", "two"]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
    bucket.pipe("/texts/b.txt", b"b")
    assert make_source("files", "memory://texts/**/*.txt,a.txt").identity() != source.identity()


def test_parquet_behind_a_url_reads_as_local_ones_do(tmp_path, bucket):
    save_texts(tmp_path, TEXTS)
    bucket.pipe("/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    assert [item.text for item in make_source("parquet", "memory://rows.parquet")] == TEXTS


def test_a_url_that_matches_nothing_or_that_nothing_reads_is_an_error(bucket, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file matches 'memory://nothing/"):
        make_source("files", "memory://nothing/*.txt")
    with pytest.raises(ValueError, match="nothing here reads nosuch://"):
        make_source("files", "nosuch://a/*.txt")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # Runs in buckets register gcsfs's class, which fsspec then need not import.
    for name in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    with pytest.raises(ImportError) as error:
        make_source("files", "gs://bucket/*.txt")
    assert "pip install 'softmask_jax[gcs]'" in one_line(error)


def test_a_bucket_that_does_not_answer_is_one_line(bucket, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(type(bucket), "glob", fail)
    with pytest.raises(OSError) as error:
        make_source("files", "memory://texts/*.txt")
    assert "cannot be listed (RuntimeError: no route); check the network" in one_line(error)


def test_nothing_that_reads_rows_is_imported_before_it_is_needed():
    import subprocess

    heavy = ["pyarrow", "tensorflow_datasets", "datasets", "zstandard", "jax", "tensorflow"]
    code = f"import json, sys, softmask_jax.data.sources; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert json.loads(output) == []


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a[b].txt", ["a[b].txt"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("?", ["?"]),
        ("p [v2],/*.txt", ["p [v2],/x.txt"]),
        ("p [v2],/*.txt,a.txt", ["p [v2],/x.txt", "a.txt"]),
        ("a.txt, b.txt", ["a.txt", "b.txt"]),
        ("a.txt,[ab].txt,p [v2],/x.txt", ["a.txt", "b.txt", "p [v2],/x.txt"]),
        (" c,d ", [" c,d "]),
        ("**/x.txt", ["p v/x.txt", "p [v2],/x.txt"]),
        ("~no_such_user/x", ["~no_such_user/x"]),
        ("HOME/[ab].txt", ["a.txt", "b.txt"]),
        ("HOME/p [v2],/*.txt,HOME/?", ["?", "p [v2],/x.txt"]),
    ],
)
def test_what_exists_under_its_name_is_neither_a_pattern_nor_a_list(tmp_path, monkeypatch, pattern, names):
    home = tmp_path / "h [1]*"
    for name in ("a[b].txt", "ab.txt", "a.txt", "b.txt", "?", "1", "p v/x.txt", "p [v2],/x.txt", " c,d ", "~no_such_user/x"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    monkeypatch.chdir(home)
    found = [os.path.relpath(file.path, home) for file in list_files(pattern.replace("HOME", str(home)), "files")]
    assert sorted(found) == sorted(names)


def test_an_object_of_a_bucket_that_exists_under_its_name_is_no_pattern():
    system = fsspec.filesystem("memory")
    for name in ("/odd/a[b].txt", "/odd/ab.txt"):
        system.pipe_file(name, name.encode())
    (file,) = list_files("memory://odd/a[b].txt", "files")
    assert open_file(file.path).read() == b"/odd/a[b].txt"
    system.rm("/odd", recursive=True)
