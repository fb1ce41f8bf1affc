"""Where documents come from: the interpreter's standard library, or local files.

A source is anything with a `name` that can be iterated any number of times and yields the same `Document`s in the same
order each time; JSONL, parquet, TFDS or ArrayRecord sources only have to do that. Sources read lazily and keep nothing,
so that a corpus may be larger than memory.
"""
import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

# Folders of the standard library that are tests, third-party code or build leftovers rather than library source.
STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Document(NamedTuple):
    """One text of the corpus. `name` is for messages only: identity is the text."""

    name: str
    text: str


class Source(Protocol):
    """A re-iterable sequence of documents in a stable order."""

    name: str

    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class FileSource:
    """UTF-8 files, one document each, or several when `separator` is given.

    `files` holds (name, path) pairs. Iterating raises ValueError for a file that is not UTF-8 text and OSError for one
    that cannot be read; both name the file and say what to do.
    """

    name: str
    files: tuple[tuple[str, Path], ...]
    separator: str = ""

    def __iter__(self) -> Iterator[Document]:
        for name, path in self.files:
            text = read_text(path)
            if not self.separator:
                yield Document(name, text)
                continue
            for number, part in enumerate(text.split(self.separator)):
                yield Document(f"{name}#{number}", part)


def read_text(path: Path) -> str:
    """The file's text, byte for byte (no newline translation).

    Raises ValueError, with the offset of the first offending byte, for a file that is binary or not UTF-8; OSError of
    the original kind for one that cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = "fix its permissions or leave it out of data.paths"
        raise type(error)(f"{path}: cannot be read ({error.strerror or error}); {hint}") from error
    offset = content.find(b"\0")
    text = ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start if offset < 0 else min(offset, error.start)
    if offset >= 0:
        raise ValueError(
            f"{path}: byte {offset} (0x{content[offset]:02x}) is not UTF-8 text; leave the file out of data.paths if "
            "it is binary, or convert it (iconv -f ENCODING -t UTF-8) if it is text"
        )
    return text


def stdlib() -> FileSource:
    """The running interpreter's standard library: every *.py outside tests and installed packages, about 12 MB.

    Names are relative to the library's folder, and so is the order: two machines with the same Python see the same
    corpus. Raises FileNotFoundError when this interpreter ships no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        # `config-*` and `_sysconfigdata*` record how this one interpreter was built: paths and flags, not source.
        subfolders[:] = [n for n in subfolders if n not in STDLIB_SKIPPED_FOLDERS and not n.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path.is_file():
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise FileNotFoundError(
            f"{root}: this interpreter ships its standard library without *.py sources; use data.source=files with "
            "data.paths"
        )
    return FileSource("stdlib", tuple(sorted(files)))


def local_files(patterns: str | Iterable[str], separator: str = "") -> FileSource:
    """Files that match glob patterns (comma-separated, or a sequence when a name holds a comma); ** is recursive.

    Order: the patterns as given, names sorted within each; a file that several patterns match is taken once.
    Raises ValueError without patterns, FileNotFoundError for a pattern that matches no file.
    """
    patterns = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    patterns = [pattern.strip() for pattern in patterns if pattern.strip()]
    if not patterns:
        raise ValueError("data.source=files needs data.paths: glob patterns, comma-separated, such as texts/**/*.txt")
    files: dict[Path, tuple[str, Path]] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = sorted(glob.glob(expanded, recursive=True))
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            if matches:
                inside = pattern.rstrip("/") + "/**/*"
                raise FileNotFoundError(f"data.paths: {pattern!r} matches only folders; for their files use {inside!r}")
            raise FileNotFoundError(f"data.paths: no file matches {pattern!r} (looked from {os.getcwd()})")
        for path in found:
            files.setdefault(path.resolve(), (path.as_posix(), path))
    return FileSource("files", tuple(files.values()), separator)


def make_source(kind: str, paths: str | Iterable[str] = "", separator: str = "") -> Source:
    """The source named `kind`: stdlib or files. Raises ValueError for any other."""
    if kind == "stdlib":
        return stdlib()
    if kind == "files":
        return local_files(paths, separator)
    raise ValueError(f"data.source={kind!r} is unknown; choose stdlib or files")
