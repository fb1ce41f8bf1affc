"""Sources: what counts as a document, in which order, and how bad files are reported."""
from pathlib import Path

import pytest

from softmask_jax.data import Document, make_source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "B", "a.txt": "A\r\n", "sub/c.txt": "C", "sub/deep/d.txt": "D", "x.md": "X"}.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_the_standard_library_has_sources_but_no_tests_or_installed_packages():
    source = make_source("stdlib")
    names = [name for name, _ in source.files]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"site-packages", "__pycache__", "test", "tests", "idle_test"}
    assert next(iter(source)) == next(iter(source))
    total = sum(path.stat().st_size for _, path in source.files)
    assert 3e6 < total < 3e7


def test_globs_keep_their_order_recurse_and_take_each_file_once(folder):
    names = [name for name, _ in make_source("files", "sub/**/*.txt, *.txt,**/*.txt").files]
    assert names == ["sub/c.txt", "sub/deep/d.txt", "a.txt", "b.txt"]
    assert make_source("files", ("x.md",)).files[0][0] == "x.md"


def test_text_is_taken_byte_for_byte(folder):
    assert list(make_source("files", "a.txt")) == [Document("a.txt", "A\r\n")]


def test_a_separator_cuts_a_file_into_documents(folder):
    Path("many.txt").write_text("one<|x|>two<|x|>three")
    assert [doc.text for doc in make_source("files", "many.txt", separator="<|x|>")] == ["one", "two", "three"]


def test_a_pattern_without_a_match_is_named_with_the_folder(folder):
    with pytest.raises(FileNotFoundError) as error:
        make_source("files", "*.txt,nothing-*.txt")
    assert "'nothing-*.txt'" in one_line(error) and str(folder) in one_line(error)


def test_a_pattern_that_matches_only_folders_says_what_to_write(folder):
    with pytest.raises(FileNotFoundError) as error:
        make_source("files", "sub/")
    assert "'sub/**/*'" in one_line(error)


def test_files_without_paths_and_unknown_sources_are_errors():
    with pytest.raises(ValueError, match="needs data.paths"):
        make_source("files", " ,")
    with pytest.raises(ValueError, match="choose stdlib or files"):
        make_source("wikipedia")


@pytest.mark.parametrize(("content", "offset"), [(b"abc\xff\xfe", 3), (b"ab\0cd\xff", 2), (b"\xe9", 0)])
def test_a_binary_file_is_named_with_the_first_bad_byte(folder, content, offset):
    Path("bad.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(make_source("files", "bad.txt"))
    assert one_line(error).startswith(f"bad.txt: byte {offset} (0x{content[offset]:02x})")
    assert "iconv" in str(error.value)


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as error:
        list(make_source("files", "a.txt"))
    assert one_line(error).startswith("a.txt: cannot be read (Permission denied)")
