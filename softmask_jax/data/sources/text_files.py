"""Plain text: the interpreter's standard library, or files, each one document or cut by a separator."""
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from softmask_jax.data.sources.documents import BadRow, Document, Source, spans
from softmask_jax.data.sources.listing import Listed, fingerprint, list_files, listed, open_file

# Folders of tests, third-party code and build leftovers.
STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Parts are neighbouring files of about this size.
PART_BYTES = 16 << 20
# Files with a separator are read in steps of this size, or of the current document if that is longer.
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class FileSource(Source):
    """UTF-8 files, one document each, or several with a `separator`.

    Reading raises ValueError for a file that is not UTF-8 text, OSError for one that cannot be read.
    """

    name: str
    listing: tuple[Listed, ...]
    separator: str = ""

    @property
    def files(self) -> tuple[tuple[str, Path | str], ...]:
        """(name, path) of each file."""
        return tuple((file.name, file.path) for file in self.listing)

    @cached_property
    def _groups(self) -> tuple[tuple[int, int], ...]:
        return spans((file.size for file in self.listing), PART_BYTES)

    def identity(self) -> str:
        return fingerprint(self.name, self.separator, self._groups, self.listing)

    def read(self, part: int) -> Iterator[Document]:
        for file in self.listing[slice(*self._groups[part])]:
            if not self.separator:
                with open_file(file.path) as opened:
                    content = opened.read()
                yield Document(file.name, decode(content, file.path))
                continue
            offset = 0
            for number, content in enumerate(_pieces(file.path, self.separator.encode())):
                yield Document(f"{file.name}#{number}", decode(content, file.path, offset))
                offset += len(content) + len(self.separator.encode())


def _pieces(path: Path | str, separator: bytes) -> Iterator[bytes]:
    # Bytes can be cut before they are decoded: no character of UTF-8 holds the beginning of another.
    rest = b""
    with open_file(path) as file:
        while chunk := file.read(max(READ_BYTES, len(rest))):
            *pieces, rest = (rest + chunk).split(separator)
            yield from pieces
    yield rest


def decode(content: bytes, path: Path | str, start: int = 0) -> str:
    """Text of the content at byte `start` of a file, newlines unchanged.

    Raises ValueError, with the offset of the first offending byte, for content that is binary or not UTF-8.
    """
    text, bad = "", [content.find(b"\0")] * (b"\0" in content)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad.append(error.start)
    if bad:
        raise ValueError(
            f"{path}: byte {start + min(bad)} (0x{content[min(bad)]:02x}) is not UTF-8 text; leave the file out of "
            "data.paths if it is binary, or convert it (iconv -f ENCODING -t UTF-8) if it is text"
        )
    return text


class LibrarySource(FileSource):
    """Files that the user did not choose: one that is unreadable or not UTF-8 is a bad row."""

    def read(self, part: int) -> Iterator[Document | BadRow]:
        for file in self.listing[slice(*self._groups[part])]:
            try:
                yield Document(file.name, decode(file.path.read_bytes(), file.path))
            except OSError as error:
                yield BadRow(file.name, f"cannot be read ({error.strerror})")
            except ValueError:
                yield BadRow(file.name, "is not UTF-8 text")


def stdlib() -> LibrarySource:
    """The interpreter's standard library: every *.py outside tests and installed packages, about 12 MB.

    Sorted by names relative to its folder: machines with the same Python have the same corpus. Raises FileNotFoundError
    when this interpreter ships no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        # `config-*` and `_sysconfigdata*` record how this interpreter was built.
        subfolders[:] = [n for n in subfolders if n not in STDLIB_SKIPPED_FOLDERS and not n.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path.is_file():
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        remedy = "use data.source=files with data.paths"
        raise FileNotFoundError(f"{root}: this interpreter ships its standard library without *.py sources; {remedy}")
    return LibrarySource("stdlib", tuple(listed(name, path) for name, path in sorted(files)))


def local_files(patterns: str | Iterable[str], separator: str = "") -> FileSource:
    """The text files that `list_files` finds, and its errors."""
    return FileSource("files", list_files(patterns, "files"), separator)
